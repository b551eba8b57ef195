"""Argument checks, whose errors name the argument. They read metadata only, never values."""

import operator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from gqa_kernels.runtime import arguments, target
from gqa_kernels.runtime.arguments import INTS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = (torch.float8_e4m3fn, torch.int8)
_FLOAT32 = torch.finfo(torch.float32)


def tensor(
    name: str,
    value: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    shape: tuple[int | str | None, ...] | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Checks one tensor argument of a kernel.

    Args:
        dtypes, shape: as in `arguments.tensor`.
        like: name and value of another argument, which must be on the same device.
    Raises:
        TypeError, ValueError: as `arguments.tensor`; another device than that of `like`.
        NotImplementedError: a lazily negated view, a tensor with a forward-mode tangent, or one
            inside a transform of torch.func.
        RuntimeError: a device that kernels do not run on.
    """
    arguments.tensor(name, value, dtypes=dtypes, shape=shape)
    if value.is_neg():
        raise NotImplementedError(
            f"{name}: expected a tensor without the negative bit; got a lazily negated view"
        )
    if is_functorch_wrapped_tensor(value):
        raise NotImplementedError(
            f"{name}: expected a tensor outside torch.func's transforms (vmap, grad, …); "
            "got one inside. Use a batch dimension or torch.autograd.grad instead"
        )
    # The level is checked first, because unpacking costs as much as all other checks.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{name}: expected no forward-mode tangent; got one")
    if like is None:
        target.check_device(name, value)
    elif value.device != like[1].device:
        raise ValueError(
            f"{name}: expected {like[0]}'s device {like[1].device}; got {value.device}"
        )


def key_limits(
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    sizes: tuple[int, int, int],
    *,
    like: tuple[str, Tensor],
) -> None:
    """Checks key_ranges and key_mask; `sizes` is (batch, number of queries, number of keys)."""
    batch, num_queries, num_keys = sizes
    if key_ranges is not None:
        shape = (batch, num_queries, 2)
        tensor("key_ranges", key_ranges, dtypes=INTS, shape=shape, like=like)
    if key_mask is not None:
        dtypes = (torch.bool, torch.uint8, *INTS)
        tensor("key_mask", key_mask, dtypes=dtypes, shape=(batch, num_keys), like=like)


def head_terms(
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    num_sequences: int,
    num_q_heads: int,
    *,
    like: tuple[str, Tensor],
) -> None:
    """Sinks `[num_q_heads]` and slopes `[num_q_heads]` or `[num_sequences, num_q_heads]`."""
    if sinks is not None:
        tensor("sinks", sinks, shape=(num_q_heads,), like=like)
    if alibi_slopes is not None:
        floats = (torch.float32,)
        tensor("alibi_slopes", alibi_slopes, dtypes=floats, like=like)
        rows = (num_sequences,) if alibi_slopes.dim() == 2 else ()
        tensor("alibi_slopes", alibi_slopes, dtypes=floats, shape=(*rows, num_q_heads))


def kv_caches(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    shape: tuple[int | str, ...],
    like: tuple[str, Tensor],
) -> None:
    """Checks a key/value cache: in the dtype of `like`, or quantised with scales.

    Raises, in addition to `tensor`:
        NotImplementedError: float8_e4m3fn on a GPU whose compiler does not support it.
    """
    name, x = like
    tensor("k_cache", k_cache, dtypes=(x.dtype, *QUANTIZED), shape=shape, like=like)
    arguments.tensor("v_cache", v_cache)
    same_dtype("v_cache", v_cache, "k_cache", k_cache)
    tensor("v_cache", v_cache, dtypes=(k_cache.dtype,), shape=k_cache.shape, like=like)
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            raise ValueError(
                f"{cache_name}: expected contiguous features; got strides {cache.stride()}"
            )
    scales = (("k_scale", k_scale), ("v_scale", v_scale))
    if k_cache.dtype not in QUANTIZED:
        for scale_name, scale in scales:
            if scale is not None:
                raise ValueError(
                    f"{scale_name}: expected None for caches of {name}'s dtype {x.dtype}; "
                    "got a tensor"
                )
        return
    for scale_name, scale in scales:
        if scale is None:
            raise ValueError(
                f"{scale_name}: expected a tensor for caches of {k_cache.dtype}; got None"
            )
        per_token = isinstance(scale, Tensor) and scale.dim() == 3
        shape = tuple(k_cache.shape[:3] if per_token else k_cache.shape[2:3])
        tensor(scale_name, scale, dtypes=(torch.float32,), shape=shape, like=like)
    if k_scale.dim() != v_scale.dim():
        raise ValueError(
            f"v_scale: expected the shape of k_scale, one per head or one per token, "
            f"{list(k_scale.shape)}; got {list(v_scale.shape)}"
        )
    if k_cache.dtype == torch.float8_e4m3fn and not target.has_float8():
        raise NotImplementedError(
            "k_cache: expected int8 or a 16- or 32-bit dtype on "
            f"{target.current().arch}; got torch.float8_e4m3fn, which Triton compiles for sm_89 "
            "and newer"
        )


def separate_entries(name: str, value: Tensor) -> None:
    """Checks that no two entries of a cache that is written to are the same memory."""
    if any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    ):
        raise ValueError(
            f"{name}: expected entries that share no memory; got strides {value.stride()}"
        )


def block_table(value: Tensor, batch: int, page_size: int, *, like: tuple[str, Tensor]) -> None:
    """Checks a block table and `page_size`, the page size of its cache."""
    tensor("block_table", value, dtypes=(torch.int32,), shape=(batch, "max_pages"), like=like)
    if page_size < 1 or page_size & (page_size - 1):
        raise NotImplementedError(
            f"k_cache: expected a page_size that is a power of two; got {page_size}"
        )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}; got {value.dtype}")


def softmax_scale(value: float | None, head_dim: int) -> float:
    """Returns the scale to use. It must be positive, because kernels scale inside the exponent."""
    if value is None:
        return head_dim**-0.5
    scale = number("softmax_scale", value)
    # A scale that is zero or infinite in float32 would turn masked scores into NaN.
    if not _FLOAT32.tiny <= scale <= _FLOAT32.max / 2:
        raise ValueError(f"softmax_scale: expected a positive finite float32; got {value!r}")
    return scale


def softcap(value: float | None, softmax_scale: float) -> None:
    if value is None:
        return
    cap = number("softcap", value)
    if not _FLOAT32.tiny <= cap <= _FLOAT32.max / 2 or softmax_scale / cap > _FLOAT32.max / 2:
        raise ValueError(
            "softcap: expected None or a positive finite float32 that softmax_scale can be divided "
            f"by; got {value!r}"
        )


def window(value: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """Checks and returns the two sides of an attention window."""
    if value is None:
        return None, None
    left, right = _sides("window", value)
    left = None if left is None else whole("window", left)
    right = None if right is None else whole("window", right)
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"window: expected distances of 0 or more, or None; got {value!r}")
    return left, right


def window_size(value: tuple[int, int] | Tensor) -> tuple[int | None, int | None]:
    """Converts flash-attn's window, whose negative sides mean no limit, to that of `window`."""
    left, right = _sides("window_size", value)
    left, right = whole("window_size", left), whole("window_size", right)
    return (None if left < 0 else left), (None if right < 0 else right)


def _sides(name: str, value: Any) -> Any:
    """Returns the value if it is a pair."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not is_pair and getattr(value, "shape", None) != (2,):  # an array's
        raise TypeError(f"{name}: expected (left, right); got {value!r}")
    return value


# The checks of numbers and flags for all functions. They return Python's own types, which schemas,
# compilers and launches need.


def whole(name: str, value: int) -> int:
    """Returns the value as a Python int. Accepts NumPy ints and CPU tensors without dimensions;
    reading a tensor on another device would wait for the device."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor):
        is_whole = value.device.type == "cpu" and value.dim() == 0 and value.dtype != torch.bool
    else:
        is_whole = not isinstance(value, bool)
    try:
        if is_whole:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected a whole number; got {type(value).__name__}")


def number(name: str, value: float) -> float:
    """Returns the value as a Python float. Raises for tensors: reading one would wait for the
    device."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, Tensor | bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a float; got a larger integer") from None


def optional_number(name: str, value: float | None) -> float | None:
    return None if value is None else number(name, value)


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool) and not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected a bool; got {type(value).__name__}")
    return bool(value)


def switch(name: str, value: bool | int) -> bool:
    """Returns a flag of flash-attn's as a bool; accepts 1 and 0."""
    if isinstance(value, int | np.integer) and value in (0, 1):
        return bool(value)
    return flag(name, value)


def attention_heads(num_q_heads: int, num_kv_heads: int, head_dim: int, multiple: int = 8) -> None:
    """Checks head counts, and that head_dim is a multiple of `multiple` up to 256."""
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of k's {num_kv_heads}; "
            f"got {num_q_heads}"
        )
    if head_dim % multiple or not 1 <= head_dim <= 256:
        what = "of 1 up to 256" if multiple == 1 else f"that is a multiple of {multiple} up to 256"
        raise NotImplementedError(f"q: expected a head_dim {what}; got {head_dim}")
