"""Backends of the benchmarks, and how a workload becomes a call of one.

An adapter takes a workload's inputs, does what a user would do once (masks, layouts, compiling),
and returns a function without arguments that computes the outputs, in the op table's layout. The
function is differentiable if the backend is; this module builds the backward call, in the same way
for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ceilings import version
from timing import Call
from torch import Tensor

Adapter = Callable[[dict[str, Any]], Call]
# Losses whose gradients some backends compute in the forward pass: both passes are timed as one
# call, a "step", instead of the backward pass alone.
STEPS = frozenset({"linear_cross_entropy"})
# Ops that return nothing, and the arguments to which they write: they get copies, which are the
# results.
UPDATES = {"adamw_update": ("weight", "exp_avg", "exp_avg_sq", "copy")}


class Lacks(Exception):
    """A backend does not support a workload; the message says why."""


def plain_cache(inputs: dict[str, Any]) -> None:
    """Raises Lacks for a paged or 8-bit cache."""
    if "k_scale" in inputs:
        raise Lacks("takes no 8-bit cache with 16-bit queries and scales per head or token")
    if "block_table" in inputs:
        raise Lacks("is called here on contiguous caches only")


@dataclass(frozen=True)
class Backend:
    """One contender.

    Attributes:
        adapters: by op.
        import_check: imports what the backend needs; None for backends that come with PyTorch.
        distribution: the package whose version is reported.
        forward_only: ops without a backward pass, with the reason.
        coarse: ops that round their sums after every chunk of tokens, with a note on their results;
            their error budget is that of eager code that does the same.
        writes_inputs: ops that overwrite their inputs; they get copies.
        on_request: whether it runs only where --bench-backends names it.
        ours: whether a failure is a failure of this package, and not a row about a peer.
    """

    name: str
    adapters: dict[str, Adapter]
    import_check: Callable[[], Any] | None = None
    distribution: str = "torch"
    forward_only: dict[str, str] = field(default_factory=dict)
    coarse: dict[str, str] = field(default_factory=dict)
    writes_inputs: frozenset[str] = frozenset()
    ours: bool = False
    on_request: bool = False

    def available(self) -> str | None:
        """Why this backend cannot run here, or None."""
        if self.import_check is None:
            return None
        try:
            self.import_check()
        except Exception as error:  # a package built for another CUDA may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"{self.distribution} not usable ({reason:.120})"
        return None

    def lacks(self, op: str, pass_: str) -> str | None:
        """Why this backend has no call for an op and pass, or None."""
        if op not in self.adapters:
            return f"{self.name} has no {op}"
        if pass_ != "fwd" and op in self.forward_only:
            return self.forward_only[op]
        return None

    @property
    def version(self) -> str | None:
        return version(self.distribution)


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def make_call(
    backend: Backend,
    op: str,
    pass_: str,
    inputs: dict[str, Any],
    wrt: tuple[str, ...],
    cotangents: tuple[Tensor, ...],
) -> Call:
    """Returns the call that is checked and timed. It returns the outputs, the gradients of `wrt`,
    or both in a step.

    A backward call differentiates the same forward pass repeatedly, so its forward pass is not
    timed; it gets copies of the cotangents, since some backends write to them. A step is a forward
    and a backward pass of a loss, with a cotangent of 1.
    """
    if op in UPDATES:
        inputs = inputs | {name: inputs[name].clone() for name in UPDATES[op]}
        update, written = backend.adapters[op](inputs), tuple(inputs[n] for n in UPDATES[op])
        return lambda: (update(), written)[1]
    if op in backend.writes_inputs:
        inputs = {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    if pass_ == "fwd":
        forward = backend.adapters[op](inputs)
        return lambda: outputs_of(forward())
    leaves = {n: x.detach().requires_grad_() if n in wrt else x for n, x in inputs.items()}
    wanted = [leaves[name] for name in wrt]
    with torch.enable_grad():  # an adapter may take views
        forward = backend.adapters[op](leaves)

    def recorded() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return outputs_of(forward())

    def step() -> tuple[Tensor, ...]:
        outputs = recorded()
        return (*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted))

    if pass_ == "step":
        return step
    outputs = recorded()
    own = [c.to(o.dtype, copy=True) for c, o in zip(cotangents, outputs, strict=True)]
    return lambda: torch.autograd.grad(outputs, wanted, own, retain_graph=True)
