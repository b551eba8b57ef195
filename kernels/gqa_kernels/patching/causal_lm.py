"""The loss of a Transformers model from its last hidden states, without the logits.

`check` finds out how a class's forward computes its loss from the base model, or raises Unlike;
`forward` does the same with `linear_cross_entropy`. It checks the head and the loss function, which
may change after `patch`, at every call with labels.
"""

import inspect
import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gqa_kernels.backends import get_backend
from gqa_kernels.patching import stand_ins
from gqa_kernels.patching.forwards import has_hooks
from gqa_kernels.patching.stand_ins import Unlike

# Arguments that a model does not pass to its base model; it may pass on some of the others.
_OWN = ("labels", "logits_to_keep")
_VOCABULARY = 11  # of a stand-in


class Path(NamedTuple):
    """How a model gets from its arguments to its loss."""

    base: str  # the name of the base model
    defaults: dict[str, Any]  # of all named arguments, in order
    from_config: tuple[str, ...]  # arguments whose default is in the config
    softcap: float | None
    scale: float  # by which the logits are multiplied
    output_class: type
    passed_on: tuple[str, ...]  # outputs of the base model that the model returns too
    loss_function: Any


def holds(module: nn.Module) -> bool:
    """Whether a module looks like a Transformers model with a head over the vocabulary."""
    return stand_ins.has(module, "lm_head") and hasattr(type(module), "loss_function")


def bind(function: Any, module: nn.Module, *bound: Any) -> partial:
    """Binds a function and gives it the signature of the class's forward, from which Transformers
    reads which arguments a model takes."""
    bound_forward = partial(function, module, *bound)
    signature = inspect.signature(type(module).forward)
    _, *parameters = (p.replace(annotation=p.empty) for p in signature.parameters.values())
    bound_forward.__signature__ = inspect.Signature(parameters)
    return bound_forward


def forward(self, linear_cross_entropy, path: Path, *args: Any, **kwargs: Any) -> Any:
    """With labels: the loss, with None in place of the logits. Without: the class's forward.

    Raises:
        NotImplementedError: the head, the loss function or output_router_logits is not what `check`
            saw. Otherwise as the op.
        TypeError: an argument by position and by name, or an ignore_index that is no int.
    """
    given = _by_name(path, args, kwargs)
    labels = given.pop("labels", None)
    if labels is None:
        return type(self).forward(self, *args, **kwargs)
    for reason in (_head_refused(self.lm_head), _loss_refused(self, path.loss_function)):
        if reason:
            raise NotImplementedError(reason)
    kept, return_dict = given.pop("logits_to_keep", 0), given.pop("return_dict", None)
    if return_dict is None:
        return_dict = self.config.return_dict
    given = {name: x for name, x in path.defaults.items() if name not in _OWN} | given
    for name in path.from_config:
        if given[name] is None:
            given[name] = getattr(self.config, name)
    if given.get("output_router_logits"):
        raise NotImplementedError(
            "output_router_logits: expected False, no auxiliary loss of experts; got True"
        )
    outputs = getattr(self, path.base)(**given)
    hidden = outputs.last_hidden_state
    hidden = hidden[:, slice(-kept, None) if isinstance(kept, int) else kept]
    loss = _loss(linear_cross_entropy, hidden, self.lm_head.weight, labels, path, given)
    passed_on = {name: getattr(outputs, name) for name in path.passed_on}
    result = path.output_class(loss=loss, **passed_on)
    return result if return_dict else result.to_tuple()


def _by_name(path: Path, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(path.defaults):
        raise TypeError(f"args: expected at most {len(path.defaults)}; got {len(args)}")
    given = dict(zip(path.defaults, args, strict=False))
    for name in given:
        if name in kwargs:
            raise TypeError(f"{name}: expected one; got one by position and one by name")
    return given | kwargs


def _loss(
    linear_cross_entropy: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    path: Path,
    options: dict[str, Any],
) -> Tensor:
    """Computes ForCausalLMLoss, with its options; like ForCausalLMLoss, it ignores other
    options."""
    ignore_index = options.get("ignore_index", -100)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int; got {ignore_index!r}")
    targets = options.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if targets.numel() * hidden.shape[-1] != hidden.numel():
        raise ValueError(
            f"labels: expected one for each of {list(hidden.shape[:-1])} hidden states that "
            f"logits_to_keep leaves; got {list(targets.shape)}"
        )
    if path.scale != 1.0:
        hidden = hidden * path.scale
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # casts like the inputs of a projection
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    count = options.get("num_items_in_batch")
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1).to(hidden.device),
        ignore_index=ignore_index,
        reduction="mean" if count is None else "sum",
        softcap=path.softcap,
    )
    if count is None:
        return loss
    # Not the op's num_predictions: Transformers takes a number in any shape.
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _head_refused(head: nn.Module, *, between_calls: bool = False) -> str:
    """Why a head computes more than a product with its weight; empty if it does not.

    Args:
        between_calls: a sharded weight is no reason, because FSDP gathers it during a call.
    """
    expected = "lm_head: expected a torch.nn.Linear"
    if type(head) is not nn.Linear:
        return f"{expected}, not another class; got {type(head).__module__}.{type(head).__name__}"
    if head.bias is not None:
        return f"{expected} without a bias; got one with a bias"
    if "forward" in vars(head) or has_hooks(head):
        return f"{expected} without hooks, which would not be called; got one with hooks"
    is_shard = hasattr(head.weight, "placements")
    if is_traceable_wrapper_subclass(head.weight) and not (is_shard and between_calls):
        return f"{expected} with a plain weight; got a {type(head.weight).__name__}"
    return ""


def _loss_refused(module: nn.Module, expected: Any) -> str:
    function = module.loss_function
    if function is expected:
        return ""
    name = getattr(function, "__qualname__", None) or repr(function)
    return f"loss_function: expected Transformers' {expected.__name__}; got {name}"


# --- The check ----------------------------------------------------------------------------------


class _Config:
    """The model's config with a small vocabulary and without an auxiliary loss."""

    vocab_size = _VOCABULARY
    return_dict = True
    output_router_logits = False

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Base:
    """Stands in for the base model and records the arguments of its calls."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs
        self.calls = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.outputs

    def of(self, function: Any, calls: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        """Returns the results of a function in these calls, and what it passed to the base
        model."""
        self.calls = []
        return [function(**call) for call in calls], self.calls


def check(module: nn.Module) -> stand_ins.Binding:
    """Checks that a model's logits are those of its head, possibly capped or multiplied, and that
    its loss is ForCausalLMLoss of them."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import MoeModelOutputWithPast

    reason = _head_refused(module.lm_head, between_calls=True)
    reason = reason or _loss_refused(module, ForCausalLMLoss)
    if reason:
        raise Unlike(reason)
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    if "labels" not in named or inspect.Parameter.empty in named.values():
        raise Unlike("its forward does not take labels and other arguments that have a default")
    with stand_ins.bench() as generator:
        twin = stand_ins.stand_in(module)
        hidden = 8.0 * stand_ins.draw(2, 5, stand_ins.WIDTH, generator=generator)
        cache, *others = stand_ins.draw(4, 1, generator=generator)
        base = _Base(MoeModelOutputWithPast(hidden, cache, *((x,) for x in others)))
        head = nn.Linear(stand_ins.WIDTH, _VOCABULARY, bias=False, device="meta")
        weight = stand_ins.draw(_VOCABULARY, stand_ins.WIDTH, generator=generator)
        head.weight = nn.Parameter(weight)
        vars(twin).update(config=_Config(module.config), vocab_size=_VOCABULARY, lm_head=head)
        vars(twin)[module.base_model_prefix] = base

        calls = _calls(named)
        logits = type(twin).forward(twin, input_ids=calls[0]["input_ids"]).logits
        softcap, scale = _of_logits(logits, hidden @ weight.T, module.config)
        theirs, passed = base.of(partial(type(twin).forward, twin), calls)
        path = Path(
            base=module.base_model_prefix,
            defaults=named,
            from_config=tuple(
                name
                for name, default in named.items()
                if default is None and name not in calls[0] and passed[0][1].get(name) is not None
            ),
            softcap=softcap,
            scale=scale,
            output_class=type(theirs[0]),
            passed_on=tuple(name for name in theirs[0] if name not in ("loss", "logits")),
            loss_function=ForCausalLMLoss,
        )
        eager = stand_ins.EAGER.linear_cross_entropy
        ours = base.of(partial(forward, twin, eager, path), calls)
        kept = [{name: x for name, x in out.items() if name != "logits"} for out in theirs]
        if not stand_ins.same(ours, (kept, passed)):
            raise Unlike("its steps are not base model, head and loss function")
    return forward, get_backend("triton").linear_cross_entropy, path


def _calls(named: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of calls with labels that together show all that a forward does."""
    tokens = torch.arange(10, device="cpu").view(2, 5)
    labels = tokens.masked_fill(tokens == 3, -100)
    every = {name: tokens + place for place, name in enumerate(named)}
    every |= dict.fromkeys(every.keys() & {"output_router_logits"}, False)
    every |= dict.fromkeys(every.keys() & {"use_cache"}, True)
    every |= {"input_ids": tokens, "labels": tokens, "logits_to_keep": 0}
    every |= {"ignore_index": 1, "num_items_in_batch": tokens[0, 3], "unknown": -tokens}
    shifted = {"input_ids": tokens, "labels": labels, "shift_labels": labels.flip(1)}
    calls = [{"input_ids": tokens, "labels": labels}, every, shifted | {"num_items_in_batch": 7}]
    for kept in (2, tokens[0, ::3]) if "logits_to_keep" in named else ():
        calls.append(
            shifted | {"shift_labels": labels[:, 1:3].contiguous(), "logits_to_keep": kept}
        )
    return calls


def _of_logits(logits: Tensor, scores: Tensor, config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) by which logits differ from the output of the head."""
    if stand_ins.same(logits, scores):
        return None, 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None and stand_ins.same(logits, cap * torch.tanh(scores / cap)):
        return cap, 1.0
    largest = scores.abs().argmax()
    scale = (logits.flatten()[largest] / scores.flatten()[largest]).item()
    if not stand_ins.same(logits, scores * scale):
        raise Unlike("its logits are not what its head gives, or that with a soft cap")
    if abs(math.frexp(scale)[0]) != 0.5:  # scaling the hidden states would round them again
        raise Unlike(f"logits: expected them multiplied by a power of two; got a factor {scale:g}")
    return None, scale
