"""Gradients that raise on a second derivative, because autograd cannot differentiate them."""

from typing import Any

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient, as a function of the tensors on which it depends; its backward
    raises."""

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
    """Returns gradients that raise when they are differentiated.

    torch's `once_differentiable` treats a gradient as constant if the incoming gradient is,
    although it also depends on the saved tensors.

    Args:
        depends_on: the saved tensors and the incoming gradients. Autograd only runs nodes that are
            on a path to them.
    """
    on = [x for x in depends_on if x is not None]
    return tuple(x if x is None else _NoSecondDerivative.apply(x, *on) for x in gradients)
