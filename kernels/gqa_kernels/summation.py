"""Evaluates eager PyTorch with sums in one known order on every machine.

How a library sums (in vectors, blocks or threads, with fused multiply-adds), and with it the error
of eager code, depends on the processor. Under `tile_by_tile`, this module evaluates matrix
products, sums, means, norms, logsumexp and softmaxes of low-precision tensors instead. It rounds
each product to float32, adds the terms of a tile of 128 one by one to a float32 total, then adds
the totals of the tiles, and rounds the result once to its dtype. The other operations that the ops
of this package use are elementwise; IEEE 754 defines them except for the last bits of functions
such as exp. All other reductions are left to the library.

Kernels also add inside tiles and then over tiles, so error budgets are derived from the error of
this order (`accuracy`). It is larger than that of pairwise summation, which libraries approximate:
for n random terms it grows with sqrt(min(n, 128)) + sqrt(n / 128), that of pairwise summation with
sqrt(log n) (Higham 2002, "Accuracy and stability of numerical algorithms", chapter 4).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_elementary: set[Any] = set()  # operations that do not decompose into others
LOW_PRECISION = {torch.float32, torch.float16, torch.bfloat16}
_TILE = 128


class tile_by_tile(TorchDispatchMode):
    """A context in which sums are taken in this order, forward and backward.

    Args:
        order: a generator that shuffles the terms of each sum; None keeps their order in memory.
    """

    def __init__(self, order: torch.Generator | None = None) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        evaluate = _SUMS.get(func)
        dtypes = {x.dtype for x in args if isinstance(x, Tensor)} if evaluate else set()
        if len(dtypes) == 1 and dtypes <= LOW_PRECISION:
            # Raises the library's errors and gives the shape and dtype of the result.
            like = func(*_on_meta(args), **_on_meta(kwargs))
            if like.dtype in LOW_PRECISION:
                result = torch.empty_strided(
                    like.shape, like.stride(), dtype=like.dtype, device=args[0].device
                )
                kwargs.pop("dtype", None)
                return result.copy_(evaluate(self, *args, **kwargs))
        if func not in _elementary:
            with self:  # a composite operation may contain sums
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _elementary.add(func)
        return func(*args, **kwargs)

    def _ordered(self, terms: Tensor) -> Tensor:
        if self.order is None:
            return terms
        order = torch.randperm(len(terms), generator=self.order, device=self.order.device)
        return terms[order.to(terms.device)]

    def total(self, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
        """Returns the sum of a tensor over some dimensions, in float32."""
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
        """Returns the product of `[…, m, n]` and `[…, n, k]`, in float32."""
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


def _on_meta(arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to("meta"), arguments)


# Each function takes the arguments of the operation and returns its result in float32.


def _sum(sums: tile_by_tile, x, dim=None, keepdim=False):
    dims = range(x.dim()) if not dim and dim != 0 else dim
    return sums.total(x, dims, keepdim)


def _mean(sums: tile_by_tile, x, dim=None, keepdim=False):
    total = _sum(sums, x, dim, keepdim)
    return total / (x.numel() / max(1, total.numel()))


def _norm(sums: tile_by_tile, x, order=2, dim=None, keepdim=False):
    if order != 2:
        return torch.linalg.vector_norm(x, order, dim, keepdim)
    return _sum(sums, x.float().square(), dim, keepdim).sqrt()


def _largest(sums: tile_by_tile, x, dims):
    """The maximum; 0 if there are no numbers."""
    return x.amax(dims, keepdim=True) if x.numel() else sums.total(x, dims, keepdim=True)


def _logsumexp(sums: tile_by_tile, x, dim, keepdim=False):
    largest = _largest(sums, x.float(), dim)
    largest = largest.masked_fill(largest.abs() == torch.inf, 0.0)  # inf − inf would be NaN
    total = sums.total(torch.exp(x.float() - largest), dim, keepdim)
    return total.log() + largest.view_as(total)


def _softmax(sums: tile_by_tile, x, dim, half_to_float=False):
    powers = torch.exp(x.float() - _largest(sums, x.float(), [dim]))
    return powers / sums.total(powers, [dim], keepdim=True)


def _safe_softmax(sums: tile_by_tile, x, dim):
    blind = (x == -torch.inf).all(dim, keepdim=True)
    return _softmax(sums, x, dim).masked_fill(blind, 0.0)


def _log_softmax(sums: tile_by_tile, x, dim, half_to_float=False):
    less = x.float() - _largest(sums, x.float(), [dim])
    return less - sums.total(less.exp(), [dim], keepdim=True).log()


def _softmax_backward(sums: tile_by_tile, grad, weights, dim, dtype):
    grad, weights = grad.float(), weights.float()
    return weights * (grad - sums.total(grad * weights, [dim], keepdim=True))


def _log_softmax_backward(sums: tile_by_tile, grad, logs, dim, dtype):
    grad = grad.float()
    return grad - logs.float().exp() * sums.total(grad, [dim], keepdim=True)


def _mm(sums: tile_by_tile, a, b):
    return sums.product(a, b)


def _addmm(sums: tile_by_tile, x, a, b, *, beta=1, alpha=1):
    """beta · x + alpha · (a b); a factor of 0 removes its term, even if that is NaN."""
    product = alpha * sums.product(a, b) if alpha else a.new_zeros((), dtype=torch.float32)
    return beta * x.float() + product if beta else product


def _mv(sums: tile_by_tile, a, b):
    return sums.product(a, b[:, None])[:, 0]


def _dot(sums: tile_by_tile, a, b):
    return sums.product(a[None], b[:, None])[0, 0]


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
