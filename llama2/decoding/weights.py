"""A model's weights, as what outlives a call depends on them: where they lie, and what they are."""

import contextlib

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llama2.model import Llama2


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, those of a module that is used twice at each of its places."""
    every = {"remove_duplicate": False}
    named = *model.named_parameters(**every), *model.named_buffers(**every)
    return [x for _, x in named]


def addresses(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """Where a graph that is replayed reads them."""
    return [(x.data_ptr(), x.dtype) for x in tensors_of(model)]


def fingerprint(model: nn.Module) -> Tensor:
    """int64, a number per tensor, which other values hardly ever have.

    All weights are read, as in a decode step, and nobody waits for it. Their addresses and versions
    would not do: memory is used again, and neither fused optimisers nor writes through `.data`
    count as a version.
    """
    tensors = tensors_of(model)
    sums = {id(x): _sum_of_bits(x) for x in tensors}
    device = sums[id(tensors[0])].device
    return torch.stack([sums[id(x)].to(device) for x in tensors])


def _sum_of_bits(x: Tensor) -> Tensor:
    """Returns the bits of each row as whole numbers, times the row's number: a sum that wraps, so
    that its order does not matter, and to which no change is too small."""
    if hasattr(x, "full_tensor"):  # sharded: all ranks are to come to one conclusion
        x = x.full_tensor()
    if is_traceable_wrapper_subclass(x):  # as of quantised weights
        parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        return torch.stack([_sum_of_bits(part) for part in parts]).sum()
    rows = (x.detach().flatten(1) if x.dim() > 1 else x.detach().view(-1, 1)).contiguous()
    sizes = (rows.shape[1], rows.storage_offset())
    wide = all(size * rows.element_size() % 8 == 0 for size in sizes)
    bits = rows.view(torch.int64 if wide else torch.uint8).sum(1, dtype=torch.int64)
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()


def in_own_dtype(model: Llama2) -> contextlib.AbstractContextManager[object]:
    """Where autocast is off: a cache is of the model's dtype, and so are keys and values to be. A
    model of several dtypes, which cannot do without autocast, is left to it."""
    kind = model.lm_head.weight.device.type
    if torch.is_autocast_enabled(kind):
        dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
        if len(dtypes) == 1:
            return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
