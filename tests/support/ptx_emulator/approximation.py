"""Approximate instructions that err by as much as they may, and eager code that errs as much.

The budget of a result in float32 is made of roundings. ex2.approx, rsqrt.approx and div.full err
by up to four of them (PTX ISA, "Floating Point Instructions"), so that a kernel made of them may
exceed it. Where the emulator lets them err by their bounds, the budget is that of eager code whose
exponentials, square roots and quotients err by the same bounds.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# The largest relative errors, of lg2 that of results that are not near 0.
EX2, LG2, RSQRT, DIV = 2.0**-22, 2.0**-22, 2.0**-22.9, 2.0 * 2.0**-23
_BOUNDS = {
    _aten.exp.default: EX2,
    _aten.log.default: LG2,
    _aten.rsqrt.default: RSQRT,
    _aten.sigmoid.default: EX2 + DIV,
    _aten.silu.default: EX2 + DIV,
}


def erring(value: np.ndarray, bound: float, seed: int) -> np.ndarray:
    """float32 numbers that err by `bound` of their size, up or down, or not at all: always the same
    way for one number, as lanes that compute the same thing must agree."""
    mixed = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64) + np.uint64(seed)
    mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    sign = (mixed % np.uint64(3)).astype(np.int64) - 1
    return (value * (1.0 + sign * bound)).astype(np.float32)


class Approximate(TorchDispatchMode):
    """A context in which eager operations in float32 err as the instructions of a kernel may."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if func in _BOUNDS and isinstance(result, Tensor) and result.dtype == torch.float32:
            noisy = erring(result.detach().numpy(), _BOUNDS[func], self.seed)
            result = result.copy_(torch.from_numpy(noisy))
        return result
