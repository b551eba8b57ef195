"""Argument checks that need neither Triton nor a device: kinds, dtypes, shapes."""

import torch
from torch import Tensor

INTS = (torch.int32, torch.int64)


def tensor(
    name: str,
    value: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    shape: tuple[int | str | None, ...] | None = None,
) -> None:
    """Checks one tensor argument.

    Args:
        dtypes: the accepted dtypes; None accepts any.
        shape: expected sizes; a string or None accepts any size and is shown in messages.
    Raises:
        TypeError: not a strided tensor, or a dtype outside `dtypes`.
        ValueError: another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name}: expected a strided tensor; got {got}")
    if dtypes is not None and value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}; got {value.dtype}")
    if shape is not None and not _matches(value.shape, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}]; got {list(value.shape)}")


def _matches(actual: torch.Size, expected: tuple[int | str | None, ...]) -> bool:
    if actual == expected:  # the most common case
        return True
    if len(actual) != len(expected):
        return False
    # A loop, because a generator would cost half a microsecond per call.
    for got, want in zip(actual, expected, strict=True):
        if want is not None and type(want) is not str and got != want:
            return False
    return True


def size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int; got {value!r}")
