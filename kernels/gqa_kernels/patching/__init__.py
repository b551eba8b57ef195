"""`patch(model)`: the kernels in a model that others wrote, and `unpatch(model)`.

Only instances change: a replaced module gets a `forward` of its own, and with "attention" a config
of its own. No class and no module global is touched, so that another model of the same class in the
same process knows nothing of it. What was there before is kept on each module, hence a copy or a
pickle of a patched model is patched, and can be unpatched for itself.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from gqa_kernels.patching.plan import BEFORE, Plan, make_plan

OPS = ("rms_norm", "swiglu", "rope", "attention", "torch_rms_norm", "linear_cross_entropy")
DEFAULT_OPS = OPS[:4]


class Report:
    """What a call of `patch` found. As a context manager it undoes that call at the end.

    Attributes:
        replaced: (module, op) in the model's order, "" for the model itself; "add_rms_norm" stands
            for a layer whose residual add and norm are one pass.
        not_replaced: (module, op, reason), or ("", op, reason) where no module was of the kind.
        not_fused: (module, "add_rms_norm", reason) of layers whose norm is replaced and whose
            residual add stays apart. `strict` does not mind.
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
                # Not what another call has set since.
                if vars(module).get(BEFORE, {}).get(attribute, (None,))[0] is value
            ]
        )


def patch(model: nn.Module, ops: Collection[str] = DEFAULT_OPS, *, strict: bool = False) -> Report:
    """Puts the Triton kernels into this model, and only into this one.

        rms_norm    RMSNorm as in Llama, Mistral, Qwen; Gemma's 1 + weight, and norms that multiply
                    before they round, through float32 copies; residual add and second norm of a
                    Llama-like decoder layer in one pass
        swiglu      MLPs with SiLU: gate_proj and up_proj, or gate_up_proj
        rope        attention of Transformers that rotates all features by halves: the kernel reads
                    the projections where they are and rotates in float32, by cos and sin as
                    Transformers rounds them to the activations' dtype
        attention   the attention function of a Transformers model's causal attention, in a copy of
                    its config; dropout in training raises, see `integrations.transformers`
        torch_rms_norm   torch.nn.RMSNorm, in Llama's order of roundings: in 16 bits the normalised
                    value is rounded before it is multiplied by the weight, not only after
        linear_cross_entropy   the loss of a Transformers model with an lm_head, from hidden states
                    and lm_head.weight: called with labels, the model makes no logits

    The last two are done only if asked for: torch_rms_norm rounds otherwise than the model, and
    where linear_cross_entropy computes the loss `outputs.logits` is None, which metrics and
    trainers may read. A call without labels gives logits as before.

    A module is replaced if its class's forward, run on a small stand-in, computes what the op does;
    see `stand_ins`. Projections are called, never read, but for the head of that loss. From then on
    a call runs the kernel or raises what the kernel raises: a model may be patched on the CPU and
    moved to a GPU, but does not run before. A layer whose norm has hooks, whose two terms differ in
    dtype as under autocast, or that Transformers is checkpointing, adds and normalises in two
    steps, with the same bits.

    The loss is that of Transformers' ForCausalLMLoss, with ignore_index, num_items_in_batch and
    shift_labels; logits may have Gemma 2's soft cap or a factor that is a power of two. The head
    has to be a torch.nn.Linear of a plain weight without bias, hooks or adapter, the loss function
    Transformers' own. A model that differs raises here, strict or not; one that comes to differ
    raises when called with labels. So does output_router_logits, which adds to the loss. Under
    autocast hidden states and weight are cast as a projection casts them.

    A module with an instance-level `forward` is left alone: whoever set it stands before the class.
    Patch before torch.compile; before or after FSDP2. Patching again adds to what is there.

    What a module is was found out here: another act_fn or a hook on it, set later, is not seen.
    With "attention" a change of the model's config, as resize_token_embeddings makes it, is a
    change of the copy, and `unpatch` takes it back.

    Args:
        ops: some of the names above.
        strict: raise where something asked for cannot be replaced, and leave the model as it is.
    Returns:
        A report, to print, or to undo this call: `with patch(model): …`.
    Raises:
        TypeError: model is not a module.
        ValueError: ops names an op that is not there; with `strict`, something is not replaced;
            without it, "linear_cross_entropy" was asked for and is not replaced. The message is
            the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(ops, Collection) or isinstance(ops, str) or not set(ops) <= set(OPS):
        raise ValueError(f"ops: expected a set of some of {', '.join(OPS)}; got {ops!r}")
    plan = make_plan(model, [op for op in OPS if op in ops])
    report = Report(type(model).__name__, plan)
    # Who asks for a loss without logits may have no memory for logits.
    if any(strict or op == "linear_cross_entropy" for _, op, _ in plan.not_replaced):
        expected = "every op" if strict else "linear_cross_entropy"
        raise ValueError(f"model: expected {expected} to be replaced; got\n{report}")
    for change in plan.changes:
        _set(*change)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every module of the model what it had before `patch`; a model without patches is left.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a `forward` or a config was set after `patch`, over ours; nothing is undone.
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
                "since. Undo that first"
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
    """(key, names) in order, names that differ in a number counted as one."""
    groups: dict[Any, dict[str, int]] = {}
    for key, name in entries:
        pattern = re.sub(r"\d+", "*", name)
        counts = groups.setdefault(key, {})
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        (key, ", ".join(f"{n} ({count})" if "*" in n else n for n, count in counts.items()))
        for key, counts in groups.items()
    ]
