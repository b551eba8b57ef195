"""How the page names and prints heads, shares, and differences with their intervals."""

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from llama2.reporting.document import MISSING
from llama2.reporting.statistics import Estimate, FileDifference
from llama2.reporting.wording import MINUS, signed
from llama2.tradeoff.study.comparisons import BITS_PER_BYTE, NOT_TOLD_APART, Comparison, Measure

FIXED_SETTING = (
    "Computed for the setting that this page was written with; its fields do not change this "
    "section."
)
METHOD_NOTES = {  # of `llama2.conversion.METHODS`
    "low_rank": "one head that comes closest to the outputs of a group's",
    "aligned": "heads of a group turned towards each other, then their mean",
    "mean": "mean of a group's heads (Ainslie et al. 2023, arXiv:2305.13245)",
    "first": "a group's first head",
    "random": "new random heads",
}


def heads_name(num_kv_heads: int, num_q_heads: int) -> str:
    """Returns the usual name of a number of key/value heads: MHA, MQA or GQA, with the number."""
    if num_kv_heads == num_q_heads:
        return f"MHA ({num_kv_heads})"
    return "MQA (1)" if num_kv_heads == 1 else f"GQA ({num_kv_heads})"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def listed(names: Iterable[str]) -> str:
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def digits_of(measure: Measure) -> int:
    return 4 if measure is BITS_PER_BYTE else 1


def interval(estimate: Estimate | FileDifference, digits: int) -> str:
    """Returns the signed mean with its 95 % interval; the mean alone for one seed."""
    mean = signed(estimate.mean, digits)
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{signed(estimate.low, digits)}, {signed(estimate.high, digits)}]"


def plus_minus(estimate: Estimate, digits: int) -> str:
    """Returns the signed mean ± half the width of its interval."""
    half = "" if estimate.high is None else f" ± {estimate.high - estimate.mean:.{digits}f}"
    return f"{signed(estimate.mean, digits)}{half}"


def outcome(comparison: Comparison) -> str:
    """Returns the verdict, or the bound on the loss if no difference was resolved."""
    if comparison.verdict != NOT_TOLD_APART:
        return comparison.verdict
    bound = f"{comparison.largest_loss:.{digits_of(comparison.measure)}f}"
    return f"not resolved (a loss above {bound} is excluded)"


def difference(comparison: Comparison) -> str:
    """Returns the difference with its unit, or the bound on the loss if none was resolved."""
    digits, unit = digits_of(comparison.measure), comparison.measure.unit
    if comparison.verdict != NOT_TOLD_APART:
        return f"{plus_minus(comparison.seeds, digits)} {unit}"
    return f"not resolved (a loss above {comparison.largest_loss:.{digits}f} {unit} is excluded)"


def short_outcome(comparison: Comparison) -> str:
    """Returns the difference, or the bound on the loss as ≤ or ≥ if none was resolved."""
    digits = digits_of(comparison.measure)
    if comparison.verdict != NOT_TOLD_APART:
        return plus_minus(comparison.seeds, digits)
    bound = f"{comparison.largest_loss:.{digits}f}"
    return f"≤ +{bound}" if comparison.measure.less_is_better else f"≥ {MINUS}{bound}"


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns mean ± standard deviation over seeds; the mean alone for one seed."""
    if not values:
        return MISSING
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean
