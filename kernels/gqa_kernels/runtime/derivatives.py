"""First derivatives only: gradients that autograd cannot see into, and says so."""

from typing import Any

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, as a function of what it depends on, and raises when differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "gqa_kernels: expected first derivatives only; got a second one. Use "
            'get_backend("eager") for it'
        )


def only_first(
    gradients: tuple[Tensor | None, ...], *depends_on: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that raise when differentiated.

    torch's `once_differentiable` lets a gradient pass for a constant when the incoming one is
    constant, although it depends on the saved tensors.

    Args:
        depends_on: the saved tensors and the incoming gradients. A node that is on no path to them
            would never be run.
    """
    on = [x for x in depends_on if x is not None]
    return tuple(x if x is None else _NoSecondDerivative.apply(x, *on) for x in gradients)
