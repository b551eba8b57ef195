"""Checks what a module computes by running its class's forward on a small stand-in.

Names are not enough: two classes called RMSNorm may round in different orders. So a check builds a
bare instance of the module's class with the module's settings and tiny weights on the CPU, runs the
class's forward and ours with the ops of plain PyTorch on the same random numbers, and compares. The
module itself and the global random state are not touched.

Each check returns what to bind, (function, *arguments after the module), or raises Unlike with the
reason.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels.backends import get_backend
from gqa_kernels.patching import forwards
from gqa_kernels.runtime import checks

EAGER = get_backend("eager")
Binding = tuple[Any, ...]

WIDTH = 8  # of a stand-in's hidden states
_RECORDER = "gqa_kernels_recorder"
_recorder_lock = threading.Lock()  # all threads share the recorder's name


class Unlike(Exception):
    """The module does not compute what our op does, or cannot be run."""


def norm(module: nn.Module) -> Binding:
    """Checks for an RMSNorm in one of three orders of rounding."""
    _check_arguments(module, 1)
    eager, triton = EAGER.rms_norm, get_backend("triton").rms_norm
    with bench() as generator:
        x = draw(64, 33, generator=generator)
        weight = torch.rand(33, generator=generator, dtype=torch.float32, device="cpu") + 0.5
        # A large eps shows whether it is used.
        twin = stand_in(module)
        setattr(twin, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", 0.5)
        for ours in (forwards.rounded_norm, forwards.wide_norm, forwards.wide_offset_norm):
            if all(_same_norm(twin, ours, eager, x, weight, dtype) for dtype in _NORM_DTYPES):
                return ours, triton
    raise Unlike("its maths is not that of a known RMSNorm")


def torch_norm(module: nn.RMSNorm) -> Binding:
    """Checks for a torch.nn.RMSNorm that can be replaced, with Llama's order of roundings."""
    if module.weight is None or module.weight.dim() != 1:
        raise Unlike("it has no weight of one dimension")
    if module.eps is None:
        raise Unlike("its eps is None, a number that depends on the input's dtype")
    return forwards.rounded_norm, get_backend("triton").rms_norm


def _check_arguments(module: nn.Module, expected: int) -> None:
    count = len(inspect.signature(type(module).forward).parameters) - 1
    if count != expected:
        raise Unlike(f"its forward takes {count} arguments, not {expected}")


# Dtypes of input and weight: 16 bits distinguish the orders of rounding.
_NORM_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
)


def _same_norm(
    twin: nn.Module,
    ours: Callable[..., Tensor],
    rms_norm: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> bool:
    x, weight = x.to(dtypes[0]), weight.to(dtypes[1])
    twin.__dict__["weight"] = weight
    theirs, ours = type(twin).forward(twin, x), ours(twin, rms_norm, x)
    if dtypes[0] is torch.float32:
        return same(ours, theirs)
    # An equivalent formula differs by float32 roundings, which very rarely change 16-bit results.
    return theirs.dtype == ours.dtype and torch.equal(theirs, ours)


def mlp(module: nn.Module) -> Binding:
    """Checks for down(silu(gate) · up), with gate and up as two projections or halves of one."""
    _check_arguments(module, 1)
    for name in ("act_fn", "activation_fn"):
        if not has(module, name):
            continue
        if forwards.has_hooks(getattr(module, name)):
            raise Unlike(f"its {name} has a hook, which the kernel would not call")
        if next(getattr(module, name).parameters(), None) is not None:
            raise Unlike(f"its {name} has a parameter, which would get no gradient")
    with bench() as generator:
        twin = stand_in(module)
        names = [name for name in ("gate_proj", "up_proj", "gate_up_proj") if has(module, name)]
        for name in names:
            rows = 10 if name == "gate_up_proj" else 5
            twin.__dict__[name] = Linear(rows, WIDTH, generator)
        twin.__dict__["down_proj"] = Linear(WIDTH, 5, generator)
        ours = forwards.packed_mlp if "gate_up_proj" in names else forwards.gated_mlp
        x = 10.0 * draw(2, 16, WIDTH, generator=generator)  # large: shows any clamp
        if not same(ours(twin, EAGER.swiglu, x), type(twin).forward(twin, x)):
            raise Unlike("its maths is not SwiGLU's: down(silu(gate) · up)")
    return ours, get_backend("triton").swiglu


def attention(module: nn.Module) -> Binding:
    """Checks for attention of Transformers that rotates all features, i with i + head_dim / 2."""
    check_rotary_fraction(module.config)
    forward = inspect.unwrap(type(module).forward)
    home = forward.__module__
    names = inspect.signature(forward).parameters
    style = "position" if "cache_position" in names else "plain"
    if cache_name(module) == "cache":
        style = "kwargs"
    with bench() as generator, _recording(sys.modules[home].ALL_ATTENTION_FUNCTIONS):
        twin = _attention_twin(module, generator)
        theirs = [_run_attention(twin, partial(type(twin).forward, twin), b) for b in (1, 2)]
        passed = theirs[0]["attention"][-1].keys() - {"dropout", "scaling", "position_ids"}
        if not passed <= forwards.SETTINGS.keys():
            raise Unlike(f"it passes {', '.join(sorted(passed))} to the attention function")
        settings = (home, tuple(sorted(passed)), style)
        bound = partial(forwards.attention, twin, EAGER.apply_rope, *settings)
        if not same([_run_attention(twin, bound, b) for b in (1, 2)], theirs):
            raise Unlike("its steps are not projection, rotation by halves, cache and attention")
    return forwards.attention, get_backend("triton").apply_rope, *settings


def uses_attention_functions(module: nn.Module) -> bool:
    """Whether the module's config chooses its attention function, as in Transformers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ()) and hasattr(
        getattr(module, "config", None), "_attn_implementation"
    )


def attention_reason(module: nn.Module) -> str:
    """Why the kernel cannot compute the attention of a module; empty if it can."""
    if not getattr(module, "is_causal", False):
        return "it is not causal"
    config = module.config
    try:
        num_q = config.num_attention_heads
        num_kv = getattr(config, "num_key_value_heads", None) or num_q
        checks.attention_heads(num_q, num_kv, module.head_dim)
    except (AttributeError, NotImplementedError, ValueError) as error:
        return str(error)
    return ""


def check_rotary_fraction(config: Any) -> None:
    """Raises Unlike if only a part of the features is rotated."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    fractions = [p.get("partial_rotary_factor") for p in (parameters, *by_layer_type)]
    fractions.append(getattr(config, "partial_rotary_factor", None))
    for fraction in fractions:
        if fraction is not None and fraction != 1.0:
            raise Unlike(f"it rotates only some features: partial_rotary_factor {fraction}")


def decoder_layer(module: nn.Module) -> Binding:
    """Checks for a pre-norm layer whose own forward, in two steps with patched norms, gives the
    same bits."""
    if not has(module.mlp, "down_proj"):  # a mixture of experts may return more than a tensor
        raise Unlike("its mlp is of another kind")
    with bench() as generator:
        twin = stand_in(module)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = Linear(WIDTH, 1, generator)
            norm.weight, norm.eps = norm.weight.flatten(), 0.5
            norm.forward = partial(forwards.rounded_norm, norm, EAGER.rms_norm)
            twin.__dict__[name] = norm
        calls = []
        project = Linear(WIDTH, WIDTH, generator)

        def self_attn(*args: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            calls.append((args, kwargs))
            return project(hidden_states), None

        twin.__dict__.update(self_attn=self_attn, mlp=Linear(WIDTH, WIDTH, generator))
        x = draw(2, 3, WIDTH, generator=generator)
        given = dict.fromkeys(("attention_mask", "position_ids", cache_name(twin)), x)
        given |= {"position_embeddings": (x, x), "use_cache": True, "cache_position": x}
        theirs = type(twin).forward(twin, x, **given)
        ours = forwards.decoder_layer(twin, EAGER.add_rms_norm, None, x, **given)
        if not same([ours, calls[1]], [theirs, calls[0]]):
            raise Unlike("its steps are not norm, attention, add, norm, mlp, add")
    return forwards.decoder_layer, get_backend("triton").add_rms_norm


def draw(*shape: int, generator: torch.Generator) -> Tensor:
    """Draws in float32 regardless of the default dtype: in 16 bits different maths may look
    equal."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def stand_in(module: nn.Module) -> nn.Module:
    """Returns a bare instance of the module's class with its settings, without parameters or
    children."""
    twin = object.__new__(type(module))
    nn.Module.__init__(twin)
    settings = {name: value for name, value in vars(module).items() if name not in vars(twin)}
    vars(twin).update(settings)
    # The activation function is kept, because the check has to find out what it computes.
    for name in ("act_fn", "activation_fn"):
        if has(module, name):
            vars(twin)[name] = getattr(module, name)
    return twin


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results have the same structure and are equal up to some roundings."""
    if isinstance(theirs, Tensor):
        if not isinstance(ours, Tensor) or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return False
        if not theirs.is_floating_point():
            return torch.equal(ours, theirs)
        bound = 64 * torch.finfo(theirs.dtype).eps * theirs.abs().max()
        return bool(((ours - theirs).abs() <= bound).all())
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours is theirs or ours == theirs


class Linear(nn.Module):
    """A projection that, unlike nn.Linear, does not use the global random state."""

    def __init__(self, rows: int, columns: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = draw(rows, columns, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class _Cache:
    def __init__(self) -> None:
        self.calls = []

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((k, v, args, kwargs))
        return 2 * k, 3 * v


class _Config:
    """The module's config with the recorder as its attention function."""

    _attn_implementation = _RECORDER

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    module.recorded = (q, k, v, mask, kwargs)
    return q.transpose(1, 2), None


@contextmanager
def _recording(functions: Any) -> Iterator[None]:
    with _recorder_lock:
        functions[_RECORDER] = _record
        try:
            yield
        finally:
            del functions[_RECORDER]


def _attention_twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    twin = stand_in(module)
    config, head_dim = module.config, module.head_dim
    num_q, num_kv = config.num_attention_heads, config.num_key_value_heads
    rows = {"q_proj": num_q, "k_proj": num_kv, "v_proj": num_kv, "qkv_proj": num_q + 2 * num_kv}
    for name, heads in rows.items():
        if has(module, name):
            vars(twin)[name] = Linear(heads * head_dim, WIDTH, generator)
    for name in ("q_norm", "k_norm"):
        if has(module, name):
            vars(twin)[name] = Linear(head_dim, head_dim, generator)
    vars(twin)["o_proj"] = Linear(WIDTH, num_q * head_dim, generator)
    vars(twin)["config"] = _Config(config)
    # Training mode with dropout shows whether the forward passes it on.
    vars(twin).update(training=True, attention_dropout=0.25)
    return twin


def _run_attention(twin: nn.Module, forward: Callable[..., Any], batch: int) -> dict[str, Any]:
    """Returns all that an attention forward returns and passes on, with `batch` rows of angles."""
    generator = torch.Generator().manual_seed(1)
    cache, mask = _Cache(), torch.zeros(2, 1, 3, 3, dtype=torch.float32, device="cpu")
    positions = torch.arange(3, device="cpu")
    angles = draw(batch, 3, twin.head_dim // 2, generator=generator).repeat(1, 1, 2)
    returned = forward(
        hidden_states=draw(2, 3, WIDTH, generator=generator),
        position_embeddings=(angles.cos(), angles.sin()),
        attention_mask=mask,
        **{cache_name(twin): cache},
        position_ids=positions[None],
        **({"cache_position": positions} if _takes(twin, "cache_position") else {}),
    )
    return {"returned": returned, "attention": twin.recorded, "cache": cache.calls}


def cache_name(module: nn.Module) -> str:
    """The name of a layer's or attention's cache argument; it changed in Transformers 5.24."""
    return "cache" if _takes(module, "cache") else "past_key_values"


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(inspect.unwrap(type(module).forward)).parameters


def has(module: nn.Module, *names: str) -> bool:
    """Whether the module has direct children with these names."""
    return all(module._modules.get(name) is not None for name in names)


@contextmanager
def bench() -> Iterator[torch.Generator]:
    """A context for running stand-ins: on the CPU, without gradients or autocast, with a separate
    random generator."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield torch.Generator().manual_seed(0)
