"""A step of AdamW by PyTorch's fused function; contract as in `reference.adamw`."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gqa_kernels import reference


@torch.no_grad()
def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None = None,
    grad_scale: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """See `reference.adamw_update`, which computes tensors that are not contiguous."""
    recipe = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if not all(x.is_contiguous() for x in (weight, exp_avg, exp_avg_sq)):
        moments = exp_avg, exp_avg_sq
        reference.adamw_update(weight, gradient, *moments, copy, grad_scale, step=step, **recipe)
        return
    if grad_scale is not None:  # divided here: the fused step would overwrite the gradient
        gradient = gradient.to(weight.dtype) / grad_scale
    adamw(
        [weight],
        [gradient.to(weight.dtype).contiguous()],
        [exp_avg],
        [exp_avg_sq],
        [],
        # The number of the previous step: the function adds one.
        [torch.tensor(step - 1, dtype=torch.float32, device=weight.device)],
        fused=True,
        amsgrad=False,
        maximize=False,
        **recipe,
    )
    if copy is not None:
        copy.copy_(weight)
