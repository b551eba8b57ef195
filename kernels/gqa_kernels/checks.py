"""Argument checks that name the argument. They read metadata only, never values."""

import torch
from torch import Tensor

from gqa_kernels import target

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)


def tensor(
    name: str,
    value: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    shape: tuple[int | str | None, ...] | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Checks one tensor argument.

    Args:
        shape: expected sizes; a string or None stands for any size and is shown in messages.
        like: another argument and its name, whose device this one shares.
    Raises:
        TypeError: not a tensor, or of a dtype outside `dtypes`.
        ValueError: another shape, or another device than `like`.
        RuntimeError: a device that kernels do not run on.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}; got {value.dtype}")
    if shape is not None and not _matches(value.shape, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}]; got {list(value.shape)}")
    if like is None:
        target.check_device(name, value)
    elif value.device != like[1].device:
        raise ValueError(
            f"{name}: expected {like[0]}'s device {like[1].device}; got {value.device}"
        )


def _matches(actual: torch.Size, expected: tuple[int | str | None, ...]) -> bool:
    return len(actual) == len(expected) and all(
        not isinstance(want, int) or got == want for got, want in zip(actual, expected, strict=True)
    )


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}; got {value.dtype}")


def softmax_scale(value: float | None, head_dim: int) -> float:
    """The scale to use. The kernels scale inside the exponent, which needs a positive one."""
    if value is None:
        return head_dim**-0.5
    if not 0.0 < value < float("inf"):
        raise ValueError(f"softmax_scale: expected a positive finite float; got {value!r}")
    return float(value)


def attention_heads(num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of k's {num_kv_heads}; "
            f"got {num_q_heads}"
        )
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise NotImplementedError(
            f"q: expected a head_dim that is a multiple of 8 up to 256; got {head_dim}"
        )
