"""Registers each op with PyTorch: a direct path for eager calls, a `torch.library` op for the rest.

An op consists of a check, a launch, a fake launch that only allocates and, if it has a gradient, a
function that saves tensors and a backward function. This module builds from these

- a `torch.autograd.Function` for eager calls on plain tensors, which bypasses the dispatcher;
- a `torch.library` op `gqa_kernels::name` for compilers, `torch.jit.trace`, dispatch modes and
  tensor subclasses, with a fake implementation, autograd and a schema that declares which arguments
  it writes to (only ops on a cache or on weights do).

Both run the same kernels, so their results have the same bits. Both ignore autocast: an op computes
in the dtypes of its arguments, inside an autocast region and outside. Both raise inside
torch.func's transforms (vmap, grad, …).
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd.function import FunctionCtx
from torch.compiler import is_compiling

from gqa_kernels.runtime import derivatives

NAMESPACE = "gqa_kernels"
# The most common types of arguments, including tensors of no subclass.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_jit_tracing = torch._C._is_tracing


def is_traced(*values: Any) -> bool:
    """Whether a call has to go through PyTorch's dispatcher: for a compiler, `torch.jit.trace`, a
    mode or a tensor subclass."""
    if is_compiling() or _num_dispatch_modes() or _is_jit_tracing():
        return True
    return not _PLAIN.issuperset(map(type, values)) and any(
        type(x) not in _PLAIN and isinstance(x, Tensor) for x in values
    )


def needs_graph(*values: Any) -> bool:
    """Whether autograd has to record an eager call."""
    if torch.is_grad_enabled():
        # A loop, because a generator would cost a microsecond per call.
        for x in values:
            if x is not None and isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def keeps_for_gradient(*values: Any) -> bool:
    """`needs_graph`, for arguments of an op that depend on it. False under `torch.jit.trace`, which
    compares the recorded call with one without autograd."""
    return (is_compiling() or not _is_jit_tracing()) and needs_graph(*values)


def _note_written(x: Tensor | None) -> None:
    """Counts a write, like the dispatcher, so that autograd notices changes of saved tensors."""
    if x is not None and not x.is_inference():  # inference tensors count no writes
        torch.autograd.graph.increment_version(x)


class Op:
    """One op in both forms; a public function calls it.

    Args:
        launch: computes the op from checked arguments. The annotations of its positional parameters
            are the schema; it gets every argument as the caller passed it, and returns new tensors
            that share no memory with an argument. An op that only writes to its arguments returns
            None. If there are several outputs, those not requested are None. Keyword-only
            parameters are not part of the op; a call without a graph can use them to omit outputs.
        fake: returns, for the same arguments, outputs of the same sizes, strides and dtypes without
            values.
        check: raises unless `launch` can take the arguments. It reads metadata only and runs once
            for real tensors and once for fake ones. None if only this package calls the op.
        setup_context: `(ctx, inputs, output)`: saves what `backward` needs. It runs while autograd
            records.
        backward: `(ctx, *grads)`, composed of other ops.
        mutates: the names of the arguments that `launch` writes to. Such an op has no gradient.
        refuse: for an op without a gradient, from `refuse_gradient`: raises while autograd records.

    Attributes:
        dispatched: the `torch.library` op, which includes the check. It returns an empty tensor in
            place of None.
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
        refuse: Callable[..., NoReturn] | None = None,
    ) -> None:
        self._launch, self._check, self._refuse, self._function = launch, check, refuse, None
        self._name = f"{NAMESPACE}::{name}"
        signature = _schema(launch)
        self._written = [list(signature.parameters).index(name) for name in mutates]
        definition = torch.library.custom_op(
            self._name, _registered(launch, check, signature), mutates_args=mutates
        )
        definition.register_fake(_registered(fake, check, signature))
        definition.register_vmap(_refuse_vmap(name))
        if setup_context is not None:
            backward = _once_differentiable(backward)
            definition.register_autograd(backward, setup_context=setup_context)
            self._function = _function(name, launch, setup_context, backward)
        elif refuse is not None and not mutates:  # PyTorch allows no autograd for ops that write
            definition.register_autograd(refuse, setup_context=refuse)
        self.dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the op: through the dispatcher if `is_traced`, otherwise directly, with a graph if
        an argument requires a gradient.

        Args:
            options: keyword-only parameters of `launch`, for a call without a graph.
        """
        if is_traced(*args):
            if self._written and needs_graph(*args):
                self._refuse()
            return self.dispatched(*args)
        if torch.autograd._profiler_enabled():  # the profiler only sees ops of the dispatcher
            with torch.profiler.record_function(self._name):
                return self._direct(args, options)
        return self._direct(args, options)

    def _direct(self, args: tuple, options: dict[str, Any]) -> Any:
        if self._check is not None:
            self._check(*args)
        if needs_graph(*args):
            return self._refuse() if self._function is None else self._record(args)
        for position in self._written:
            _note_written(args[position])
        return self._launch(*args, **options)

    def _record(self, args: tuple) -> Any:
        """`Function.apply` without its search for torch.func's tensors, for which the check
        raises."""
        if torch._C._are_functorch_transforms_active():
            return self._function.apply(*args)
        return super(torch.autograd.Function, self._function).apply(*args)


def _schema(launch: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature from which PyTorch infers the schema, which has neither keyword-only
    options nor optional outputs."""
    signature = inspect.signature(launch)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    result = signature.return_annotation
    if result is not Tensor and result is not None:
        result = tuple[(Tensor,) * len(get_args(result))]
    return signature.replace(parameters=parameters, return_annotation=result)


def _registered(
    function: Callable[..., Any], check: Callable[..., None] | None, signature: inspect.Signature
) -> Callable[..., Any]:
    """Wraps `function` for the dispatcher: with the check, and an empty tensor in place of None."""

    def registered(*args: Any) -> Any:
        if check is not None:
            check(*args)
        outputs = function(*args)
        if outputs is None or isinstance(outputs, Tensor):
            return outputs
        some = next(x for x in args if isinstance(x, Tensor))
        return tuple(some.new_empty(0) if x is None else x for x in outputs)

    registered.__signature__ = signature
    return registered


def refuse_gradient(doing: str, name: str = "q") -> Callable[..., NoReturn]:
    """Returns the function that an op without a gradient calls while autograd records: it raises an
    error that names the argument `name`."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: expected inputs without a gradient ({doing} under torch.no_grad()); got one "
            "that requires grad"
        )

    return refuse


def _refuse_vmap(name: str) -> Callable[..., None]:
    def refuse(info: Any, in_dims: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name}: expected no torch.func.vmap; got a mapped tensor. Pass the mapped dimension "
            "as part of the batch"
        )

    return refuse


def _check_unbatched(grad: Tensor | None) -> None:
    """Raises for gradients batched by vmap, by `torch.autograd.grad` or by torch.func."""
    if grad is not None and (is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad)):
        raise NotImplementedError(
            "grad_outputs: expected a tensor outside torch.func's transforms (vmap, "
            "is_grads_batched, jacobian's vectorize, …); got one inside. Call "
            "torch.autograd.grad once per vector instead"
        )


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

    # With a separate setup_context, PyTorch would bind the arguments at every call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a Function's backward so that a second derivative raises: autograd cannot differentiate
    its kernels."""

    @wraps(backward)
    def wrapper(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not is_compiling():  # checks are not traced
            for grad in grads:
                _check_unbatched(grad)
        if not torch.is_grad_enabled():  # the usual case, without create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return derivatives.only_first(results, *ctx.saved_tensors, *grads)

    return wrapper
