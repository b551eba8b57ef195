"""Eager PyTorch whose sums are taken in one known order on every machine.

How a library sums (in vectors, blocks or threads, with fused multiply-adds) depends on the
processor, and with it the error of eager code. Under `tile_by_tile` the products of matrices, sums,
means, norms and softmaxes of low-precision tensors are evaluated here instead. Each product is
rounded to float32; the terms of a tile of 128 are added to a float32 total one after another, then
the totals of the tiles; the result is rounded once to its dtype. What remains are operations on
single elements, which IEEE 754 defines but for the last bits of functions such as exp.

This is how a kernel adds up, inside a tile and over tiles, so that the error of this order is what
an error budget is derived from (`accuracy`). It is larger than that of pairwise summation, which
libraries come near to: for n random terms one grows with sqrt(min(n, 128)) + sqrt(n / 128), the
other with sqrt(log n) (Higham 2002, chapter 4).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 128


class tile_by_tile(TorchDispatchMode):
    """A context in which sums are taken in this order, forward and backward.

    Args:
        order: draws the order of the terms, once for each sum; None takes them as they lie.
    """

    def __init__(self, order: torch.Generator | None = None) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        evaluate = _SUMS.get(func)
        if evaluate is not None and args[0].dtype in LOW_PRECISION:
            return evaluate(self, *args, **kwargs)
        with self:  # a composite operation may contain sums
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _ordered(self, terms: Tensor) -> Tensor:
        if self.order is None:
            return terms
        order = torch.randperm(len(terms), generator=self.order, device=self.order.device)
        return terms[order.to(terms.device)]

    def total(self, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
        """The sum of a tensor over some dimensions, in float32."""
        dims = sorted(dim % x.dim() for dim in dims) if x.dim() else []
        kept = [dim for dim in range(x.dim()) if dim not in dims]
        shape = [x.shape[dim] for dim in kept]
        num_terms = math.prod(x.shape[dim] for dim in dims)
        terms = self._ordered(x.float().permute([*dims, *kept]).reshape(num_terms, *shape))
        tiles = (_added(tile.unbind(), shape, x.device) for tile in terms.split(_TILE))
        total = _added(tiles, shape, x.device)
        if keepdim:
            total = total.view([x.shape[dim] if dim in kept else 1 for dim in range(x.dim())])
        return total

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`[…, m, n]` times `[…, n, k]`, in float32."""
        shape = (*a.shape[:-1], b.shape[-1])
        term = torch.empty(shape, dtype=torch.float32, device=a.device)

        def terms(tile: Tensor) -> Iterator[Tensor]:
            for row in tile.unbind():
                left, right = row.split([a.shape[-2], b.shape[-1]], -1)
                yield torch.mul(left.unsqueeze(-1), right.unsqueeze(-2), out=term)

        factors = self._ordered(torch.cat([a.mT, b], -1).float().movedim(-2, 0))
        tiles = (_added(terms(tile), shape, a.device) for tile in factors.split(_TILE))
        return _added(tiles, shape, a.device)


def _added(terms: Iterable[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float32, device=device)
    for term in terms:
        total += term
    return total


def _sum(sums: tile_by_tile, x, dim=None, keepdim=False, *, dtype=None):
    dims = range(x.dim()) if not dim and dim != 0 else dim
    return sums.total(x, dims, keepdim).to(dtype or x.dtype)


def _mean(sums: tile_by_tile, x, dim=None, keepdim=False, *, dtype=None):
    total = _sum(sums, x, dim, keepdim, dtype=torch.float32)
    return (total / (x.numel() / max(1, total.numel()))).to(dtype or x.dtype)


def _norm(sums: tile_by_tile, x, order=2, dim=None, keepdim=False, *, dtype=None):
    if order != 2:
        return torch.linalg.vector_norm(x, order, dim, keepdim, dtype=dtype)
    return _sum(sums, x.float().square(), dim, keepdim).sqrt().to(dtype or x.dtype)


def _logsumexp(sums: tile_by_tile, x, dim, keepdim=False):
    # Of no terms at all, as of infinite ones, nothing can be taken off.
    largest = x.float().amax(dim, keepdim=True) if x.numel() else sums.total(x, dim, keepdim=True)
    largest = largest.masked_fill(largest.abs() == torch.inf, 0.0)
    total = sums.total(torch.exp(x.float() - largest), dim, keepdim)
    return (total.log() + largest.view_as(total)).to(x.dtype)


def _softmax(sums: tile_by_tile, x, dim, half_to_float=False):
    powers = torch.exp(x.float() - x.float().amax(dim, keepdim=True))
    weights = powers / sums.total(powers, [dim], keepdim=True)
    return weights if half_to_float else weights.to(x.dtype)


def _safe_softmax(sums: tile_by_tile, x, dim, dtype=None):
    weights = _softmax(sums, x, dim).masked_fill((x == -torch.inf).all(dim, keepdim=True), 0.0)
    return weights.to(dtype or x.dtype)


def _log_softmax(sums: tile_by_tile, x, dim, half_to_float=False):
    logs = x.float() - _logsumexp(sums, x.float(), [dim], keepdim=True)
    return logs if half_to_float else logs.to(x.dtype)


def _softmax_backward(sums: tile_by_tile, grad, weights, dim, dtype):
    grad, weights = grad.float(), weights.float()
    return (weights * (grad - sums.total(grad * weights, [dim], keepdim=True))).to(dtype)


def _log_softmax_backward(sums: tile_by_tile, grad, logs, dim, dtype):
    grad = grad.float()
    return (grad - logs.float().exp() * sums.total(grad, [dim], keepdim=True)).to(dtype)


def _mm(sums: tile_by_tile, a, b):
    return sums.product(a, b).to(a.dtype)


def _addmm(sums: tile_by_tile, x, a, b, *, beta=1, alpha=1):
    return (beta * x.float() + alpha * sums.product(a, b)).to(a.dtype)


def _mv(sums: tile_by_tile, a, b):
    return _mm(sums, a, b[:, None])[:, 0]


def _dot(sums: tile_by_tile, a, b):
    return _mm(sums, a[None], b[:, None])[0, 0]


_aten = torch.ops.aten
_SUMS = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _addmm,
    _aten.mv.default: _mv,
    _aten.dot.default: _dot,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
    _aten.linalg_vector_norm.default: _norm,
    _aten.logsumexp.default: _logsumexp,
    _aten._softmax.default: _softmax,
    _aten._safe_softmax.default: _safe_softmax,
    _aten._log_softmax.default: _log_softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._log_softmax_backward_data.default: _log_softmax_backward,
}
