"""The error budget: how far a kernel may be from the truth, derived and never chosen.

The truth is the reference evaluated in float64 on the very inputs of the kernel. The error of a
kernel may be at most twice that of the same maths in eager PyTorch in the kernel's dtype, plus one
rounding of the true value to that dtype. In 16 bits that is said of the largest error, which is a
rounding. In float32 an error is a sum of many roundings, and the largest of them a chance that
differs between two machines by more than a factor of two: there it is said of the root mean square,
and the largest may be twice as much again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gqa_kernels.spec import Case, OpSpec


class Measured(NamedTuple):
    """The error of one output or gradient, and what it may be."""

    what: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.3g}, budget {self.budget:.3g}"


def _special_values(x: Tensor) -> Tensor:
    return torch.stack([x.isnan(), x == torch.inf, x == -torch.inf])


def compare(what: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> Measured:
    """The error of `actual` and its budget, given eager's result and the float64 `oracle`.

    Where the oracle is NaN or infinite `actual` must be the same; else the error is infinite.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"{what}: expected shape {list(oracle.shape)}; got {list(actual.shape)}")
    if not torch.equal(_special_values(actual), _special_values(oracle)):
        return Measured(what, float("inf"), 0.0)
    finite = oracle.isfinite()
    if not finite.any():
        return Measured(what, 0.0, 0.0)
    truth = oracle[finite]
    error, eager_error = (x[finite].double() - truth for x in (actual, eager))
    rounding = 0.5 * torch.finfo(actual.dtype).eps

    def measured(size: Callable[[Tensor], float]) -> Measured:
        return Measured(what, size(error), 2.0 * size(eager_error) + rounding * size(truth))

    largest = measured(lambda x: x.abs().max().item())
    if actual.dtype != torch.float32:
        return largest
    allowed = largest._replace(budget=2.0 * largest.budget)
    return measured(lambda x: x.square().mean().sqrt().item()) if allowed.ok else allowed


def run(
    function: Callable[..., Any], inputs: dict[str, Any], wrt: tuple[str, ...], seed: int = 0
) -> dict[str, Tensor]:
    """The outputs of a call and the gradients of the arguments `wrt`, by name.

    The gradients' cotangents are drawn from `seed` in float32 and rounded to each output's dtype.
    """
    inputs = {
        name: value.detach().requires_grad_() if name in wrt else value
        for name, value in inputs.items()
    }
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if wrt:
        generator = torch.Generator().manual_seed(seed)
        cotangents = [
            torch.randn(output.shape, generator=generator).to(output) for output in outputs
        ]
        grads = torch.autograd.grad(outputs, [inputs[name] for name in wrt], cotangents)
        results |= {f"d {name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return results


def widen(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def measure_call(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] = (),
) -> list[Measured]:
    """Every output and gradient of `kernel` on these inputs, with its error and budget."""
    actual = run(kernel, inputs, wrt)
    eager = run(reference, inputs, wrt)
    oracle = run(reference, widen(inputs), wrt)
    return [compare(what, actual[what], eager[what], oracle[what]) for what in oracle]


def measure(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Measured]:
    """`measure_call` of an op of the table on inputs drawn for a case."""
    generator = torch.Generator().manual_seed(seed)
    inputs = spec.make_inputs(case, dtype, device, generator)
    return measure_call(spec.kernel, spec.reference, inputs, spec.wrt)
