"""`patch(model)` puts the kernels into an existing model; `unpatch(model)` removes them.

Only instances change: a replaced module gets an instance-level `forward` and, with "attention", a
copy of its config; the model then gets a method for continuous batching, too. Classes and module
globals are not touched, so other models of the same class in the process are not affected. Each
module stores what was there before, so a copy or a pickle of a patched model is patched too and can
be unpatched separately.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from gqa_kernels.patching.plan import BEFORE, Plan, make_plan

OPS = ("rms_norm", "swiglu", "rope", "attention", "torch_rms_norm", "linear_cross_entropy")
DEFAULT_OPS = OPS[:4]


class Report:
    """The result of a call of `patch`. As a context manager it undoes that call at exit.

    Attributes:
        replaced: (module, op) in the model's order, "" for the model itself; "add_rms_norm" stands
            for a layer whose residual add and norm are one pass.
        not_replaced: (module, op, reason), or ("", op, reason) if the model has no such module.
        not_fused: (module, "add_rms_norm", reason) of layers whose norm is replaced but whose
            residual add remains a separate step. `strict` accepts these.
    """

    def __init__(self, model_name: str, plan: Plan) -> None:
        self.replaced, self.not_replaced = plan.replaced, plan.not_replaced
        self.not_fused = plan.not_fused
        self._model_name, self._changes = model_name, plan.changes

    def __str__(self) -> str:
        lines = [f"{self._model_name}:"]
        for op, names in _grouped((entry.op, entry.module) for entry in self.replaced):
            lines.append(f"  {op}: {names or 'the model itself'}")
        for what, entries in (("not replaced", self.not_replaced), ("not fused", self.not_fused)):
            for (op, reason), names in _grouped(((e.op, e.reason), e.module) for e in entries):
                lines.append(f"  {op} {what}{f' in {names}' if names else ''}: {reason}")
        return "\n".join(lines)

    __repr__ = __str__

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: Any) -> None:
        _undo(
            [
                (module, attribute)
                for module, attribute, value in self._changes
                # Keeps what another call has set since.
                if vars(module).get(BEFORE, {}).get(attribute, (None,))[0] is value
            ]
        )


def patch(model: nn.Module, ops: Collection[str] = DEFAULT_OPS, *, strict: bool = False) -> Report:
    """Replaces modules of this model, and of no other, by Triton kernels.

        rms_norm    RMSNorm as in Llama, Mistral, Qwen; Gemma's 1 + weight, and norms that multiply
                    before they round, through float32 copies; residual add and second norm of a
                    Llama-like decoder layer in one pass
        swiglu      MLPs with SiLU: gate_proj and up_proj, or gate_up_proj
        rope        attention of Transformers that rotates all features by halves: the kernel reads
                    the projections in place and rotates in float32, by cos and sin as Transformers
                    rounds them to the activations' dtype
        attention   the attention function of a Transformers model's causal attention, in a copy of
                    its config; dropout in training raises, see `integrations.transformers`. Also in
                    `generate_batch`, see `integrations.transformers_paged`
        torch_rms_norm   torch.nn.RMSNorm, in Llama's order of roundings: in 16 bits the normalised
                    value is rounded before it is multiplied by the weight, not only after
        linear_cross_entropy   the loss of a Transformers model with an lm_head, from hidden states
                    and lm_head.weight: called with labels, the model computes no logits

    The last two are opt-in: torch_rms_norm rounds differently from the model, and with
    linear_cross_entropy a call with labels returns `outputs.logits` as None, which metrics and
    trainers may read. A call without labels returns logits as before.

    A module is replaced if its class's forward, run on a small stand-in, computes the same as the
    op; see `stand_ins`. Forwards call projections and never read their weights, except for the head
    of the loss. A replaced module runs the kernel or raises the kernel's error: a model may be
    patched on the CPU and moved to a GPU, but does not run until then. A layer adds and normalises
    in two steps, with the same bits, if its norm has hooks, if the two terms differ in dtype as
    under autocast, or while Transformers checkpoints its activations.

    The loss is that of Transformers' ForCausalLMLoss, with ignore_index, num_items_in_batch and
    shift_labels; logits may have Gemma 2's soft cap or a factor that is a power of two. The head
    must be a torch.nn.Linear with a plain weight and no bias, hooks or adapter, and the loss
    function Transformers' own. Other models raise here, strict or not; a model whose head or loss
    function changes later raises when called with labels, and so does output_router_logits, which
    adds to the loss. Under autocast, hidden states and weight are cast like those of a projection.

    A module with an instance-level `forward` is not replaced, since that forward overrides the
    class's. Patch before torch.compile; before or after FSDP2. Patching again adds replacements.

    Modules are checked only here: an act_fn or a hook on it that is set later goes unnoticed. With
    "attention", changes of the model's config, such as by resize_token_embeddings, affect the copy,
    and `unpatch` reverts them.

    Args:
        ops: some of the names above.
        strict: raise if a requested op cannot be replaced, and leave the model unchanged.
    Returns:
        A report, to print, or to undo this call: `with patch(model): …`.
    Raises:
        TypeError: model is not a module.
        ValueError: ops has an unknown name; with `strict`, something is not replaced; without it,
            "linear_cross_entropy" was requested and is not replaced. The message is the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(ops, Collection) or isinstance(ops, str) or not set(ops) <= set(OPS):
        raise ValueError(f"ops: expected a set of some of {', '.join(OPS)}; got {ops!r}")
    plan = make_plan(model, [op for op in OPS if op in ops])
    report = Report(type(model).__name__, plan)
    # A caller that requests a loss without logits may not have the memory for logits.
    if any(strict or op == "linear_cross_entropy" for _, op, _ in plan.not_replaced):
        expected = "every op" if strict else "linear_cross_entropy"
        raise ValueError(f"model: expected {expected} to be replaced; got\n{report}")
    for change in plan.changes:
        _set(*change)
    return report


def unpatch(model: nn.Module) -> None:
    """Restores every module of the model to its state before `patch`; a no-op without patches.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a `forward` or a config that `patch` set has been replaced; nothing is undone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    _undo([(m, attribute) for m in model.modules() for attribute in vars(m).get(BEFORE, ())])


def _set(module: nn.Module, attribute: str, value: Any) -> None:
    own = vars(module)
    record = own.setdefault(BEFORE, {})
    if attribute in record:
        before = record[attribute][1:]
    else:
        before = (own[attribute],) if attribute in own else ()
    record[attribute] = (value, *before)
    own[attribute] = value


def _undo(places: list[tuple[nn.Module, str]]) -> None:
    for module, attribute in places:
        if vars(module).get(attribute) is not vars(module)[BEFORE][attribute][0]:
            raise RuntimeError(
                f"{type(module).__name__}.{attribute}: expected what patch set; got another, set "
                "later. Undo that first"
            )
    for module, attribute in places:
        own = vars(module)
        _, *before = own[BEFORE].pop(attribute)
        if before:
            own[attribute] = before[0]
        else:
            del own[attribute]
        if not own[BEFORE]:
            del own[BEFORE]


def _grouped(entries: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """(key, names) in order; names that differ only in a number are merged and counted."""
    groups: dict[Any, dict[str, int]] = {}
    for key, name in entries:
        pattern = re.sub(r"\d+", "*", name)
        counts = groups.setdefault(key, {})
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        (key, ", ".join(f"{n} ({count})" if "*" in n else n for n, count in counts.items()))
        for key, counts in groups.items()
    ]
