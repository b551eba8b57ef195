"""Inputs with the structure of real activations, made from standard normal numbers.

Standard normal inputs hide losses of precision: their mean is 0, none is much larger than the
others, and no two tokens are equal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Normals = Callable[..., Tensor]  # standard normal float32 numbers of a shape
Structure = Callable[[Tensor, Normals], Tensor]


def _normal(x: Tensor, normals: Normals) -> Tensor:
    return x


def _offset(x: Tensor, normals: Normals) -> Tensor:
    """Adds a mean per feature of four standard deviations, like a projection's bias (Qwen 2)."""
    return x + 4.0 * normals(x.shape[-1])


def _outliers(x: Tensor, normals: Normals) -> Tensor:
    """Makes one feature in sixteen thirty times larger (Dettmers et al. 2022, arXiv:2208.07339)."""
    features = torch.arange(x.shape[-1], device=x.device)
    return torch.where(features % 16 == 3, 30.0 * x, x)


def _heavy_tails(x: Tensor, normals: Normals) -> Tensor:
    """Student's t with three degrees of freedom."""
    return x / normals(3, *x.shape).square().mean(0).sqrt()


def _token_dim(x: Tensor) -> int:
    """The token dimension of [tokens, features] or [..., tokens, heads, features]."""
    return max(x.dim() - 3, 0)


def _repeated(x: Tensor, normals: Normals) -> Tensor:
    """Repeats one token."""
    dim = _token_dim(x)
    return x.narrow(dim, 0, 1).expand_as(x).contiguous() if x.dim() > 1 and x.numel() else x


def _runs(x: Tensor, normals: Normals) -> Tensor:
    """Repeats every token 16 times in a row."""
    if x.dim() == 1:
        return x
    dim = _token_dim(x)
    return x.index_select(dim, torch.arange(x.shape[dim], device=x.device) // 16 * 16)


def _uniform(x: Tensor, normals: Normals) -> Tensor:
    """Uniform numbers between 0 and 1, as from torch.rand."""
    return 0.5 * (1.0 + torch.erf(x * 0.5**0.5))


STRUCTURES: dict[str, Structure] = {
    "normal": _normal,
    "offset": _offset,
    "outliers": _outliers,
    "heavy tails": _heavy_tails,
    "repeated": _repeated,
    "runs": _runs,
    "uniform": _uniform,
}

# Structures of a sequence of tokens; a weight's rows have none of them.
REPEATING = frozenset({"repeated", "runs"})
