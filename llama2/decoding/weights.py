"""Addresses and fingerprints of a model's weights, on which CUDA graphs and cached pages depend."""

import contextlib

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from llama2.model import Llama2


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Returns the parameters and buffers; those of a module that is used twice appear twice."""
    every = {"remove_duplicate": False}
    named = *model.named_parameters(**every), *model.named_buffers(**every)
    return [x for _, x in named]


def addresses(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """Returns the addresses and dtypes that a replayed graph reads."""
    return [(x.data_ptr(), x.dtype) for x in tensors_of(model)]


def fingerprint(model: nn.Module) -> Tensor:
    """Returns int64, a hash of each tensor's values.

    It reads all weights, as a decode step does, without a device synchronisation. Addresses and
    versions would not be enough: memory is reused, and neither fused optimisers nor writes through
    `.data` increase a tensor's version.
    """
    tensors = tensors_of(model)
    sums = {id(x): _sum_of_bits(x) for x in tensors}
    device = sums[id(tensors[0])].device
    return torch.stack([sums[id(x)].to(device) for x in tensors])


def _sum_of_bits(x: Tensor) -> Tensor:
    """Returns the wrapping sum over rows of the row's bits, as ints, times the row's number. Its
    order does not matter, and a change of any single bit changes it."""
    if hasattr(x, "full_tensor"):  # sharded: all ranks must get the same result
        x = x.full_tensor()
    if is_traceable_wrapper_subclass(x):  # for example quantised weights
        parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        return torch.stack([_sum_of_bits(part) for part in parts]).sum()
    rows = (x.detach().flatten(1) if x.dim() > 1 else x.detach().view(-1, 1)).contiguous()
    sizes = (rows.shape[1], rows.storage_offset())
    wide = all(size * rows.element_size() % 8 == 0 for size in sizes)
    bits = rows.view(torch.int64 if wide else torch.uint8).sum(1, dtype=torch.int64)
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()


def in_own_dtype(model: Llama2) -> contextlib.AbstractContextManager[object]:
    """Returns a context that disables autocast, as keys and values must have the cache's dtype, the
    model's. A model of several dtypes needs autocast and keeps it."""
    kind = model.lm_head.weight.device.type
    if torch.is_autocast_enabled(kind):
        dtypes = {x.dtype for x in model.parameters() if x.is_floating_point()}
        if len(dtypes) == 1:
            return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
