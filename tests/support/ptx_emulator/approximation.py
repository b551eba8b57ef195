"""Approximate instructions with their largest allowed errors, and eager code with equal errors.

The budget of a float32 result consists of roundings. ex2.approx, rsqrt.approx and div.full have
errors of up to four roundings (PTX ISA, "Floating Point Instructions"), so kernels that use them
may exceed the budget. If the emulator adds these errors, the budget is that of eager code whose
exponentials, square roots and quotients have errors within the same bounds.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# The largest relative errors; for lg2, of results that are not near 0.
EX2, LG2, RSQRT, DIV = 2.0**-22, 2.0**-22, 2.0**-22.9, 2.0 * 2.0**-23
_BOUNDS = {
    _aten.exp.default: EX2,
    _aten.log.default: LG2,
    _aten.rsqrt.default: RSQRT,
    _aten.sigmoid.default: EX2 + DIV,
    _aten.silu.default: EX2 + DIV,
}


def erring(value: np.ndarray, bound: float, seed: int) -> np.ndarray:
    """Adds a relative error of ±`bound` or 0 to float32 numbers. The error is a function of the
    number, since lanes that compute the same number must agree."""
    mixed = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64) + np.uint64(seed)
    mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    sign = (mixed % np.uint64(3)).astype(np.int64) - 1
    return (value * (1.0 + sign * bound)).astype(np.float32)


class Approximate(TorchDispatchMode):
    """A context in which eager float32 operations have the errors that a kernel's instructions may
    have."""

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
