"""The error budget: the largest error that a kernel may have. It is derived, not chosen.

The exact result is the reference evaluated in float64 on the kernel's inputs. The error of a kernel
may be at most twice that of the same maths in eager PyTorch in the kernel's dtype, plus one
rounding of the exact result to that dtype. This applies to the root mean square of the errors of an
output or gradient and to the largest error. In float32, where an error is a sum of many roundings
and the largest error depends on chance, the limit of the largest error is doubled.

The error of eager PyTorch in one run depends on the processor, which determines the order of sums,
and on chance: all roundings of a few numbers may happen to be small. So the error of eager code is
computed

- with sums in one order on every machine (`summation.tile_by_tile`), whose errors are larger than
  those of PyTorch's own order, like those of a kernel may be, and
- as the largest error of several draws: enough to give the smallest output 128 values in total, at
  least 2 and at most 32. If tokens repeat, their results have equal errors, so each distinct token
  counts as one value. The first draw has the kernel's own inputs. In every further draw, each
  number of the inputs and of the cotangents is smaller by up to 1/64 (equal numbers by the same
  factor), sums are taken in an order drawn from a fixed seed, and the exact result is computed from
  these inputs: a problem of the same size with different roundings.

A kernel with the accuracy of eager code therefore exceeds its budget only if its error is more than
twice the largest error of the draws.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from gqa_kernels.spec import Case, OpSpec
from gqa_kernels.summation import LOW_PRECISION, tile_by_tile

_ENOUGH_VALUES = 128
_MOST_DRAWS = 32

Results = dict[str, Tensor]


class Measured(NamedTuple):
    """The error of one output or gradient, and its budget."""

    what: str
    error: float
    budget: float
    dtype: torch.dtype | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The share of the budget that is used; infinite for NaN, or for an error with a budget of
        0."""
        if self.ok:
            return self.error / self.budget if self.budget else 0.0
        return self.error / self.budget if self.error > self.budget > 0 else math.inf

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.3g}, budget {self.budget:.3g}"


def _special_values(x: Tensor) -> Tensor:
    return torch.stack([x.isnan(), x == torch.inf, x == -torch.inf])


def _sizes(x: Tensor) -> tuple[float, float]:
    """(largest absolute value, root mean square); 0 if there are no elements."""
    return (x.abs().max().item(), x.square().mean().sqrt().item()) if x.numel() else (0.0, 0.0)


def _error(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    """`_sizes` of actual − oracle where both are finite."""
    both = oracle.isfinite() & actual.isfinite()
    return _sizes(actual[both].double() - oracle[both])


def compare(
    what: str,
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *further: tuple[Tensor, Tensor],
) -> Measured:
    """Returns the error of `actual` and its budget, given eager's result and the float64 `oracle`.

    Of the largest error and the root mean square, it returns the one that uses more of its budget.
    Where `actual` or the oracle is NaN or infinite, the other must be the same; otherwise the error
    is infinite. Where only eager's result is NaN or infinite, it does not extend the budget.

    Integers are not rounded and must equal the oracle's: the error is the number of differences.

    Args:
        further: (eager, oracle) of each further draw.
    Raises:
        ValueError: the shapes differ.
        TypeError: actual and eager differ in dtype, or are floating and the oracle is not float64.
    """
    if not actual.shape == oracle.shape == eager.shape:
        shapes = " and ".join(str(list(x.shape)) for x in (actual, eager))
        raise ValueError(f"{what}: expected shape {list(oracle.shape)}; got {shapes}")
    if not actual.is_floating_point() and actual.dtype == eager.dtype:
        return Measured(what, float((actual != oracle).sum()), 0.0, actual.dtype)
    if oracle.dtype != torch.float64:
        raise TypeError(f"{what}: expected a float64 oracle; got {oracle.dtype}")
    if actual.dtype != eager.dtype or not actual.is_floating_point():
        raise TypeError(
            f"{what}: expected eager's floating dtype {eager.dtype}; got {actual.dtype}"
        )
    if not torch.equal(_special_values(actual), _special_values(oracle)):
        return Measured(what, math.inf, 0.0, actual.dtype)
    draws = [_error(*draw) for draw in ((eager, oracle), *further)]
    rounding = 0.5 * torch.finfo(actual.dtype).eps
    truth = _sizes(oracle[oracle.isfinite()].double())
    largest, mean = (
        2.0 * max(errors) + rounding * size
        for errors, size in zip(zip(*draws, strict=True), truth, strict=True)
    )
    if actual.dtype == torch.float32:
        largest *= 2.0
    measured = [
        Measured(what, error, budget, actual.dtype)
        for error, budget in zip(_error(actual, oracle), (largest, mean), strict=True)
    ]
    return max(measured, key=lambda m: m.share)


def cotangents(outputs: Results, seed: int = 0) -> list[Tensor]:
    """Returns standard normal numbers in the shapes and dtypes of outputs, the same on every
    machine."""
    numbers = numpy.random.default_rng(seed)
    drawn = [torch.from_numpy(numbers.standard_normal(x.shape)) for x in outputs.values()]
    return [x.to(output) for x, output in zip(drawn, outputs.values(), strict=True)]


def run(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...],
    seed: int = 0,
    like: Results | None = None,
    directions: list[Tensor] | None = None,
) -> Results:
    """Returns the outputs of a call, "output 0", …, and the gradients of the arguments `wrt`,
    "d x", ….

    The cotangents of the outputs are `directions`. If these are None, `run` draws them from `seed`
    and rounds them to the dtypes of the outputs, or to those of the outputs in `like`: an oracle
    needs the same cotangents as the call that it checks.

    Args:
        function: returns a tensor or a tuple of tensors.
    """
    inputs = {
        name: value.detach().requires_grad_() if name in wrt else value
        for name, value in inputs.items()
    }
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if wrt:
        if directions is None:
            directions = cotangents({name: (like or results)[name] for name in results}, seed)
        directions = [x.to(output) for x, output in zip(directions, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [inputs[name] for name in wrt], directions)
        results |= {f"d {name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return results


def widen(inputs: Any) -> Any:
    """Returns nested inputs with every floating tensor converted to float64."""
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def _floating(inputs: Any) -> list[Tensor]:
    """Returns the floating tensors of nested inputs."""
    leaves = tree_leaves(inputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.dtype in LOW_PRECISION]


def _near(inputs: Any, generator: torch.Generator) -> Any:
    """Returns inputs with each floating number reduced by up to 1/64, independently; equal numbers
    and shared tensors stay equal."""

    def smaller(x: Tensor) -> Tensor:
        if x.dtype not in LOW_PRECISION:
            return x
        numbers, place = x.double().unique(return_inverse=True)
        share = torch.rand(numbers.shape, generator=generator, device="cpu", dtype=torch.float64)
        return (numbers * (1.0 - share.to(x.device) / 64))[place].to(x.dtype)

    return tree_map_only(Tensor, smaller, inputs)


def _different_tokens(inputs: Any) -> int | None:
    """The number of distinct rows in the input whose rows repeat most; None if no input repeats at
    least half of its rows."""
    fewest = None
    for x in _floating(inputs):
        if x.dim() > 1 and x.numel():
            rows = x.nan_to_num().reshape(-1, x.shape[-1])  # all NaN count as equal
            different = len(rows.unique(dim=0))
            if 2 * different <= len(rows):
                fewest = min(different, fewest or different)
    return fewest


def draw(
    evaluate: Callable[[Any], Results],
    inputs: Any,
    oracle: Callable[[Any], Results] | None = None,
) -> list[tuple[Results, Results]]:
    """Returns pairs (eager, oracle) of results, as many as the smallest result needs; the first
    pair is for `inputs` themselves.

    Args:
        evaluate: the reference as a function of its inputs only.
        inputs: nested containers of tensors and other values.
        oracle: computes the exact result from inputs in float64; None means `evaluate`.
    """
    oracle = oracle or evaluate
    generator = torch.Generator().manual_seed(0)
    tokens = _different_tokens(inputs)
    draws = []
    count = 2
    while len(draws) < count:
        given = _near(inputs, generator) if draws else inputs
        # Fused attention hides its sums; the MATH backend consists of sums that this mode replaces.
        with tile_by_tile(generator if draws else None), sdpa_kernel(SDPBackend.MATH):
            eager = evaluate(given)
        draws.append((eager, oracle(widen(given))))
        smallest = min((x.numel() for x in eager.values() if x.numel()), default=_ENOUGH_VALUES)
        smallest = min(smallest, tokens or smallest)
        count = min(_MOST_DRAWS, max(2, -(-_ENOUGH_VALUES // smallest)))
    return draws


def measure_call(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] = (),
    oracle: Callable[..., Any] | None = None,
    seed: int = 0,
) -> list[Measured]:
    """Returns every output and gradient of `kernel` on these inputs, with its error and budget.

    Each draw varies the cotangents too. Otherwise all draws of a gradient that depends on few
    numbers (the loss of equal tokens) would have the same roundings.

    Args:
        oracle: computes the exact result in float64, if `reference` cannot.
        seed: that of the cotangents.
    """

    actual = run(kernel, inputs, wrt, seed)
    outputs = {name: x for name, x in actual.items() if name.startswith("output ")}
    given = {"inputs": inputs, "cotangents": cotangents(outputs, seed) if wrt else []}

    def results_of(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Results]:
        return lambda given: run(
            function, given["inputs"], wrt, directions=given["cotangents"] if wrt else None
        )

    draws = draw(results_of(reference), given, results_of(oracle or reference))
    return measure_results(actual, draws)


def measure_results(actual: Results, draws: list[tuple[Results, Results]]) -> list[Measured]:
    """Compares results, by name, with the draws of `draw`.

    Raises:
        ValueError: the names are not those of the draws.
    """
    measured, expected = [], draws[0][0].keys()
    if actual.keys() != expected:
        raise ValueError(f"actual: expected {sorted(expected)}; got {sorted(actual)}")
    for what, value in actual.items():
        first, *further = [(eager[what], oracle[what]) for eager, oracle in draws]
        measured.append(compare(what, value, *first, *further))
    return measured


def measure(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Measured]:
    """Runs `measure_call` for an op of the table with inputs and cotangents drawn for a case."""
    generator = torch.Generator().manual_seed(seed)
    inputs = spec.make_inputs(case, dtype, device, generator)
    return measure_call(spec.kernel, spec.reference, inputs, spec.wrt, seed=seed)
