"""Assertions on the error budget of `gqa_kernels.accuracy`, and the seed of all drawn inputs.

TEST_SEED=3 in the environment draws all inputs anew; BUDGET_REPORT=FILE appends a line of JSON for
every error that is measured.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gqa_kernels import accuracy
from gqa_kernels.accuracy import Measured

SEED = int(os.environ.get("TEST_SEED", "0"))
Results = Tensor | dict[str, Tensor] | Iterable[Tensor]


def assert_ok(measured: list[Measured]) -> None:
    """Every error is within its budget, and there is one."""
    if report := os.environ.get("BUDGET_REPORT"):
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
        lines = [
            json.dumps({"test": test, "what": m.what, "dtype": str(m.dtype), "share": m.share})
            for m in measured
        ]
        with open(report, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    assert measured
    assert all(m.ok for m in measured), "; ".join(str(m) for m in measured if not m.ok)


def assert_call(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] = (),
    oracle: Callable[..., Any] | None = None,
) -> None:
    """Outputs and gradients of a kernel, within the budget of its reference.

    Args:
        oracle: gives the truth in float64, if `reference` does not.
    """
    assert_ok(accuracy.measure_call(kernel, reference, inputs, wrt, oracle))


def assert_calls(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    calls: Iterable[dict[str, Any]],
    wrt: tuple[str, ...] = (),
) -> None:
    """One budget for the results of all calls together, where one alone may leave eager without an
    error: the gradient of a softmax of a single key is exactly 0."""
    calls = list(calls)

    def joined(function: Callable[..., Any]) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        def evaluate(calls: list[dict[str, Any]]) -> dict[str, Tensor]:
            results = [accuracy.run(function, call, wrt) for call in calls]
            return {what: torch.cat([r[what].flatten() for r in results]) for what in results[0]}

        return evaluate

    assert_results(joined(kernel)(calls), joined(reference), calls)


def assert_results(
    actual: dict[str, Tensor],
    evaluate: Callable[[Any], dict[str, Tensor]],
    inputs: Any,
    oracle: Callable[[Any], dict[str, Tensor]] | None = None,
) -> None:
    """What was computed from `inputs` in any way, against `evaluate` of them (`accuracy.draw`)."""
    assert_ok(accuracy.measure_results(actual, accuracy.draw(evaluate, inputs, oracle)))


def assert_network(
    ours: Results,
    module: nn.Module,
    eager: Callable[[nn.Module], Results],
    oracle: Callable[[nn.Module], Results],
) -> None:
    """A network's result or results, such as logits or gradients by name.

    Args:
        module: has the weights that `ours` were computed with, in the same dtype.
        eager: computes the results from `module`, or from a copy with other weights.
        oracle: the same in float64, from the same weights.
    """

    def of_weights(function: Callable[[nn.Module], Results]) -> Callable[..., dict[str, Tensor]]:
        def evaluate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            model = copy.deepcopy(module)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
            return _named(function(model))

        return evaluate

    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert_results(_named(ours), of_weights(eager), weights, of_weights(oracle))


def _named(results: Results) -> dict[str, Tensor]:
    """Results by name; the gradient of a bias beside its weight's, as one more column: the few
    numbers of a bias are sums over all tokens, of which little may be left."""
    if isinstance(results, Tensor):
        results = (results,)
    if not isinstance(results, dict):
        results = {f"result {i}": x for i, x in enumerate(results)}
    results = {name: x.detach() for name, x in results.items()}
    for bias in [name for name in results if name.endswith(".bias")]:
        weight = bias.removesuffix("bias") + "weight"
        results[weight] = torch.cat([results[weight], results.pop(bias)[:, None]], dim=1)
    return results
