"""Views of tensors that the kernels can address by strides."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def rows(x: Tensor) -> Tensor:
    """x as `[num_rows, width]` with contiguous rows a fixed stride apart.

    A view wherever the strides allow it; a copy otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def contiguous_features(x: Tensor) -> Tensor:
    """x itself when its last dimension is contiguous, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fits_tma(x: Tensor) -> bool:
    """Whether the bulk-copy engine, which addresses in units of 16 bytes, can load from x
    `[batch, row, head, feature]`."""
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def descriptor(x: Tensor, block_rows: int, block_features: int) -> TensorDescriptor:
    """For loads of tiles of one head of x `[batch, row, head, feature]`."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block_rows, 1, block_features])


def sequence_stride(per_head: Tensor | None) -> int:
    """The distance between the rows of `[num_heads]` or `[num_sequences, num_heads]`."""
    return per_head.stride(0) if per_head is not None and per_head.dim() == 2 else 0


def key_mask(mask: Tensor | None) -> Tensor | None:
    """`[batch, num_keys]` as bytes or whole numbers, contiguous along the keys."""
    if mask is None:
        return None
    mask = contiguous_features(mask)
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
