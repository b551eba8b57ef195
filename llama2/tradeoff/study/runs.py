"""Reading the result of a study: is it whole, and which runs belong together."""

import math
from typing import Any

from llama2.accounting import MATCHINGS
from llama2.tradeoff.study.result_form import AMOUNT, SHARE, check_entry, check_form

Run = dict[str, Any]
Runs = dict[int, Run]  # by seed

_KEY = ("origin", "num_kv_heads", "matching", "method", "alpha", "seed")


def check(results: dict[str, Any]) -> None:
    """Refuses a result from which no honest page can be made.

    Raises:
        ValueError: it is not a study, or not of its form (`check_form`); a figure is not finite
            or out of range; heads, origin, method and alpha of a run do not fit together;
            the bits of a run are not one per held-out file, or do not add up to its bits per byte;
            a run is there twice; MHA from scratch, to which all else is compared, is missing.
    """
    if not isinstance(results, dict) or results.get("kind") != "study":
        kind = results.get("kind") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"kind: expected 'study'; got {kind!r}")
    check_form(results)
    files = results["corpus"]["held_out"]["files"]
    num_bytes = sum(file["bytes"] for file in files)
    if results["corpus"]["held_out"]["bytes"] != num_bytes:
        raise ValueError(
            f"corpus.held_out.bytes: expected the sum over its files, {num_bytes}; "
            f"got {results['corpus']['held_out']['bytes']}"
        )
    for task, chance in results["recall_chance"].items():
        check_entry(f"recall_chance.{task}", chance, SHARE)
    num_q_heads = results["base"]["num_q_heads"]
    seen = set()
    for index, run in enumerate(results["runs"]):
        name = f"runs[{index}]"
        if num_q_heads % run["num_kv_heads"]:
            raise ValueError(
                f"{name}.num_kv_heads: expected a divisor of base.num_q_heads ({num_q_heads}); "
                f"got {run['num_kv_heads']}"
            )
        for field, origins in (("method", ("converted",)), ("alpha", ("control", "converted"))):
            if (run[field] is not None) != (run["origin"] in origins):
                raise ValueError(
                    f"{name}.{field}: expected one for {' and '.join(origins)} runs alone; "
                    f"got {run[field]!r} for {run['origin']}"
                )
        if run["recall"].keys() != results["recall_chance"].keys():
            raise ValueError(
                f"{name}.recall: expected {sorted(results['recall_chance'])}, which have a chance "
                f"level; got {sorted(run['recall'])}"
            )
        for task, share in run["recall"].items():
            check_entry(f"{name}.recall.{task}", share, SHARE)
        if len(run["bits"]) != len(files):
            raise ValueError(
                f"{name}.bits: expected {len(files)}, one per held-out file; got {len(run['bits'])}"
            )
        for file, bits in zip(files, run["bits"], strict=True):
            check_entry(f"{name}.bits of {file['path']!r}", bits, AMOUNT)
        # Sums of the same floats in another order; a stale or edited file is off by far more.
        if not math.isclose(sum(run["bits"]) / num_bytes, run["bits_per_byte"], rel_tol=1e-6):
            raise ValueError(
                f"{name}.bits_per_byte: expected the sum of its bits over {num_bytes} bytes, "
                f"{sum(run['bits']) / num_bytes}; got {run['bits_per_byte']}"
            )
        key = tuple(run[field] for field in _KEY)
        if key in seen:
            raise ValueError(f"{name}: expected another run of {_KEY}; got {key} again")
        seen.add(key)
    if not mha(results):
        raise ValueError("runs: expected MHA from scratch among them; got none")


def select(results: dict[str, Any], **fields: object) -> Runs:
    """The runs in which every one of `fields` has the given value, by seed."""
    found = [
        run
        for run in results["runs"]
        if all(run[field] == value for field, value in fields.items())
    ]
    return {run["seed"]: run for run in sorted(found, key=lambda run: run["seed"])}


def mha(results: dict[str, Any]) -> Runs:
    """MHA from scratch: the base of all conversions."""
    return scratch(results, results["base"]["num_q_heads"], "same_ffn")


def scratch(results: dict[str, Any], num_kv_heads: int, matching: str) -> Runs:
    return select(results, origin="scratch", num_kv_heads=num_kv_heads, matching=matching)


def converted(results: dict[str, Any], num_kv_heads: int, method: str, alpha: float) -> Runs:
    return select(
        results, origin="converted", num_kv_heads=num_kv_heads, method=method, alpha=alpha
    )


def control(results: dict[str, Any], alpha: float) -> Runs:
    """MHA trained on for as long as the conversions of `alpha`; for 0 that is MHA itself."""
    return select(results, origin="control", alpha=alpha) or ({} if alpha else mha(results))


def fewer_heads(results: dict[str, Any], origin: str) -> list[int]:
    """The counts below MHA that runs of `origin` have, from many to few."""
    full = results["base"]["num_q_heads"]
    counts = {run["num_kv_heads"] for run in results["runs"] if run["origin"] == origin}
    return sorted(counts - {full}, reverse=True)


def matchings(results: dict[str, Any]) -> list[str]:
    """How the models from scratch with fewer heads were matched to MHA."""
    full = results["base"]["num_q_heads"]
    found = {
        run["matching"]
        for run in results["runs"]
        if run["origin"] == "scratch" and run["num_kv_heads"] < full
    }
    return [matching for matching in MATCHINGS if matching in found]


def methods(results: dict[str, Any], num_kv_heads: int | None = None) -> list[str]:
    """The ways of conversion, to any or to one number of heads, in the order in which they ran."""
    found = (
        run["method"]
        for run in results["runs"]
        if run["origin"] == "converted" and num_kv_heads in (None, run["num_kv_heads"])
    )
    return list(dict.fromkeys(found))


def alphas(results: dict[str, Any]) -> list[float]:
    return sorted({run["alpha"] for run in results["runs"] if run["origin"] == "converted"})


def tasks(results: dict[str, Any]) -> list[str]:
    """The recall tasks, in the order of their chance levels."""
    return list(results["recall_chance"])


def values(runs: Runs, field: str = "bits_per_byte") -> dict[int, float]:
    return {seed: run[field] for seed, run in runs.items()}


def recall(runs: Runs, task: str) -> list[float]:
    return [run["recall"][task] for run in runs.values()]
