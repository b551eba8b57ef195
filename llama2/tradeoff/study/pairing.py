"""Gives models that differ in their key/value heads the same initial weights."""

import torch
from torch import nn


@torch.no_grad()
def share_start(model: nn.Module, base: nn.Module, head_dim: int) -> None:
    """Copies the weights that `model` shares with `base`, which has more key/value heads.

    - Tensors of equal shape are copied.
    - The projections to keys and values get the first head of each group of the base's heads.
    - Wider feed-forward layers get the base's columns; their additional columns stay as they are.

    Raises:
        ValueError: the shapes differ elsewhere.
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
