"""First derivatives only: differentiating a gradient raises."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on, as a function of what it depends on, and raises when differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise NotImplementedError(
            "gqa_kernels: expected first derivatives only; got a second one. Use "
            'get_backend("eager") for it'
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a Function's backward whose kernels autograd cannot see into.

    torch's decorator of this name lets a gradient pass for a constant when the incoming one is
    constant, although it depends on the saved tensors; here it raises when differentiated.
    """

    @wraps(backward)
    def wrapper(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        # Tied to its arguments: a node that is on no path to them would never be run.
        depends_on = [x for x in (*ctx.saved_tensors, *grads) if x is not None]
        return tuple(
            result if result is None else _NoSecondDerivative.apply(result, *depends_on)
            for result in results
        )

    return wrapper
