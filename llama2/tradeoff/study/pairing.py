"""Models that differ in their key/value heads and start from the same weights."""

import torch
from torch import nn


@torch.no_grad()
def share_start(model: nn.Module, base: nn.Module, head_dim: int) -> None:
    """Copies into `model`, which has fewer key/value heads than `base`, what the two share.

    Tensors of one shape are copied. Of the projections to keys and values `model` takes the first
    head of each group that becomes one. Where its feed-forward layers are wider, the columns that
    `base` has are copied and the others stay as they are.

    Raises:
        ValueError: the two differ in more than that.
    """
    source = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        given = source[name]
        if parameter.shape == given.shape:
            parameter.copy_(given)
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = given.unflatten(0, (-1, head_dim))
            group = given.shape[0] // parameter.shape[0]
            parameter.copy_(heads[::group].flatten(0, 1))
        elif name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
            shared = tuple(slice(size) for size in map(min, parameter.shape, given.shape))
            parameter[shared].copy_(given[shared])
        else:
            raise ValueError(
                f"{name}: expected the base's shape, {list(given.shape)}; "
                f"got {list(parameter.shape)}"
            )
