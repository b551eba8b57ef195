"""Views of tensors that the kernels can address by strides."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def rows(x: Tensor) -> Tensor:
    """Returns x as `[num_rows, width]` with contiguous rows a fixed stride apart.

    A view if the strides allow it; a copy otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rows_and_stride(x: Tensor) -> tuple[Tensor, int]:
    """Returns x, or a copy, with contiguous rows a fixed stride apart; and that stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = rows(x)
    return x, x.stride(0)


def contiguous_features(x: Tensor) -> Tensor:
    """Returns x itself if its last dimension is contiguous, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover a size. `triton.cdiv` does the same but takes
    microseconds."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def fits_tma(x: Tensor) -> bool:
    """Whether TMA, which addresses in units of 16 bytes, can load from x
    `[batch, row, head, feature]`."""
    batch, row, head, _ = x.stride()
    divisor = 16 // x.element_size()
    return (
        x.data_ptr() % 16 == 0
        and batch > 0 and row > 0 and head > 0
        and batch % divisor == 0 and row % divisor == 0 and head % divisor == 0
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """Returns x `[batch, row, head, feature]` itself if `fits_tma` holds for it, a copy
    otherwise."""
    return x if fits_tma(x) else x.clone(memory_format=torch.contiguous_format)


def descriptor(x: Tensor, block_rows: int, block_features: int) -> TensorDescriptor:
    """Returns a descriptor for loads of tiles of one head of a non-empty x
    `[batch, row, head, feature]` for which `fits_tma` holds."""
    # The constructor would check the strides and the block at every call; `fits_tma` has checked
    # the strides, and the cached descriptor the block.
    found = object.__new__(TensorDescriptor)
    found.__dict__ = _descriptor_options(block_rows, block_features) | {
        "base": x,
        "shape": list(x.shape),
        "strides": list(x.stride()),
    }
    return found


@cache
def _descriptor_options(block_rows: int, block_features: int) -> dict[str, Any]:
    """The attributes of a descriptor that depend on the block alone, taken from one that Triton's
    constructor has built and checked."""
    block = [1, block_rows, 1, block_features]
    example = torch.empty(block, dtype=torch.float32, device="cpu")
    return vars(TensorDescriptor(example, block, list(example.stride()), block))


def sequence_stride(per_head: Tensor | None) -> int:
    """The stride between the rows of `[num_heads]` (0) or `[num_sequences, num_heads]`."""
    return per_head.stride(0) if per_head is not None and per_head.dim() == 2 else 0


def cache_capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """The largest number of tokens of a sequence in a contiguous cache, or in its pages."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Returns a mask `[batch, num_keys]` as bytes or integers, contiguous along the keys."""
    if mask is None:
        return None
    mask = contiguous_features(mask)
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
