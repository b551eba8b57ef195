"""Two kinds of runs compared: over seeds, over held-out files, and what may be said of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.reporting.statistics import (
    Estimate,
    FileDifference,
    file_bootstrap,
    paired_difference,
)
from llama2.tradeoff.study import runs
from llama2.tradeoff.study.runs import Runs

NOT_TOLD_APART = "not told apart"


@dataclass(frozen=True)
class Comparison:
    """Bits per byte of a variant minus those of its baseline: positive is worse."""

    seeds: Estimate
    files: FileDifference

    @property
    def verdict(self) -> str:
        """ "worse" or "better" only where both 95 % intervals, over seeds and over files, leave 0
        out on the same side; "one seed" where there is no interval over seeds."""
        if self.seeds.low is None or self.seeds.high is None:
            return "one seed"
        if min(self.seeds.low, self.files.low) > 0:
            return "worse"
        if max(self.seeds.high, self.files.high) < 0:
            return "better"
        return NOT_TOLD_APART


def compare(results: dict[str, Any], variant: Runs, baseline: Runs) -> Comparison | None:
    """None where the two have no seed in common: a study may lack either."""
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    num_bytes = np.array([file["bytes"] for file in results["corpus"]["held_out"]["files"]])
    variant_bits, baseline_bits = (
        np.array([side[seed]["bits"] for seed in seeds]) for side in (variant, baseline)
    )
    return Comparison(
        seeds=paired_difference(runs.values(variant), runs.values(baseline)),
        files=file_bootstrap(variant_bits, baseline_bits, num_bytes),
    )


def from_scratch(results: dict[str, Any], num_kv_heads: int, matching: str) -> Comparison | None:
    """Fewer heads from scratch against MHA from scratch."""
    variant = runs.scratch(results, num_kv_heads, matching)
    return compare(results, variant, runs.mha(results))


def by_conversion(
    results: dict[str, Any], num_kv_heads: int, method: str, alpha: float
) -> Comparison | None:
    """A converted model against the control that trained as long without conversion."""
    variant = runs.converted(results, num_kv_heads, method, alpha)
    return compare(results, variant, runs.control(results, alpha))
