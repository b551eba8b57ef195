"""Views of tensors that the kernels can address by strides."""

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """x as `[num_rows, width]` with contiguous rows a fixed stride apart.

    A view wherever the strides allow it; a copy otherwise.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def contiguous_features(x: Tensor) -> Tensor:
    """x itself when its last dimension is contiguous, a copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()
