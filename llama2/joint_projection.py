"""Several projections of one input as one matrix product: q, k and v of attention, gate and up of
the feed-forward network.

In a decode step every kernel reads its weights once. One product instead of three reads the same
bytes with two launches fewer. `fuse` moves the weights next to each other in one allocation; they
remain the parameters of their own modules, under their own names.

Only steps on a cache without gradients use the joint product. In training, the gradients of the
parts would have to be concatenated first; that moves more bytes than are saved by not adding up the
gradients of the input.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module


class JointProjection:
    """The product of an input with the weights of several modules, which are passed to each call. A
    copy or a pickle is not fused, because its weights have other addresses."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None  # [sum of the widths, in_features]
        self._parts: tuple[Tensor, ...] = ()  # views of _weight, one per module

    def __getstate__(self) -> dict[str, Any]:
        return {"_weight": None, "_parts": ()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def fuse(self, *linears: nn.Module, tenants: Counter[int]) -> None:
        """Moves the weights next to each other in one allocation, unless they already are. Values,
        parameters and gradients do not change. Nothing is moved if a module is not a plain
        `nn.Linear` without a bias, if dtypes, devices or input widths differ, or if weights are
        inference tensors, on the meta device, shared between processes, tied, in one allocation
        with other weights of the model, or if another tensor refers to the same memory: another
        model that was given the weights, a state dict, an optimiser's one tensor of all weights.

        Args:
            tenants: how many of the model's weights each allocation holds, by `memory_of`.
        """
        self.release(*linears)
        if self._parts or not all(map(_is_plain, linears)):
            return
        weights = [linear.weight for linear in linears]
        if len({(x.dtype, x.device, x.shape[1], x.is_inference()) for x in weights}) > 1:
            return
        if any(x.is_meta or x.is_inference() or (x.is_cpu and x.is_shared()) for x in weights):
            return
        places = Counter(map(memory_of, weights))
        if len(set(map(id, weights))) < len(weights) or any(places[x] < tenants[x] for x in places):
            return
        alone = _num_holders(torch.empty(1, dtype=torch.float32, device="cpu"))
        if any(_num_holders(x) >= alone + places[memory_of(x)] for x in weights):
            return
        self._weight = torch.cat([x.detach() for x in weights])
        self._parts = self._weight.split([len(x) for x in weights])
        for weight, part in zip(weights, self._parts, strict=True):
            weight.data = part

    def release(self, *linears: nn.Module) -> None:
        """Frees the allocation, if the weights are no longer in it."""
        if not self._is_fused(linears):
            self._weight, self._parts = None, ()

    def __call__(self, x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
        """Returns the output of each module: views of one product if the weights are where `fuse`
        moved them and the modules are still plain, otherwise the result of calling each module."""
        if not self._is_fused(linears):
            return [linear(x) for linear in linears]
        widths = [len(part) for part in self._parts]
        return F.linear(x, self._weight).split(widths, dim=-1)

    def _is_fused(self, linears: Sequence[nn.Module]) -> bool:
        if is_compiling() or len(self._parts) != len(linears):
            return False
        return all(
            _is_plain(linear)
            and linear.weight.dtype == part.dtype
            and linear.weight.is_set_to(part)
            for linear, part in zip(linears, self._parts, strict=True)
        )


def memory_of(weight: Tensor) -> int:
    """Returns the address of the allocation that holds a weight."""
    return weight.untyped_storage().data_ptr()


def _num_holders(x: Tensor) -> int:
    """Returns the number of references to the allocation of x, by tensors and others, including x
    itself."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _is_plain(linear: nn.Module) -> bool:
    """Returns whether a module's call is F.linear(x, weight) and nothing else."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is None
        and "forward" not in vars(linear)
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and not module._global_forward_pre_hooks
        and not module._global_forward_hooks
    )
