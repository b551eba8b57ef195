"""A step of AdamW, in plain PyTorch."""

import math

from torch import Tensor


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
    """A step of AdamW, in place: with g = gradient / grad_scale in the dtype of `weight`,

        m      ← β1 · m + (1 − β1) · g
        v      ← β2 · v + (1 − β2) · g²
        weight ← (1 − lr · weight_decay) · weight
                 − lr / (1 − β1^step) · m / (sqrt(v / (1 − β2^step)) + eps)
        copy   ← weight, rounded to the dtype of `copy`

    Args:
        weight: float32, of any shape. Written.
        gradient: of that shape, in any floating dtype.
        exp_avg, exp_avg_sq: m and v, like `weight`; zero before the first step. Written.
        copy: of that shape, in any floating dtype, such as the weight of a model in 16 bits.
            Written. None writes no copy.
        grad_scale: scalar by which the gradient is divided. To clip the norm of all gradients to
            max_norm, it is max(norm / max_norm, 1). None means 1.
        step: number of this step, counted from 1.
    Reference: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    gradient = gradient.to(weight.dtype)
    if grad_scale is not None:
        gradient = gradient / grad_scale
    exp_avg.lerp_(gradient, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    weight.mul_(1.0 - lr * weight_decay)
    weight.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - beta1**step))
    if copy is not None:
        copy.copy_(weight)
