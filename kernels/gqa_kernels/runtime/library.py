"""Each op as PyTorch knows it: a direct path for eager calls, a `torch.library` op for the rest.

An op is a check, a launch, a fake launch that only allocates and, where it has a gradient, what to
save and a backward function. From these come

- a `torch.autograd.Function` for eager calls on plain tensors: no dispatcher stands on the way;
- a `torch.library` op `gqa_kernels::name` with a schema that names what it writes to (nothing, but
  for a cache), a fake implementation and autograd, which compilers, `torch.jit.trace`, dispatch
  modes and tensor subclasses see.

Both run the same kernels, so that their results have the same bits. Neither knows autocast: an op
computes in the dtypes of its arguments, inside an autocast region and outside. torch.func's
transforms (vmap, grad, …) are refused by both.
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
# What an argument is most often, first of all tensors that belong to no subclass.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_jit_tracing = torch._C._is_tracing


def is_traced(*values: Any) -> bool:
    """Whether a call belongs to PyTorch's dispatcher: a compiler, `torch.jit.trace`, a mode or a
    subclass watches."""
    if is_compiling() or _num_dispatch_modes() or _is_jit_tracing():
        return True
    return not _PLAIN.issuperset(map(type, values)) and any(
        type(x) not in _PLAIN and isinstance(x, Tensor) for x in values
    )


def needs_graph(*values: Any) -> bool:
    """Whether autograd has to record an eager call."""
    if torch.is_grad_enabled():
        # A loop: a generator would cost a microsecond at every call.
        for x in values:
            if x is not None and isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def keeps_for_gradient(*values: Any) -> bool:
    """`needs_graph`, for what an op's arguments say of it: of a call that `torch.jit.trace` records
    False, which is compared with one where autograd is off."""
    return (is_compiling() or not _is_jit_tracing()) and needs_graph(*values)


def _note_written(x: Tensor | None) -> None:
    """Counts a write, as the dispatcher does, so that autograd notices that a tensor which it saved
    has changed."""
    if x is not None and not x.is_inference():  # such a one keeps no count
        torch.autograd.graph.increment_version(x)


class Op:
    """One op in both forms; a public function calls it.

    Args:
        launch: computes the op from arguments that were checked. The annotations of its positional
            parameters are the schema; it takes every argument as the caller gave it, and its
            outputs are new tensors that share no memory with an argument. An op that only writes
            to its arguments returns None. Of several outputs, those not requested are
            None. Keyword-only parameters are not part of the op; a call without a graph can use
            them to leave out outputs.
        fake: for the same arguments, the same outputs without values: sizes, strides, dtypes.
        check: raises unless the arguments are what `launch` takes. It reads metadata only and runs
            once for real tensors and once for fake ones. None where only this package calls the op.
        setup_context: `(ctx, inputs, output)`: saves what `backward` needs. It runs wherever
            autograd records.
        backward: `(ctx, *grads)`, made of other ops.
        mutates: the names of the arguments that `launch` writes to. Such an op has no gradient.
        refuse: of an op without a gradient, of `refuse_gradient`: raises where autograd records.

    Attributes:
        dispatched: the `torch.library` op; it checks. It gives an empty tensor for None.
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
        elif refuse is not None and not mutates:  # PyTorch registers none for an op that writes
            definition.register_autograd(refuse, setup_context=refuse)
        self.dispatched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The op: through the dispatcher where something watches, else directly, with a graph where
        an argument requires a gradient.

        Args:
            options: keyword-only parameters of `launch`, for a call without a graph.
        """
        if is_traced(*args):
            if self._written and needs_graph(*args):
                self._refuse()
            return self.dispatched(*args)
        if torch.autograd._profiler_enabled():  # which sees no op where the dispatcher does not
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
        """`Function.apply` without its search for torch.func's tensors, which the check refuses."""
        if torch._C._are_functorch_transforms_active():
            return self._function.apply(*args)
        return super(torch.autograd.Function, self._function).apply(*args)


def _schema(launch: Callable[..., Any]) -> inspect.Signature:
    """What PyTorch reads a schema from: it knows neither keyword-only options nor optional
    outputs."""
    signature = inspect.signature(launch)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    result = signature.return_annotation
    if result is not Tensor and result is not None:
        result = tuple[(Tensor,) * len(get_args(result))]
    return signature.replace(parameters=parameters, return_annotation=result)


def _registered(
    function: Callable[..., Any], check: Callable[..., None] | None, signature: inspect.Signature
) -> Callable[..., Any]:
    """`function` as the dispatcher takes it: it checks, and an empty tensor stands for None."""

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
    """The function that an op without a gradient calls where autograd records: it raises, naming
    the argument `name`."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: expected inputs without a gradient ({doing} under torch.no_grad()); got one "
            "that requires grad"
        )

    return refuse


def _refuse_vmap(name: str) -> Callable[..., None]:
    def refuse(info: Any, in_dims: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name}: expected no torch.func.vmap; got a mapped tensor. Give the op the "
            "dimension as one of its batch"
        )

    return refuse


def _check_unbatched(grad: Tensor | None) -> None:
    """Refuses what `torch.autograd.grad` batches by a vmap of its own, and torch.func's."""
    if grad is not None and (is_legacy_batchedtensor(grad) or is_functorch_wrapped_tensor(grad)):
        raise NotImplementedError(
            "grad_outputs: expected a tensor outside torch.func's transforms (vmap, "
            "is_grads_batched, jacobian's vectorize, …); got one inside. A call of "
            "torch.autograd.grad per vector does the same"
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

    # Forward and setup_context apart would have PyTorch bind the arguments at every call.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """First derivatives only: a Function's backward whose kernels autograd cannot see into."""

    @wraps(backward)
    def wrapper(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not is_compiling():  # a compiler traces no check
            for grad in grads:
                _check_unbatched(grad)
        if not torch.is_grad_enabled():  # as ever, but for create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return derivatives.only_first(results, *ctx.saved_tensors, *grads)

    return wrapper
