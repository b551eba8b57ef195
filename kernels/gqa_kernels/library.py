"""Each op as PyTorch knows it: a direct path for eager calls, a `torch.library` op for the rest.

An op is a forward function (checks and launches), a fake one (checks and allocates) and, where it
has a gradient, what to save and a backward function. From these come

- a `torch.autograd.Function` for eager calls on plain tensors: no dispatcher stands on the way;
- a `torch.library` op `gqa_kernels::name` with a functional schema, a fake implementation and
  autograd, which compilers, dispatch modes and tensor subclasses see.

Both run the same kernels, so that their results have the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels.autograd import once_differentiable

NAMESPACE = "gqa_kernels"
_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(*values: Any) -> bool:
    """Whether a call belongs to PyTorch's dispatcher: a compiler, a mode or a subclass watches."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in values)
    )


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an eager call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or the empty tensor that stands for None where a schema knows no optional outputs."""
    return like.new_empty(0) if x is None else x


class Op:
    """One op in both forms.

    Args:
        forward: what the op computes on real tensors. Its annotations become the schema; its
            outputs are new tensors.
        fake: for the same arguments, the same outputs without values.
        setup_context: `(ctx, inputs, output)`: what the backward function needs is saved.
        backward: `(ctx, *grads)`, made of other ops. None for an op without a gradient.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.direct = forward
        self.dispatched = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
        self.dispatched.register_fake(fake)

        def refuse_vmap(info: Any, in_dims: Any, *_: Any) -> None:
            raise NotImplementedError(
                f"{name}: expected no torch.func.vmap; got a mapped tensor. Give the op the "
                "dimension as one of its batch"
            )

        self.dispatched.register_vmap(refuse_vmap)
        if backward is None:
            return
        self.dispatched.register_autograd(backward, setup_context=setup_context)

        def forward_and_save(ctx: FunctionCtx, *args: Any) -> Any:
            output = forward(*args)
            setup_context(ctx, args, output)
            return output

        # Forward and setup_context apart would have PyTorch bind the arguments at every call.
        members = {"forward": forward_and_save, "backward": once_differentiable(backward)}
        self.function = type(
            name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()}
        )

    def __call__(self, *args: Any) -> Any:
        """The op, by the direct path or through the dispatcher; eager autograd does not see it."""
        if is_traced(*args):
            return self.dispatched(*args)
        return self.direct(*args)
