"""Intervals over seeds and over files, against tables and against formulas written out."""

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from llama2.reporting.statistics import (
    Estimate,
    file_bootstrap,
    gap_closed,
    mean_estimate,
    noise_floor,
    paired_difference,
    resolvable_difference,
    share_estimate,
    t_critical,
)

# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975.
NIST = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    9: 2.262,
    10: 2.228,
    30: 2.042,
    100: 1.984,
}


@pytest.mark.parametrize("df", NIST)
def test_critical_values_are_those_of_the_table(df):
    assert round(t_critical(df), 3) == NIST[df]


def test_critical_values_at_other_confidences():
    assert round(t_critical(4, 0.99), 3) == 4.604  # the same table, column 0.995
    assert t_critical(1, 0.5) == pytest.approx(1)  # Cauchy: P(|T| <= 1) = 1/2
    assert t_critical(2, 0.5) == pytest.approx(math.sqrt(2 / 3))  # t / sqrt(t² + 2) = 1/2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "df: expected at least 1; got 0"),
        ((3, 1.0), "confidence: expected a share between 0 and 1; got 1.0"),
    ],
)
def test_critical_values_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        t_critical(*arguments)


def test_an_interval_over_three_seeds():
    values = [1.0, 2.0, 4.0]
    estimate = mean_estimate(values)
    half = t_critical(2) * stdev(values) / math.sqrt(3)
    assert estimate == Estimate(fmean(values), fmean(values) - half, fmean(values) + half, 3)
    assert estimate.excludes_zero is False
    assert mean_estimate([1.0, 1.1, 0.9]).excludes_zero is True
    assert mean_estimate([-1.0, -1.1, -0.9]).excludes_zero is True


def test_one_seed_has_no_interval():
    assert mean_estimate([3.0]) == Estimate(3.0, None, None, 1)
    assert mean_estimate([3.0]).excludes_zero is None
    assert noise_floor([3.0]) is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    draws = 4000
    estimates = (mean_estimate(random.standard_normal(3).tolist()) for _ in range(draws))
    covered = sum(not estimate.excludes_zero for estimate in estimates)
    # Binomial with p = 0.95: five standard deviations.
    assert abs(covered / draws - 0.95) < 5 * math.sqrt(0.95 * 0.05 / draws)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_an_interval_needs_finite_values(values):
    with pytest.raises(ValueError, match="values: expected"):
        mean_estimate(values)


def test_differences_are_paired_by_seed():
    # Seeds differ by far more than the two sides: only pairing sees the difference.
    baseline = {0: 1.0, 1: 5.0, 2: 9.0}
    variant = {2: 9.1, 0: 1.1, 1: 5.1, 7: 100.0}
    estimate = paired_difference(variant, baseline)
    assert estimate.n == 3
    assert estimate.mean == pytest.approx(0.1)
    assert estimate.excludes_zero


def test_differences_need_a_common_seed():
    with pytest.raises(ValueError, match=r"seeds: expected at least one in common; got \[0\]"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_noise_floor_is_the_spread_of_a_difference_of_two():
    noise = noise_floor([1.0, 2.0, 4.0])
    assert (noise.sd, noise.n) == (stdev([1.0, 2.0, 4.0]), 3)
    assert noise.typical_difference**2 == pytest.approx(2 * noise.sd**2)


def test_shares_stay_shares():
    estimate = share_estimate([0.99, 1.0, 0.9])
    assert estimate.high == 1.0
    assert estimate.low == mean_estimate([0.99, 1.0, 0.9]).low
    assert share_estimate([0.0, 0.01]).low == 0.0
    with pytest.raises(ValueError, match=r"shares: expected numbers from 0 to 1; got \[1.2\]"):
        share_estimate([1.2])


def test_bootstrap_over_files():
    num_bytes = np.array([100, 200, 400])
    baseline = np.array([[200.0, 400.0, 800.0], [210.0, 420.0, 840.0]])
    change = np.array([10.0, -2.0, 4.0])
    result = file_bootstrap(baseline + change, baseline, num_bytes)
    assert result.mean == pytest.approx(12 / 700)
    assert (result.num_worse, result.num_files) == (2, 3)
    # The ends are the extremes: a draw of one file alone has 1/27 on either side, above 2.5 %.
    assert result.low == pytest.approx(-2 / 200)
    assert result.high == pytest.approx(10 / 100)


def test_bootstrap_draws_by_its_seed_alone():
    bits = np.random.default_rng(0).standard_normal((2, 3, 40))
    num_bytes = np.arange(40) + 100
    result = file_bootstrap(*bits, num_bytes)
    assert result == file_bootstrap(*bits, num_bytes)
    assert result != file_bootstrap(*bits, num_bytes, seed=1)


def test_bootstrap_of_a_uniform_change_has_no_width():
    num_bytes = np.array([100, 200, 400])
    baseline = np.ones((1, 3))
    result = file_bootstrap(baseline + 0.5 * num_bytes, baseline, num_bytes)
    assert (result.low, result.mean, result.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("shapes", "num_bytes", "message"),
    [
        (((2, 3), (1, 3)), [1, 1, 1], "bits: expected two arrays"),
        (((0, 3), (0, 3)), [1, 1, 1], "bits: expected two arrays"),
        (((2, 3), (2, 3)), [1, 1], "num_bytes: expected 3 positive numbers"),
        (((2, 3), (2, 3)), [1, 1, 0], "num_bytes: expected 3 positive numbers"),
    ],
)
def test_bootstrap_refuses(shapes, num_bytes, message):
    with pytest.raises(ValueError, match=message):
        file_bootstrap(*(np.ones(shape) for shape in shapes), np.array(num_bytes))


@pytest.mark.parametrize("n", [4, 8, 14])
def test_a_resolvable_difference_is_resolved_nine_times_in_ten(n):
    sd = 0.5
    half = t_critical(n - 1) * sd / math.sqrt(n)
    difference = resolvable_difference(Estimate(0.1, 0.1 - half, 0.1 + half, n))
    drawn = np.random.default_rng(0).normal(difference, sd, size=(4000, n))
    halves = t_critical(n - 1) * drawn.std(axis=1, ddof=1) / math.sqrt(n)
    power = (drawn.mean(axis=1) > halves).mean()
    # Four deviations of a share of 4000, and the approximation by two quantiles of the central t.
    assert abs(power - 0.9) < 4 * (0.9 * 0.1 / 4000) ** 0.5 + 0.02
    assert resolvable_difference(Estimate(0.1, None, None, 1)) is None


def test_gap_closed():
    assert gap_closed(3.0, 2.0, 2.0) == 1.0
    assert gap_closed(3.0, 3.0, 2.0) == 0.0
    assert gap_closed(3.0, 2.5, 2.0) == 0.5
    assert gap_closed(3.0, 3.5, 2.0) == -0.5
    assert gap_closed(2.0, 1.0, 2.0) is None
    assert gap_closed(1.9, 1.0, 2.0) is None
