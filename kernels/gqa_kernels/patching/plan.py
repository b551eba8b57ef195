"""Plans which modules of a model `patch` replaces, and by what.

The attributes of a module make it a candidate; `stand_ins` decides. This module changes nothing.
"""

import copy
from collections.abc import Callable, Collection
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from gqa_kernels.patching import batching, causal_lm, forwards, stand_ins
from gqa_kernels.patching.stand_ins import has

BEFORE = "_gqa_kernels_before"  # on a patched module: {attribute: (what was set, *what was there)}
_REGISTRATION = "_gqa_kernels_registration"  # set with a config that names our attention

_ROUNDS_ONCE = (
    "torch.nn.RMSNorm multiplies by its weight before it rounds; "
    'add "torch_rms_norm" to ops to use Llama\'s order'
)


class Replaced(NamedTuple):
    module: str
    op: str


class NotReplaced(NamedTuple):
    module: str
    op: str
    reason: str


class Change(NamedTuple):
    module: nn.Module
    attribute: str
    value: Any


class Plan(NamedTuple):
    replaced: list[Replaced]
    not_replaced: list[NotReplaced]
    not_fused: list[NotReplaced]  # layers that add and normalise in two steps, and why
    changes: list[Change]


def make_plan(model: nn.Module, ops: Collection[str]) -> Plan:
    plan = Plan([], [], [], [])
    check = _Checks()
    for name, module in model.named_modules():
        for kind in _KINDS:
            if kind.op in ops and kind.holds(module):
                _add(plan, kind.op, name, module, partial(check, kind.check), kind.bind)
        if _is_torch_norm(module) and "rms_norm" in ops and "torch_rms_norm" not in ops:
            plan.not_replaced.append(NotReplaced(name, "rms_norm", _ROUNDS_ONCE))
    if "rms_norm" in ops:
        _add_layers(plan, model, check)
    if "attention" in ops:
        _add_attention(plan, model)
    found = {entry.op for entry in (*plan.replaced, *plan.not_replaced)}
    for op in ops:
        if op not in found:
            plan.not_replaced.append(NotReplaced("", op, "the model has no module of its kind"))
    return plan


def _is_norm(module: nn.Module) -> bool:
    # The module's own parameter: a wrapper may expose the weight of the wrapped module.
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
        and getattr(module, "bias", None) is None
        and not type(module).__module__.startswith("torch.nn.")
        and not _has_our_ops(module)
    )


def _is_torch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.RMSNorm) and type(module).forward is nn.RMSNorm.forward


def _is_mlp(module: nn.Module) -> bool:
    gate_and_up = has(module, "gate_proj", "up_proj") or has(module, "gate_up_proj")
    return gate_and_up and has(module, "down_proj") and not _has_our_ops(module)


def _is_attention(module: nn.Module) -> bool:
    qkv = has(module, "q_proj", "k_proj", "v_proj") or has(module, "qkv_proj")
    return qkv and has(module, "o_proj") and not _has_our_ops(module)


def _has_our_ops(module: nn.Module) -> bool:
    """Whether a module was built with a backend of this package, which it keeps."""
    own = vars(module).items()  # including what `patch` sets with a config
    names = [getattr(value, "__module__", None) for key, value in own if key != _REGISTRATION]
    return any(isinstance(name, str) and name.startswith("gqa_kernels.") for name in names)


class _Kind(NamedTuple):
    """A kind of module that an op may replace: the test for candidates, the check, and how a
    forward is bound."""

    op: str
    holds: Callable[[nn.Module], bool]
    check: Callable[[nn.Module], stand_ins.Binding]
    bind: Callable[..., partial] = partial


_KINDS = (
    _Kind("rms_norm", _is_norm, stand_ins.norm),
    _Kind("torch_rms_norm", _is_torch_norm, stand_ins.torch_norm),
    _Kind("swiglu", _is_mlp, stand_ins.mlp),
    _Kind("rope", _is_attention, stand_ins.attention),
    _Kind("linear_cross_entropy", causal_lm.holds, causal_lm.check, causal_lm.bind),
)


class _Checks:
    """Checks of modules; modules of one class with equal settings are checked once."""

    def __init__(self) -> None:
        self._known: dict[Any, stand_ins.Binding | stand_ins.Unlike] = {}
        self._own = vars(nn.Module()).keys()

    def __call__(self, check: Callable[..., Any], module: nn.Module) -> stand_ins.Binding:
        children = [
            (name, type(child), forwards.has_hooks(child), self._of_function(child))
            for name, child in module.named_children()
        ]
        key = (check, type(module), self._settings(module), tuple(children))
        if key not in self._known:
            self._known[key] = self._make(check, module)
        if isinstance(self._known[key], stand_ins.Unlike):
            raise self._known[key]
        return self._known[key]

    def _settings(self, module: nn.Module) -> tuple:
        return tuple(
            (name, value if isinstance(value, str | int | float) else id(value))
            for name, value in vars(module).items()
            if name not in self._own and name not in ("layer_idx", BEFORE, _REGISTRATION)
        )

    def _of_function(self, child: nn.Module) -> tuple:
        """The settings of a child, such as an activation function, and its number of parameters."""
        num_parameters = sum(1 for _ in child.parameters())
        return (num_parameters,) if num_parameters else self._settings(child)

    @staticmethod
    def _make(check: Callable[..., Any], module: nn.Module) -> Any:
        try:
            return check(module)
        except stand_ins.Unlike as reason:
            return reason
        except Exception as error:  # an unknown forward may raise anything on a stand-in
            message = f"its forward cannot be checked: {type(error).__name__}: {error}"
            return stand_ins.Unlike(message)


def _add(
    plan: Plan,
    op: str,
    name: str,
    module: nn.Module,
    check: Callable[[nn.Module], stand_ins.Binding],
    bind: Callable[..., partial] = partial,
) -> None:
    # Accelerate sets a forward that calls the module's own forward, stored under this name.
    attribute = "_old_forward" if "_hf_hook" in vars(module) else "forward"
    if attribute not in vars(module).get(BEFORE, ()):
        try:
            if attribute in vars(module) and not _is_hooked(module):
                raise stand_ins.Unlike("its forward is set on the instance, not by its class")
            function, *bound = check(module)
        except stand_ins.Unlike as reason:
            plan.not_replaced.append(NotReplaced(name, op, str(reason)))
            return
        forward = bind(function, module, *bound)
        plan.changes.append(Change(module, attribute, forward))
    plan.replaced.append(Replaced(name, op))


def _is_hooked(module: nn.Module) -> bool:
    """Whether Accelerate's hook calls the class's own forward."""
    found = vars(module).get("_old_forward")
    return "_hf_hook" in vars(module) and (getattr(found, "__func__", None) is type(module).forward)


def _add_layers(plan: Plan, model: nn.Module, check: _Checks) -> None:
    """Plans layers that add and normalise in one pass; in others only the norm is replaced."""
    bound = {id(change.module): change.value for change in plan.changes}
    following = _following_norms(model)
    for name, layer in model.named_modules():
        if not _is_layer(layer):
            continue
        norm = layer.post_attention_layernorm
        forward = bound.get(id(norm), vars(norm).get("_old_forward", vars(norm).get("forward")))
        if getattr(forward, "func", None) is forwards.rounded_norm:
            fusing = plan._replace(not_replaced=plan.not_fused)
            _add(
                fusing,
                "add_rms_norm",
                name,
                layer,
                partial(check, stand_ins.decoder_layer),
                partial(_bind_layer, following.get(id(layer))),
            )


def _is_layer(module: nn.Module) -> bool:
    return has(module, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def _following_norms(model: nn.Module) -> dict[int, nn.Module]:
    """Maps the id of each layer to the norm that most likely takes its output: the first norm of
    the next layer or, for the last layer, the `norm` attribute of the parent of the list of layers.
    A wrong guess costs one more norm; results do not change."""
    found = {}
    for parent in model.modules():
        for layers in (child for child in parent.children() if isinstance(child, nn.ModuleList)):
            norms = [layer.input_layernorm for layer in layers if _is_layer(layer)]
            if norms and len(norms) == len(layers):
                last = [parent.norm] if has(parent, "norm") else []
                found |= zip(map(id, layers), [*norms[1:], *last], strict=False)
    return found


def _bind_layer(
    following: nn.Module | None, function: Callable[..., Any], layer: nn.Module, op: Any
) -> partial:
    return partial(function, layer, op, following)


def _add_attention(plan: Plan, model: nn.Module) -> None:
    attentions = [
        (name, module)
        for name, module in model.named_modules()
        if stand_ins.uses_attention_functions(module)
    ]
    if not attentions:
        reason = "the model has no attention that uses Transformers' attention functions"
        plan.not_replaced.append(NotReplaced("", "attention", reason))
        return
    from gqa_kernels.integrations import transformers as adapter

    reasons = {name: stand_ins.attention_reason(module) for name, module in attentions}
    # A config chooses the attention function for all modules that share it.
    refused = {id(module.config) for name, module in attentions if reasons[name]}
    for name, module in attentions:
        if id(module.config) in refused:
            reason = reasons[name] or "another attention with the same config cannot be replaced"
            plan.not_replaced.append(NotReplaced(name, "attention", reason))
        else:
            plan.replaced.append(Replaced(name, "attention"))
    adapter.register()
    replaced = [module for _, module in attentions if id(module.config) not in refused]
    chosen = {
        id(module.config): module.config
        for module in replaced
        if module.config._attn_implementation != adapter.ATTENTION_NAME
    }
    # A config may already name our attention: pickles of its model need the registration too.
    for module in (m for m in replaced if id(m.config) not in chosen):
        plan.changes.append(Change(module, _REGISTRATION, adapter.Registration()))
    if chosen:
        plan.changes.extend(_config_changes(model, chosen, adapter))
    own = {id(module.config) for module in replaced}
    for module in model.modules():
        if batching.holds(module) and id(module.config.get_text_config()) in own:
            method = partial(batching.init_continuous_batching, module)
            plan.changes.append(Change(module, "init_continuous_batching", method))


def _config_changes(model: nn.Module, chosen: dict[int, Any], adapter: ModuleType) -> list[Change]:
    """Plans copies of the model's configs, which other models may share, for every module that has
    one. The copies of chosen configs name our attention function; pickles register that name."""
    copies: dict[int, Any] = {}  # including nested configs
    changes = []
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation"):
            changes.append(Change(module, "config", copy.deepcopy(config, copies)))
            changes.append(Change(module, _REGISTRATION, adapter.Registration()))
    for config in chosen.values():
        # Setting the public attribute would change nested configs too.
        copies[id(config)]._attn_implementation_internal = adapter.ATTENTION_NAME
    return changes
