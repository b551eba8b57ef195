"""Gradient clipping and the optimiser's update.

Clipping takes no pass over the gradients: the optimiser divides them by a scale as it reads them.
If a model in 16 bits computes the gradients (the worker) and the weights are float32, the update
reads the worker's gradients in 16 bits and writes both the weights and the worker's weights.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

# Added to the norm, as torch.nn.utils.clip_grad_norm_ does.
_SMALLEST_NORM = 1e-6


def grad_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all gradients together: a scalar in float32 or wider, whatever their
    dtype."""
    norms = [
        torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in gradients
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clipping_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Returns the divisor that reduces gradients of this norm to a norm of at most `max_norm`;
    float32, as AdamW's fused step requires."""
    return ((norm + _SMALLEST_NORM) / max_norm).clamp(min=1.0).float()


def step_fused(optimizer: torch.optim.AdamW, grad_scale: Tensor) -> None:
    """Does a step of PyTorch's fused AdamW on the gradients divided by `grad_scale`."""
    optimizer.grad_scale = grad_scale  # the attribute that torch.amp.GradScaler sets
    try:
        optimizer.step()
    finally:
        optimizer.grad_scale = None


@torch.no_grad()
def step_with_copies(
    optimizer: torch.optim.AdamW,
    gradients: Mapping[nn.Parameter, Tensor],
    copies: Mapping[nn.Parameter, Tensor],
    grad_scale: Tensor,
    adamw_update: Callable[..., None],
) -> None:
    """Does a step of `optimizer`, with its state, on float32 weights that have copies in another
    dtype. Afterwards the copies are the rounded new weights.

    Args:
        optimizer: not fused, so that its step counts are on the CPU.
        gradients: by weight, in any dtype; a weight without a gradient is not changed.
        copies: by weight, for every weight that has a gradient.
        adamw_update: the op of a backend.
    """
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        recipe = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        recipe |= {"beta1": beta1, "beta2": beta2}
        for weight in group["params"]:
            if weight not in gradients:
                continue
            state = optimizer.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] += 1
            moments = (state["exp_avg"], state["exp_avg_sq"])
            adamw_update(
                weight,
                gradients[weight],
                *moments,
                copies[weight],
                grad_scale,
                step=int(state["step"]),
                **recipe,
            )
