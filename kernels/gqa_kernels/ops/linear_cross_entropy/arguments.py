"""Checks of the arguments of the losses."""

import math
from typing import Any

import torch
from torch import Tensor

from gqa_kernels.losses import REDUCTIONS
from gqa_kernels.runtime import checks
from gqa_kernels.runtime.checks import flag

__all__ = ["check_tensors", "flag", "ignore_index", "num_predictions", "softcap", "temperature"]
__all__ += ["z_loss"]


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> None:
    checks.tensor("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden: expected a last dimension of 1 or more; got {list(hidden.shape)}"
        )
    shape = ("vocab_size", hidden.shape[-1])
    checks.tensor("weight", weight, shape=shape, like=("hidden", hidden))
    checks.same_dtype("weight", weight, "hidden", hidden)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected a vocabulary of 1 or more; got {list(weight.shape)}")
    shape = tuple(hidden.shape[:-1])
    checks.tensor("targets", targets, dtypes=checks.INTS, shape=shape, like=("hidden", hidden))


def ignore_index(value: int | None) -> int | None:
    if value is None:
        return None
    index = checks.whole("ignore_index", value)
    if not -(2**31) <= index < 2**31:
        raise ValueError(f"ignore_index: expected an int32; got {value!r}")
    return index


def num_predictions(reduction: str, value: Tensor | float | None) -> Tensor | float | None:
    """Checks `reduction` and returns the number by which "mean" divides."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_predictions: expected None with {reduction!r}; got a number")
    if not isinstance(value, Tensor):
        return checks.number("num_predictions", value)
    if value.dim():
        raise ValueError(f"num_predictions: expected a scalar; got shape {list(value.shape)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"num_predictions: expected a number; got {value.dtype}")
    return value


def softcap(value: float | None) -> float | None:
    return None if value is None else _positive("softcap", value)


def temperature(value: float) -> float:
    return _positive("temperature", value)


def z_loss(value: float) -> float:
    number = checks.number("z_loss", value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"z_loss: expected a finite number of 0 or more; got {value!r}")
    return number


def _positive(name: str, value: float) -> float:
    """Returns the value if it and its reciprocal are normal float32 numbers."""
    number = checks.number(name, value)
    if not 1e-37 <= number <= 1e37:
        raise ValueError(f"{name}: expected a number from 1e-37 to 1e37; got {value!r}")
    return number
