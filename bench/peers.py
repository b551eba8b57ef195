"""The backends that are timed: ours, eager, and those of PyTorch itself.

Each is selected explicitly: no SDPA call may choose its kernel except the one called "default", and
no compiled call may fall back to eager. `installed_peers` has the backends of other packages.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import installed_peers
import torch
import torch.nn.functional as F
from adapters import STEPS, Adapter, Backend, Lacks, plain_cache
from timing import Call

from gqa_kernels import fused, reference
from gqa_kernels.ops.attention import hopper, specialized
from gqa_kernels.runtime import target
from gqa_kernels.runtime.hopper_configs import (
    HOPPER_BACKWARD,
    HOPPER_FORWARD,
    SPECIALIZED_DKDV,
)

EPS = 1e-5


def of_module(ops: Any) -> dict[str, Adapter]:
    """The ops of a `gqa_kernels` backend; attention without lse, which peers do not compute
    either."""

    def adapter(op: str) -> Adapter:
        def adapt(inputs: dict[str, Any]) -> Call:
            given = {name: x for name, x in inputs.items() if name != "return_lse"}
            return functools.partial(getattr(ops, op), **given)

        return adapt

    return {op: adapter(op) for op in fused.__all__}


# --- torch.compile of the reference ----------------------------------------------------------


def strict_compile(
    function: Callable[..., Any], backend: str = "inductor", *, once: bool = False
) -> Callable[..., Any]:
    """`torch.compile` that raises instead of falling back to eager.

    Args:
        once: whether a forward pass is differentiated at most once, so that the backward pass may
            reuse its buffers.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = False
    torch._functorch.config.donated_buffer = once
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def _compiled_adapters() -> dict[str, Adapter]:
    def adapter(op: str) -> Adapter:
        def adapt(inputs: dict[str, Any]) -> Call:
            compiled = _compiled(getattr(reference, op), once=op in STEPS)
            given = {name: x for name, x in inputs.items() if name != "return_lse"}
            return functools.partial(compiled, **given)

        return adapt

    # The packed reference reads the bounds on the host, which a graph cannot do.
    return {op: adapter(op) for op in fused.__all__ if op != "flash_attention_varlen"}


_cache: dict[Any, Any] = {}


def _once(key: Any, make: Callable[[], Any]) -> Any:
    """Returns one compiled function, or one mask, shared by all copies of a workload's inputs."""
    if key not in _cache:
        _cache[key] = make()
    return _cache[key]


def _compiled(function: Callable[..., Any], *, once: bool = False) -> Callable[..., Any]:
    return _once(function, lambda: strict_compile(function, once=once))


def forget_compiled() -> None:
    """Clears compiled functions between workloads, since every call would check the guards of other
    shapes."""
    _cache.clear()
    torch._dynamo.reset()


# --- torch.nn.functional ---------------------------------------------------------------------


def _torch_rms_norm(inputs: dict[str, Any]) -> Call:
    x, weight = inputs["x"], inputs["weight"]
    return lambda: F.rms_norm(x, weight.shape, weight, EPS)


def _torch_add_rms_norm(inputs: dict[str, Any]) -> Call:
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x + residual
        return F.rms_norm(hidden, weight.shape, weight, EPS), hidden

    return call


def _torch_swiglu(inputs: dict[str, Any]) -> Call:
    """SwiGLU as in Hugging Face's Llama: silu is rounded to the dtype before the product."""
    gate, up = inputs["gate"], inputs["up"]
    return lambda: F.silu(gate) * up


def _torch_linear_cross_entropy(inputs: dict[str, Any]) -> Call:
    """PyTorch's loss in chunks, with its default options; gradients in the forward pass."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Lacks("PyTorch before 2.13 has no F.linear_cross_entropy")
    arguments = [inputs[name] for name in ("hidden", "weight", "targets")]
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(
        *arguments, reduction=inputs["reduction"], options=options
    )


def _torch_adamw_update(inputs: dict[str, Any]) -> Call:
    """PyTorch's fused step. It only takes gradients in the dtype of the weights and writes no copy,
    so both casts are separate passes."""
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    recipe = {name: inputs[name] for name in names} | {"amsgrad": False, "maximize": False}
    step = torch.tensor(float(inputs["step"]), device=inputs["weight"].device)
    state = [[inputs[name]] for name in ("exp_avg", "exp_avg_sq")]

    def call() -> None:
        gradient = inputs["gradient"].float()
        scale = {"grad_scale": inputs["grad_scale"]}
        torch._fused_adamw_([inputs["weight"]], [gradient], *state, [], [step], **recipe, **scale)
        inputs["copy"].copy_(inputs["weight"])

    return call


# --- SDPA ------------------------------------------------------------------------------------

_SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", None)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[batch, heads, seq_len, head_dim] views, SDPA's layout."""
    return [x.transpose(1, 2) for x in tensors]


def _sdpa(kernel: str | None, q: Any, k: Any, v: Any, *, causal: bool) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = q.shape[2] != k.shape[2]
    if kernel == "EFFICIENT_ATTENTION" and grouped:
        raise Lacks("memory-efficient SDPA takes no grouped heads")
    if causal and q.shape[1] != k.shape[1]:
        raise Lacks("SDPA aligns a causal mask at the top left")

    def call() -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            *_heads_first(q, k, v), is_causal=causal, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    if kernel is None:
        return call

    def forced() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return call()

    return forced


def _sdpa_adapters(kernel: str | None) -> dict[str, Adapter]:
    def prefill(inputs: dict[str, Any]) -> Call:
        return _sdpa(kernel, inputs["q"], inputs["k"], inputs["v"], causal=inputs["causal"])

    def decode(inputs: dict[str, Any]) -> Call:
        plain_cache(inputs)
        if not _caches_are_full(inputs):
            raise Lacks("SDPA takes no lengths per sequence without a mask")
        return _sdpa(kernel, inputs["q"], inputs["k_cache"], inputs["v_cache"], causal=False)

    return {"flash_attention": prefill, "decode_attention": decode}


def _caches_are_full(inputs: dict[str, Any]) -> bool:
    return bool((inputs["seq_lens"] == inputs["k_cache"].shape[1]).all())


# --- FlexAttention ---------------------------------------------------------------------------


def _flex(q: Any, k: Any, v: Any, mask: Any, batch: int | None) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if mask is not None:
        block_mask = _once(
            "block mask",
            lambda: create_block_mask(mask, batch, None, q.shape[1], k.shape[1], device=q.device),
        )
    grouped = q.shape[2] != k.shape[2]
    compiled = _compiled(flex_attention)

    def call() -> torch.Tensor:
        out = compiled(*_heads_first(q, k, v), block_mask=block_mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return call


def _flex_prefill(inputs: dict[str, Any]) -> Call:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    diagonal = k.shape[1] - q.shape[1]

    def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
        return key <= query + diagonal

    return _flex(q, k, v, causal if inputs["causal"] else None, None)


def _flex_decode(inputs: dict[str, Any]) -> Call:
    plain_cache(inputs)
    q, seq_lens = inputs["q"], inputs["seq_lens"]

    def within(b: Any, h: Any, query: Any, key: Any) -> Any:
        return key < seq_lens[b]

    mask = None if _caches_are_full(inputs) else within
    return _flex(q, inputs["k_cache"], inputs["v_cache"], mask, q.shape[0])


# --- Our kernels that nothing runs by default -------------------------------------------------


def _hopper_target() -> None:
    if (arch := target.current().arch) != "sm_90":
        raise RuntimeError(f"expected sm_90; got {arch}")
    for name in ("forward", "dkdv", "dq"):  # so that `launches` sees their kernels
        importlib.import_module(f"{hopper.__name__}.{name}")


def _hopper_attention(inputs: dict[str, Any]) -> Call:
    q = inputs["q"]
    given = {name: x for name, x in inputs.items() if name != "return_lse" and x is not None}
    table = HOPPER_BACKWARD if q.requires_grad else HOPPER_FORWARD
    covered = q.element_size() == 2 and q.shape[-1] in {row.head_dim for row in table}
    if not covered or given.keys() - {"q", "k", "v", "causal", "softmax_scale"}:
        raise Lacks(
            "the kernels for Hopper are timed without other options than causal, with 16-bit heads "
            "of 64, 128 and, without a gradient, 80, 96 and 256"
        )
    return functools.partial(hopper.flash_attention, **given)


def _specialized_attention(inputs: dict[str, Any]) -> Call:
    q = inputs["q"]
    given = {name: x for name, x in inputs.items() if name != "return_lse" and x is not None}
    covered = q.element_size() == 2 and q.shape[-1] in {row.head_dim for row in SPECIALIZED_DKDV}
    if not covered or given.keys() - {"q", "k", "v", "causal", "softmax_scale"}:
        raise Lacks("the specialised kernel of dk and dv has 16-bit heads of 64 and 128")
    if not q.requires_grad:
        raise Lacks("without a gradient it is the backend triton")
    return functools.partial(specialized.flash_attention, **given)


# --- The table -------------------------------------------------------------------------------

_DECODE_FORWARD = dict.fromkeys(
    ("decode_attention", "prefill_attention", "rope_append_kv"), "a cache has no gradient"
)
_DECODE_FORWARD["sample_tokens"] = "a token has no gradient"

BACKENDS = (
    Backend(
        "triton",
        of_module(fused),
        distribution="gqa-kernels",
        forward_only=_DECODE_FORWARD,
        ours=True,
    ),
    Backend(
        "hopper",
        {"flash_attention": _hopper_attention},
        _hopper_target,
        distribution="gqa-kernels",
        on_request=True,
    ),
    Backend(
        "specialized",
        {"flash_attention": _specialized_attention},
        _hopper_target,
        distribution="gqa-kernels",
        on_request=True,
    ),
    Backend("eager", of_module(reference), forward_only=_DECODE_FORWARD, ours=True),
    Backend(
        "torch",
        {
            "rms_norm": _torch_rms_norm,
            "add_rms_norm": _torch_add_rms_norm,
            "swiglu": _torch_swiglu,
            "linear_cross_entropy": _torch_linear_cross_entropy,
            "adamw_update": _torch_adamw_update,
        },
        coarse={
            "linear_cross_entropy": "rounds loss and dweight to bfloat16 with every chunk of tokens"
        },
    ),
    Backend("compile", _compiled_adapters(), forward_only=_DECODE_FORWARD),
    *(
        Backend(
            "sdpa_" + ("default" if kernel is None else kernel.split("_")[0].lower()),
            _sdpa_adapters(kernel),
            forward_only=_DECODE_FORWARD,
        )
        for kernel in _SDPA
    ),
    Backend(
        "flex",
        {"flash_attention": _flex_prefill, "decode_attention": _flex_decode},
        forward_only=_DECODE_FORWARD,
    ),
    *installed_peers.BACKENDS,
)

ON_REQUEST = {backend.name for backend in BACKENDS if backend.on_request}
BY_NAME = {backend.name: backend for backend in BACKENDS}


def for_op(op: str) -> list[str]:
    """The backends that have the op, ours first."""
    return [backend.name for backend in BACKENDS if op in backend.adapters]
