"""The error budget: how far a kernel may be from the truth, derived and never chosen.

The truth is the reference evaluated in float64 on the very inputs of the kernel. The largest error
of a kernel may be at most twice that of the same maths in eager PyTorch in the kernel's dtype,
plus one rounding of the largest true value to that dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gqa_kernels.spec import Case, OpSpec


class Measured(NamedTuple):
    """The largest error of one output or gradient, and what it may be."""

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
    error = (actual[finite].double() - truth).abs().max().item()
    eager_error = (eager[finite].double() - truth).abs().max().item()
    rounding = 0.5 * torch.finfo(actual.dtype).eps * truth.abs().max().item()
    return Measured(what, error, 2.0 * eager_error + rounding)


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
