"""Each op as PyTorch knows it: a direct path for eager calls, a `torch.library` op for the rest.

An op is a check, a launch, a fake launch that only allocates and, where it has a gradient, what to
save and a backward function. From these come

- a `torch.autograd.Function` for eager calls on plain tensors: no dispatcher stands on the way;
- a `torch.library` op `gqa_kernels::name` with a schema that names what it writes to (nothing, but
  for a cache), a fake implementation and autograd, which compilers, dispatch modes and tensor
  subclasses see.

Both run the same kernels, so that their results have the same bits. Neither knows autocast: an op
computes in the dtypes of its arguments, inside an autocast region and outside. torch.func's
transforms (vmap, grad, …) are refused by both.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.compiler import is_compiling

NAMESPACE = "gqa_kernels"
# What an argument is most often, first of all tensors that belong to no subclass.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))
_num_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_traced(*values: Any) -> bool:
    """Whether a call belongs to PyTorch's dispatcher: a compiler, a mode or a subclass watches.

    A public function asks this before anything else, so that a compiler traces no check.
    """
    if is_compiling() or _num_dispatch_modes():
        return True
    # A loop: a generator would cost a microsecond at every call.
    for x in values:  # noqa: SIM110
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return True
    return False


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an eager call."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or the empty tensor that stands for None where a schema knows no optional outputs."""
    return like.new_empty(0) if x is None else x


def note_written(*tensors: Tensor | None) -> None:
    """Counts a write, as the dispatcher does, so that autograd notices that a tensor which it saved
    has changed."""
    for x in tensors:
        if x is not None and not x.is_inference():  # such a one keeps no count
            torch.autograd.graph.increment_version(x)


class Op:
    """One op in both forms.

    Args:
        launch: computes the op from arguments that were checked. Its annotations are the schema;
            it takes every argument as the caller gave it, and its outputs are new tensors, none of
            them a part of an argument.
        fake: for the same arguments, the same outputs without values: sizes, strides, dtypes.
        check: raises unless the arguments are what `launch` takes. It reads metadata only and runs
            once for real tensors and once for fake ones. None where only this package calls the op.
        setup_context: `(ctx, inputs, output)`: saves what `backward` needs. It runs wherever
            autograd records; an op without a gradient raises in it.
        backward: `(ctx, *grads)`, made of other ops.
        mutates: the names of the arguments that `launch` writes to. Such an op has no gradient:
            its public function refuses tensors that require one.

    Attributes:
        dispatched: the `torch.library` op; it checks.
        function: the `torch.autograd.Function`; its caller has checked. None without a
            `setup_context`.
        launch: as given.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        check: Callable[..., None] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: tuple[str, ...] = (),
    ) -> None:
        self.launch, self.function = launch, None
        definition = torch.library.custom_op(
            f"{NAMESPACE}::{name}", _after(check, launch), mutates_args=mutates
        )
        definition.register_fake(_after(check, fake))
        definition.register_vmap(_refuse_vmap(name))
        if setup_context is not None:
            backward = _once_differentiable(backward)
            definition.register_autograd(backward, setup_context=setup_context)
            self.function = _function(name, launch, setup_context, backward)
        self.dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        """The op, directly or through the dispatcher, for a caller that has checked: a backward
        function. Eager autograd does not see it."""
        if is_traced(*args):
            return self.dispatched(*args)
        return self.launch(*args)


def _after(check: Callable[..., None] | None, then: Callable[..., Any]) -> Callable[..., Any]:
    if check is None:
        return then

    @wraps(then)
    def checked(*args: Any) -> Any:
        check(*args)
        return then(*args)

    return checked


def refuse_gradient(doing: str) -> Callable[..., NoReturn]:
    """What an op on a cache, which has no gradient, says where autograd records."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"q: expected inputs without a gradient ({doing} under torch.no_grad()); got one that "
            "requires grad"
        )

    return refuse


def _refuse_vmap(name: str) -> Callable[..., None]:
    def refuse(info: Any, in_dims: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name}: expected no torch.func.vmap; got a mapped tensor. Give the op the "
            "dimension as one of its batch"
        )

    return refuse


def _function(
    name: str,
    launch: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    def forward(ctx: FunctionCtx, *args: Any) -> Any:
        output = launch(*args)
        setup_context(ctx, args, output)
        return output

    # Forward and setup_context apart would have PyTorch bind the arguments at every call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


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


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """First derivatives only: a Function's backward whose kernels autograd cannot see into.

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
