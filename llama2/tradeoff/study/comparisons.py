"""Compares two kinds of runs over seeds and over held-out files, and gives a verdict.

All differences are variant − baseline, paired by seed, at equal training budget.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.reporting.statistics import (
    Estimate,
    FileDifference,
    file_bootstrap,
    paired_difference,
    resolvable_difference,
)
from llama2.tradeoff.study import runs
from llama2.tradeoff.study.runs import Run, Runs

NOT_TOLD_APART = "not told apart"
POWER = 0.9  # the probability with which a "resolvable" difference is resolved


@dataclass(frozen=True)
class Measure:
    """The field of a run that is compared, times `scale`, in `unit`."""

    field: str
    unit: str
    scale: float
    less_is_better: bool


BITS_PER_BYTE = Measure("bits_per_byte", "bits per byte", 1.0, less_is_better=True)
ACCURACY = Measure("accuracy", "points", 100.0, less_is_better=False)  # percentage points


@dataclass(frozen=True)
class Comparison:
    """A difference, variant − baseline, in the unit of its measure.

    Attributes:
        seeds: its mean over paired seeds, with the 95 % interval (Student's t).
        files: its mean over held-out files, with the 95 % interval of a bootstrap; None for a
            measure that has no files.
    """

    measure: Measure
    seeds: Estimate
    files: FileDifference | None

    @property
    def verdict(self) -> str:
        """ "worse" or "better" if every 95 % interval excludes 0 on the same side; "one seed" if
        there is no interval over seeds; otherwise `NOT_TOLD_APART`."""
        if self.seeds.low is None or self.seeds.high is None:
            return "one seed"
        more, less = ("worse", "better") if self.measure.less_is_better else ("better", "worse")
        intervals = [self.seeds, *([self.files] if self.files else [])]
        if min(interval.low for interval in intervals) > 0:
            return more
        if max(interval.high for interval in intervals) < 0:
            return less
        return NOT_TOLD_APART

    @property
    def largest_loss(self) -> float | None:
        """The end of the intervals on the side where the variant is worse: they exclude a greater
        loss (97.5 % one-sided). None with one seed; at most 0 if they exclude every loss."""
        if self.seeds.low is None or self.seeds.high is None:
            return None
        intervals = [self.seeds, *([self.files] if self.files else [])]
        if self.measure.less_is_better:
            return max(interval.high for interval in intervals)
        return max(-interval.low for interval in intervals)

    @property
    def resolvable(self) -> float | None:
        """The smallest true difference that this number of seeds resolves with probability
        `POWER`, at the spread of these pairs; None with one seed."""
        return resolvable_difference(self.seeds, POWER)


def compare(
    results: dict[str, Any], variant: Runs, baseline: Runs, measure: Measure = BITS_PER_BYTE
) -> Comparison | None:
    """Compares the runs of the seeds that both sides have; returns None if there are none."""
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    sides = (
        {seed: measure.scale * side[seed][measure.field] for seed in seeds}
        for side in (variant, baseline)
    )
    over_files = None
    if measure is BITS_PER_BYTE:
        sides_bits = ([side[seed] for seed in seeds] for side in (variant, baseline))
        over_files = _over_files(results, *sides_bits)
    return Comparison(measure, paired_difference(*sides), over_files)


def _over_files(results: dict[str, Any], variant: list[Run], baseline: list[Run]) -> FileDifference:
    num_bytes = np.array([file["bytes"] for file in results["corpus"]["held_out"]["files"]])
    bits = (np.array([run["bits"] for run in side]) for side in (variant, baseline))
    return file_bootstrap(*bits, num_bytes)


def from_scratch(results: dict[str, Any], num_kv_heads: int) -> Comparison | None:
    """Compares language models with fewer key/value heads to MHA, both from scratch."""
    return compare(results, runs.text(results, num_kv_heads), runs.mha(results))


def records(
    results: dict[str, Any], arm: str, num_kv_heads: int, baseline: int | None = None
) -> Comparison | None:
    """Compares the accuracy of an arm of "records" to that of `baseline` heads (None: MHA)."""
    variant = runs.records(results, arm, num_kv_heads)
    return compare(results, variant, runs.records(results, arm, baseline), ACCURACY)


def by_conversion(
    results: dict[str, Any], num_kv_heads: int, method: str, alpha: float
) -> Comparison | None:
    """Compares converted models to the controls that trained as long without a conversion."""
    variant = runs.converted(results, num_kv_heads, method, alpha)
    return compare(results, variant, runs.control(results, alpha))


def shipped(results: dict[str, Any], num_kv_heads: int, alpha: float) -> FileDifference | None:
    """Compares the shipped model, converted and trained on for `alpha`, to the same model without
    the conversion. There is one model, so the interval is over files alone."""
    original = results["shipped"]["model"]["num_kv_heads"]
    variant = runs.shipped(results, num_kv_heads, alpha)
    baseline = runs.shipped(results, original, alpha)
    if variant is None or baseline is None:
        return None
    return _over_files(results, [variant], [baseline])


def primary(results: dict[str, Any]) -> list[tuple[dict[str, Any], Comparison]]:
    """Returns the comparisons that were named before the first run, each with its entry of
    "primary". A comparison whose runs are missing is left out."""
    found = []
    for entry in results["primary"]:
        if entry["measure"] == "text":
            comparison = from_scratch(results, entry["num_kv_heads"])
        else:
            comparison = records(results, entry["arm"], entry["num_kv_heads"])
        if comparison is not None:
            found.append((entry, comparison))
    return found
