"""Checks the result of a study, and selects runs from it."""

import math
from typing import Any

from llama2.tradeoff.study.result_form import SHARE, check_entry, check_form

Run = dict[str, Any]
Runs = dict[int, Run]  # by seed

MAIN = "main"  # the arm of the primary comparisons
_KEY = ("part", "arm", "num_kv_heads", "method", "alpha", "seed")


def check(results: dict[str, Any]) -> None:
    """Checks that a result is complete and consistent.

    Raises:
        ValueError: it is not a study, or not of its form (`check_form`); a figure is not finite
            or out of range; part, arm, heads, method and alpha of a run do not fit together;
            the bits of a run are not one per held-out file, or do not add up to its bits per byte;
            an accuracy is not the mean over numbers of items; a run occurs twice; the language
            models of MHA from scratch are missing, or those of an arm of "records" that has runs.
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
    seen = set()
    for index, run in enumerate(results["runs"]):
        name = f"runs[{index}]"
        _check_kind(results, name, run)
        if run["part"] == "records":
            _check_accuracy(name, run)
        else:
            _check_bits(name, run, len(files), num_bytes)
        key = tuple(run[field] for field in _KEY)
        if key in seen:
            raise ValueError(f"{name}: expected another run of {_KEY}; got {key} again")
        seen.add(key)
    if not mha(results):
        raise ValueError("runs: expected MHA from scratch among them; got none")
    for arm in arms(results):
        if not records(results, arm["name"]):
            raise ValueError(
                f"runs: expected MHA among those of the arm {arm['name']!r} of records; got none"
            )


def _check_kind(results: dict[str, Any], name: str, run: Run) -> None:
    most = {
        "records": results["records"]["shape"]["num_q_heads"],
        "shipped": results["shipped"]["model"]["num_q_heads"],
    }.get(run["part"], results["text"]["base"]["num_q_heads"])
    if most % run["num_kv_heads"]:
        raise ValueError(
            f"{name}.num_kv_heads: expected a divisor of the {most} query heads; "
            f"got {run['num_kv_heads']}"
        )
    arms = [arm["name"] for arm in results["records"]["arms"]]
    allowed = arms if run["part"] == "records" else [None]
    if run["arm"] not in allowed:
        raise ValueError(
            f"{name}.arm: expected one of {allowed} for {run['part']}; got {run['arm']!r}"
        )
    kind = run["method"] is not None, run["alpha"] is not None
    kinds = {"conversion": [(False, True), (True, True)], "shipped": [(False, False)]}
    kinds["shipped"] += kinds["conversion"]
    if kind not in kinds.get(run["part"], [(False, False)]):
        raise ValueError(
            f"{name}: expected method and alpha of a {run['part']} run; "
            f"got {run['method']!r} and {run['alpha']!r}"
        )


def _check_accuracy(name: str, run: Run) -> None:
    for items, share in run["accuracy_by_items"].items():
        check_entry(f"{name}.accuracy_by_items.{items}", share, SHARE)
    shares = run["accuracy_by_items"].values()
    mean = sum(shares) / len(shares) if shares else math.nan
    if not math.isclose(mean, run["accuracy"], rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"{name}.accuracy: expected the mean over numbers of items, {mean}; "
            f"got {run['accuracy']}"
        )


def _check_bits(name: str, run: Run, num_files: int, num_bytes: int) -> None:
    if len(run["bits"]) != num_files:
        raise ValueError(
            f"{name}.bits: expected {num_files}, one per held-out file; got {len(run['bits'])}"
        )
    # Sums of the same floats in another order; a stale or edited file is off by far more.
    if not math.isclose(sum(run["bits"]) / num_bytes, run["bits_per_byte"], rel_tol=1e-6):
        raise ValueError(
            f"{name}.bits_per_byte: expected the sum of its bits over {num_bytes} bytes, "
            f"{sum(run['bits']) / num_bytes}; got {run['bits_per_byte']}"
        )


def select(results: dict[str, Any], **fields: object) -> Runs:
    """Returns, by seed, the runs whose `fields` have the given values."""
    found = [
        run
        for run in results["runs"]
        if all(run[field] == value for field, value in fields.items())
    ]
    return {run["seed"]: run for run in sorted(found, key=lambda run: run["seed"])}


def text(results: dict[str, Any], num_kv_heads: int) -> Runs:
    """Returns the language models from scratch with `num_kv_heads`."""
    return select(results, part="text", num_kv_heads=num_kv_heads)


def mha(results: dict[str, Any]) -> Runs:
    """Returns the language models of MHA from scratch, the bases of all conversions."""
    return text(results, results["text"]["base"]["num_q_heads"])


def records(results: dict[str, Any], arm: str, num_kv_heads: int | None = None) -> Runs:
    """Returns the models of an arm of "records" with `num_kv_heads`; None means MHA."""
    full = results["records"]["shape"]["num_q_heads"]
    return select(results, part="records", arm=arm, num_kv_heads=num_kv_heads or full)


def converted(results: dict[str, Any], num_kv_heads: int, method: str, alpha: float) -> Runs:
    """Returns the converted language models that trained on for `alpha`."""
    return select(results, part="conversion", num_kv_heads=num_kv_heads, method=method, alpha=alpha)


def control(results: dict[str, Any], alpha: float) -> Runs:
    """Returns MHA that trained on for as long as the conversions of `alpha`; for 0, MHA itself."""
    found = select(results, part="conversion", method=None, alpha=alpha)
    return found or ({} if alpha else mha(results))


def shipped(results: dict[str, Any], num_kv_heads: int, alpha: float) -> Run | None:
    """Returns the run of the shipped model with `num_kv_heads` that trained on for `alpha`: a
    conversion, unless the model itself has as many. None if there is no such run."""
    original = results["shipped"]["model"]["num_kv_heads"]
    runs = [
        run
        for run in results["runs"]
        if run["part"] == "shipped"
        and run["num_kv_heads"] == num_kv_heads
        and (run["alpha"] or 0) == alpha
        and (run["method"] is None) == (num_kv_heads == original)
    ]
    return runs[0] if runs else None


def fewer_heads(results: dict[str, Any], part: str, arm: str | None = None) -> list[int]:
    """Returns the numbers of key/value heads of a part's runs, most first, without MHA's; for
    "shipped" without the model's own."""
    found = [run for run in results["runs"] if run["part"] == part and run["arm"] == arm]
    counts = {run["num_kv_heads"] for run in found}
    full = {
        "records": results["records"]["shape"]["num_q_heads"],
        "shipped": results["shipped"]["model"]["num_kv_heads"],
    }.get(part, results["text"]["base"]["num_q_heads"])
    return sorted(counts - {full}, reverse=True)


def methods(results: dict[str, Any], num_kv_heads: int | None = None) -> list[str]:
    """Returns the methods of conversion, to any or to one number of heads, in run order."""
    found = (
        run["method"]
        for run in results["runs"]
        if run["part"] == "conversion" and num_kv_heads in (None, run["num_kv_heads"])
    )
    return [method for method in dict.fromkeys(found) if method is not None]


def alphas(results: dict[str, Any]) -> list[float]:
    """Returns the shares alpha of the converted models, ascending."""
    return sorted(
        {run["alpha"] for run in results["runs"] if run["part"] == "conversion" and run["method"]}
    )


def arms(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the arms of "records" that have runs, in the order of the plan."""
    names = {run["arm"] for run in results["runs"] if run["part"] == "records"}
    return [arm for arm in results["records"]["arms"] if arm["name"] in names]


def lengths(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The primary arm and those that differ from it in their steps alone, from few to many."""
    found = arms(results)
    same = [
        arm
        for arm in found
        for main in found
        if main["name"] == MAIN
        and (arm["fields"], arm["peak_lr"]) == (main["fields"], main["peak_lr"])
    ]
    return sorted(same, key=lambda arm: arm["steps"])


def values(runs: Runs, field: str = "bits_per_byte") -> dict[int, float]:
    """Returns one field of the runs by seed."""
    return {seed: run[field] for seed, run in runs.items()}
