"""Comparisons of models of the same chains over seeds, with verdicts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama2.align.measure import (
    exact_share,
    obeyed_share,
    refused_harmless,
    refused_misdeeds,
    right_share,
)
from llama2.reporting.statistics import Estimate, paired_difference, share_estimate

Chains = Mapping[int, Mapping[str, Any]]  # results of `measured` by seed

BETTER, WORSE = "better", "worse"
NOT_TOLD_APART, ONE_SEED = "not told apart", "one seed"


@dataclass(frozen=True)
class Measure:
    """A share of a model's answers.

    Attributes:
        name: what is counted among which answers.
        of: computes the share from the results of `measured` for a model.
        more_is_better: whether a larger share is better.
    """

    name: str
    of: Callable[[Mapping[str, Any]], float]
    more_is_better: bool = True


EXACT = Measure("harmless requests answered to the letter", exact_share)
RIGHT = Measure("harmless requests answered rightly, hedged or not", right_share)
REFUSED_MISDEEDS = Measure("misdeeds refused", refused_misdeeds)
REFUSED_HARMLESS = Measure("harmless requests refused", refused_harmless, more_is_better=False)


def measures(chains: Chains) -> list[Measure]:
    """Returns the measures of the comparison: answers, refusals, and obedience by turn."""
    models = (model for chain in chains.values() for model in chain["models"].values())
    turns = min(len(model["obeyed"]) for model in models)
    return [
        *(EXACT, RIGHT, REFUSED_MISDEEDS, REFUSED_HARMLESS),
        *(
            Measure(f"instruction obeyed in turn {turn}", _obeyed_in(turn))
            for turn in range(1, turns + 1)
        ),
    ]


def _obeyed_in(turn: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda model: obeyed_share(model, turn)


def share(chains: Chains, measure: Measure, model: str) -> Estimate:
    """Returns the mean over seeds of a model's share, with its interval."""
    return share_estimate([measure.of(chain["models"][model]) for chain in chains.values()])


def difference(chains: Chains, measure: Measure, model: str, baseline: str) -> Estimate:
    """Returns the mean over seeds of model − baseline, with its interval."""
    of_model, of_baseline = (
        {seed: measure.of(chain["models"][name]) for seed, chain in chains.items()}
        for name in (model, baseline)
    )
    return paired_difference(of_model, of_baseline)


def verdict(found: Estimate, measure: Measure) -> str:
    """Returns "better" or "worse" if the 95 % interval over seeds excludes 0, "not told apart" if
    not, and "one seed" without an interval."""
    if found.excludes_zero is None:
        return ONE_SEED
    if not found.excludes_zero:
        return NOT_TOLD_APART
    return BETTER if (found.mean > 0) == measure.more_is_better else WORSE
