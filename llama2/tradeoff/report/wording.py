"""How the page names and prints heads, matchings, shares, and means with their intervals."""

from collections.abc import Sequence
from statistics import fmean, stdev

from llama2.reporting.document import MISSING, Column
from llama2.reporting.statistics import Estimate

MATCHING_NAMES = {
    "same_ffn": "same FFN",
    "exact": "parameters matched",
    "paper": "paper's factor",
}
METHOD_NOTES = {  # of `llama2.conversion.METHODS`
    "low_rank": "one head that comes closest to the outputs of a group's",
    "aligned": "heads of a group turned towards each other, then their mean",
    "mean": "mean of a group's heads (Ainslie et al. 2023, arXiv:2305.13245)",
    "first": "a group's first head",
    "random": "new random heads",
}


def heads_name(num_kv_heads: int, num_q_heads: int) -> str:
    """The field's name of a number of key/value heads: MHA, MQA or GQA with the number."""
    if num_kv_heads == num_q_heads:
        return f"MHA ({num_kv_heads})"
    return "MQA (1)" if num_kv_heads == 1 else f"GQA ({num_kv_heads})"


def parameters_name(num_parameters: int) -> str:
    billions = num_parameters >= 1e9
    return f"{num_parameters / 1e9:.2f} B" if billions else f"{num_parameters / 1e6:.2f} M"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def interval(estimate: Estimate, digits: int = 4) -> str:
    """Signed mean with its interval, or the mean alone where one seed gives none."""
    if estimate.low is None:
        return f"{estimate.mean:+.{digits}f}"
    return f"{estimate.mean:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def plus_minus(estimate: Estimate) -> str:
    """`interval`, shorter: the signed mean ± half the interval's width."""
    half = "" if estimate.high is None else f" ± {estimate.high - estimate.mean:.3f}"
    return f"{estimate.mean:+.3f}{half}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; the mean alone of one."""
    if not values:
        return MISSING
    mean = f"{fmean(values):.3f}"
    return f"{mean} ± {stdev(values):.3f}" if len(values) > 1 else mean


def alpha_columns(names: Sequence[str], alphas: Sequence[float]) -> list[Column]:
    """Columns of names, then one of measurements per α."""
    return [Column(name) for name in names] + [
        Column(f"α = {percent(alpha)}", "measured") for alpha in alphas
    ]
