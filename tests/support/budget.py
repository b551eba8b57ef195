"""Assertions on the error budget of `gqa_kernels.accuracy`, and the seed of their inputs.

`test_ops.py` measures the small cases of all ops of the table. For other tests:

    assert_call(kernel, reference, inputs, wrt)       one call, on special inputs
    assert_calls(kernel, reference, calls, wrt)       several calls with one budget
    assert_results(actual, evaluate, inputs)          results that were computed in another way
    assert_network(ours, module, eager, oracle)       a network with its weights

TEST_SEED=3 in the environment changes the seed of the inputs of these tests; BUDGET_REPORT=FILE
appends a line of JSON for every error that is measured.
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
NetworkResults = Tensor | dict[str, Tensor] | Iterable[Tensor]


def assert_ok(measured: list[Measured]) -> None:
    """Fails if an error exceeds its budget, or if nothing was measured."""
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
    """Asserts that outputs and gradients of a kernel are within the budget of its reference.

    Args:
        oracle: computes the exact result in float64, if `reference` cannot.
    """
    assert_ok(accuracy.measure_call(kernel, reference, inputs, wrt, oracle, seed=SEED))


def assert_calls(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    calls: Iterable[dict[str, Any]],
    wrt: tuple[str, ...] = (),
) -> None:
    """Asserts one budget for the results of all calls together, which have equal sizes.

    Use it for calls in which eager code may have no error at all: the gradient of a softmax over a
    single key is 0.
    """
    calls = list(calls)
    actual = [accuracy.run(kernel, call, wrt, SEED) for call in calls]

    def joined(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        shapes = [[x.shape for x in r.values()] for r in results]
        assert shapes == [[x.shape for x in r.values()] for r in actual]
        return {what: torch.cat([r[what].flatten() for r in results]) for what in results[0]}

    def evaluate(calls: list[dict[str, Any]]) -> dict[str, Tensor]:
        return joined(
            [
                accuracy.run(reference, call, wrt, SEED, like)
                for call, like in zip(calls, actual, strict=True)
            ]
        )

    assert_results(joined(actual), evaluate, calls)


def assert_results(
    actual: dict[str, Tensor],
    evaluate: Callable[[Any], dict[str, Tensor]],
    inputs: Any,
    oracle: Callable[[Any], dict[str, Tensor]] | None = None,
) -> None:
    """Asserts that results by name, however they were computed from `inputs`, are within the budget
    of `evaluate`.

    Args:
        evaluate, inputs, oracle: as in `accuracy.draw`; `evaluate` also runs on inputs near these.
    """
    assert_ok(accuracy.measure_results(actual, accuracy.draw(evaluate, inputs, oracle)))


def assert_network(
    ours: NetworkResults,
    module: nn.Module,
    eager: Callable[[nn.Module], NetworkResults],
    oracle: Callable[[nn.Module], NetworkResults],
) -> None:
    """Asserts that results of a network, such as logits or gradients by name, are within budget.

    Args:
        module: has the weights with which `ours` were computed, in the same dtype.
        eager: computes the results from a copy of `module`; only its weights vary between draws.
        oracle: gets such a copy too, in the dtype of `module`, and computes in float64: it has to
            convert the copy and all other inputs.
    """

    def of_weights(
        function: Callable[[nn.Module], NetworkResults],
    ) -> Callable[..., dict[str, Tensor]]:
        def evaluate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            model = copy.deepcopy(module)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
            return _named(function(model))

        return evaluate

    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert_results(_named(ours), of_weights(eager), weights, of_weights(oracle))


def _named(results: NetworkResults) -> dict[str, Tensor]:
    """Results by name. The gradient of a projection's bias becomes one more column of that of its
    weight, because it has few numbers and, as a sum over all tokens, may nearly cancel."""
    if isinstance(results, Tensor):
        results = (results,)
    if not isinstance(results, dict):
        results = {f"result {i}": x for i, x in enumerate(results)}
    results = {name: x.detach() for name, x in results.items()}
    for bias in [name for name in results if name.endswith(".bias")]:
        weight = results.get(name := bias.removesuffix("bias") + "weight")
        if weight is not None and weight.dim() == 2:
            results[name] = torch.cat([weight, results.pop(bias)[:, None]], dim=1)
    return results
