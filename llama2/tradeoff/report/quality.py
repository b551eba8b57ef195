"""The study's results by share of heads, for the first table of the page."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llama2.accounting import head_counts
from llama2.config import ModelConfig
from llama2.tradeoff.recommend import share_name
from llama2.tradeoff.report.wording import difference, short_outcome
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import Comparison


@dataclass(frozen=True)
class Losses:
    """What fewer heads lose against MHA by one measure of the study.

    Attributes:
        name: of the measure; unit: of its differences.
        own: MHA's own figure.
        found: by the number of key/value heads with the same share in the model that is asked
            about.
    """

    name: str
    unit: str
    own: str
    found: dict[int, Comparison]

    @property
    def column(self) -> str:
        return f"{self.name}: {self.unit} over MHA"

    def cells(self, num_q_heads: int) -> dict[int, str]:
        """Returns differences, or the bound on the loss where no difference was resolved."""
        differences = {count: short_outcome(each) for count, each in self.found.items()}
        return {num_q_heads: f"({self.own})", **differences}


def losses(results: dict[str, Any] | None, num_q_heads: int) -> list[Losses]:
    """Returns the losses in text, and in recall after each number of steps that was tried."""
    if results is None:
        return []
    full = results["text"]["base"]["num_q_heads"]
    own = fmean(runs.values(runs.mha(results)).values())
    text = {
        count: comparisons.from_scratch(results, count)
        for count in runs.fewer_heads(results, "text")
    }
    found = [Losses("text", "bits per byte", f"{own:.3f}", _scaled(text, full, num_q_heads))]
    full = results["records"]["shape"]["num_q_heads"]
    for arm in runs.lengths(results):
        name = arm["name"]
        own = 100 * fmean(runs.values(runs.records(results, name), "accuracy").values())
        recall = {
            count: comparisons.records(results, name, count)
            for count in runs.fewer_heads(results, "records", name)
        }
        label = f"recall after {arm['steps']:,} steps"
        found.append(Losses(label, "points", f"{own:.1f} %", _scaled(recall, full, num_q_heads)))
    return found


def _scaled(
    found: dict[int, Comparison | None], full: int, num_q_heads: int
) -> dict[int, Comparison]:
    return {
        count * num_q_heads // full: each
        for count, each in found.items()
        if each is not None and count * num_q_heads % full == 0
    }


def evidence(results: dict[str, Any], config: ModelConfig) -> dict[int, str]:
    """Returns, for each count of `config`, a sentence with the study's results for its share."""
    found = losses(results, config.num_q_heads)
    return {count: _sentence(found, count, config.num_q_heads) for count in head_counts(config)}


def _sentence(found: list[Losses], count: int, num_q_heads: int) -> str:
    if count == num_q_heads:
        return "MHA is what the study compares fewer heads with."
    share = share_name(count / num_q_heads)
    told = [f"{each.name} {difference(each.found[count])}" for each in found if count in each.found]
    if not told:
        return f"The study trained no models with {share} of the heads."
    return (
        f"The study's small models with {share} of the heads, against MHA at equal training "
        f"budget: {'; '.join(told)}."
    )


def notes(results: dict[str, Any] | None) -> Iterator[str]:
    if results is None:
        yield "No study was run: the page says nothing of its own on quality."
        return
    full = results["text"]["base"]["num_q_heads"]
    yield (
        f"This study: small models with {full} query heads, in the row with the same share of "
        "heads; in MHA's row its own figures in brackets. Mean ± half the 95 % interval over "
        "seeds, at equal training budget; ≤ and ≥: not resolved, a greater loss is excluded."
    )
