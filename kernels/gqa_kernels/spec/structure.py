"""Numbers as models have them, made of standard normal ones.

Random normal numbers hide what a kernel loses: their sums have no mean, none is much larger than
the others, and no two tokens are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Normals = Callable[..., Tensor]  # standard normal float32 numbers of a shape
Structure = Callable[[Tensor, Normals], Tensor]


def _normal(x: Tensor, normals: Normals) -> Tensor:
    return x


def _offset(x: Tensor, normals: Normals) -> Tensor:
    """A mean per feature, four standard deviations large: the bias of a projection (Qwen 2)."""
    return x + 4.0 * normals(x.shape[-1])


def _outliers(x: Tensor, normals: Normals) -> Tensor:
    """One feature in sixteen is thirty times larger (Dettmers et al. 2022, arXiv:2208.07339)."""
    features = torch.arange(x.shape[-1], device=x.device)
    return torch.where(features % 16 == 3, 30.0 * x, x)


def _heavy_tails(x: Tensor, normals: Normals) -> Tensor:
    """Student's t with three degrees of freedom."""
    return x / normals(3, *x.shape).square().mean(0).sqrt()


def _token_dim(x: Tensor) -> int:
    """Of [tokens, features] or [..., tokens, heads, features]."""
    return max(x.dim() - 3, 0)


def _repeated(x: Tensor, normals: Normals) -> Tensor:
    """One token, over and over."""
    dim = _token_dim(x)
    return x.narrow(dim, 0, 1).expand_as(x).contiguous() if x.dim() > 1 and x.numel() else x


def _runs(x: Tensor, normals: Normals) -> Tensor:
    """Every token 16 times in a row."""
    if x.dim() == 1:
        return x
    dim = _token_dim(x)
    return x.index_select(dim, torch.arange(x.shape[dim], device=x.device) // 16 * 16)


def _uniform(x: Tensor, normals: Normals) -> Tensor:
    """Between 0 and 1, as of torch.rand."""
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
