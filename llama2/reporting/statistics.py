"""Statistics over a few seeds and held-out files: intervals, a noise floor, paired differences.

All functions are plain arithmetic; the caller decides which runs to compare.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds with its 95 % confidence interval; one seed gives no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval excludes 0; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Noise:
    """Spread of runs that differ only in their seed: `sd`, and √2 · sd for the difference of two
    runs."""

    sd: float
    n: int

    @property
    def typical_difference(self) -> float:
        return math.sqrt(2) * self.sd


@dataclass(frozen=True)
class FileDifference:
    """Difference in bits per byte with its 95 % interval over the choice of held-out files."""

    mean: float
    low: float
    high: float
    num_worse: int
    num_files: int


def t_critical(df: int, confidence: float = 0.95) -> float:
    """Returns the t with P(|T| ≤ t) = `confidence` for Student's distribution, `df` degrees of
    freedom.

    Computed by bisection over θ = atan(t / √df) of the closed form for integer `df` in Abramowitz
    and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.

    Raises:
        ValueError: df is below 1, or confidence is not between 0 and 1.
    """
    if df < 1:
        raise ValueError(f"df: expected at least 1; got {df}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1; got {confidence}")

    def probability(theta: float) -> float:
        sine, cosine = math.sin(theta), math.cos(theta)
        odd = df % 2
        term = cosine if odd else 1.0
        total = 0.0
        for power in range(1 if odd else 0, df - 1, 2):  # the terms in cosine ** power
            total += term
            term *= cosine**2 * (power + 1) / (power + 2)
        return 2 / math.pi * (theta + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the bracket to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(df) * math.tan(low)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Returns mean ± t(0.975, n − 1) · sd / √n; no interval for n = 1.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    if not values:
        raise ValueError("values: expected at least one; got none")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values: expected finite numbers; got {list(values)}")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, n)
    half = t_critical(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def share_estimate(shares: Sequence[float]) -> Estimate:
    """Returns `mean_estimate` of shares over seeds, with the interval clipped to [0, 1].

    The interval is over seeds, not binomial over tokens, as tokens of one model are not independent
    trials.

    Raises:
        ValueError: a share is not in [0, 1], or there are none.
    """
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares: expected numbers from 0 to 1; got {list(shares)}")
    estimate = mean_estimate(shares)
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(estimate.mean, max(estimate.low, 0.0), min(estimate.high, 1.0), estimate.n)


def paired_difference(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Returns the mean of variant − baseline over the seeds that both have, with its interval.

    Pairing removes effects of a seed on both, such as the order of the data.

    Raises:
        ValueError: no seed is in common.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        raise ValueError(
            f"seeds: expected at least one in common; got {sorted(variant)} and {sorted(baseline)}"
        )
    return mean_estimate([variant[seed] - baseline[seed] for seed in seeds])


def resolvable_difference(difference: Estimate, power: float = 0.9) -> float | None:
    """The smallest true difference whose 95 % interval leaves 0 out with probability `power`, at as
    many seeds with the same spread: (t(0.975, n − 1) + t(power, n − 1)) · sd / √n.

    The usual approximation by two quantiles of the central t. The spread of a few seeds is itself
    uncertain, and so is this. None where there is no interval.
    """
    if difference.high is None:
        return None
    standard_error = (difference.high - difference.mean) / t_critical(difference.n - 1)
    one_sided = t_critical(difference.n - 1, 2 * power - 1)
    return (difference.high - difference.mean) + one_sided * standard_error


def noise_floor(values: Sequence[float]) -> Noise | None:
    """Returns the standard deviation over seeds (n − 1 in the denominator); None for a single
    seed."""
    return Noise(stdev(values), len(values)) if len(values) > 1 else None


def file_bootstrap(
    variant_bits: np.ndarray,
    baseline_bits: np.ndarray,
    num_bytes: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> FileDifference:
    """Returns the paired bootstrap over held-out files of Σ bits / Σ bytes, variant − baseline.

    Files are drawn with replacement, the same ones for both sides; bits are averaged over seeds
    first, so the interval covers only the choice of files. Its ends are the 2.5 % and 97.5 %
    quantiles (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).

    Args:
        variant_bits, baseline_bits: `[num_seeds, num_files]`, rows matched by seed.
        num_bytes: `[num_files]`, all positive.
    Raises:
        ValueError: shapes do not match, or num_bytes is not all positive.
    """
    shape = variant_bits.shape
    if len(shape) != 2 or 0 in shape or baseline_bits.shape != shape:
        raise ValueError(
            f"bits: expected two arrays [num_seeds, num_files]; "
            f"got {shape} and {baseline_bits.shape}"
        )
    if num_bytes.shape != shape[1:] or not (num_bytes > 0).all():
        raise ValueError(f"num_bytes: expected {shape[1]} positive numbers; got {num_bytes}")
    bits = (variant_bits - baseline_bits).mean(axis=0)
    drawn = np.random.default_rng(seed).integers(len(bits), size=(resamples, len(bits)))
    means = bits[drawn].sum(axis=1) / num_bytes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return FileDifference(
        mean=float(bits.sum() / num_bytes.sum()),
        low=float(low),
        high=float(high),
        num_worse=int((bits > 0).sum()),
        num_files=len(bits),
    )


def gap_closed(plain: float, better: float, control: float) -> float | None:
    """Returns (plain − better) / (plain − control): 0 is no gain over `plain`, 1 is as good as the
    control.

    Returns None if `plain` is not worse than the control, as there is no gap to close.
    """
    gap = plain - control
    return (plain - better) / gap if gap > 0 else None
