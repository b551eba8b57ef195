"""Advantages against tables that were computed by hand."""

import numpy as np
import pytest

from llama2.rlhf.advantages import (
    explained_variance,
    generalised_advantages,
    relative_to_group,
    token_rewards,
    whitened,
    whitened_tokens,
)

close = pytest.approx


def test_whitening():
    std = 1.25**0.5  # of 1, 2, 3, 4 as a population
    found = whitened(np.array([1, 2, 3, 4]))
    assert found == close([-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std])
    assert whitened(np.array([[0.0, 2.0], [0.0, 2.0]])).tolist() == [[-1, 1], [-1, 1]]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [3.0],
        [0.0, 0.0],
        [0.1] * 7,  # whose mean in float64 is not 0.1
        [np.float32(1e6), np.nextafter(np.float32(1e6), np.float32(2e6))],
    ],
)
def test_equal_values_are_whitened_to_zero(values):
    with np.errstate(all="raise"):
        assert whitened(np.array(values)).tolist() == [0.0] * len(values)


def test_small_differences_are_whitened_to_one():
    assert whitened(np.array([1.0, 1.0 + 1e-5])) == close([-1.0, 1.0])


def test_a_number_that_is_not_finite_spoils_all():
    assert np.isnan(whitened(np.array([1.0, np.nan, 2.0]))).all()


def test_rewards_of_tokens():
    rewards = token_rewards(2.0, np.float32([0.5, -0.25, 1.0]), 0.5)
    assert rewards.dtype == np.float64 and rewards.tolist() == [-0.25, 0.125, 1.5]
    assert rewards.sum() == 2.0 - 0.5 * 1.25  # score − β · KL
    assert token_rewards(2.0, np.float32([7.0]), 0.0).tolist() == [2.0]


@pytest.mark.parametrize(
    ("discount", "trace_decay", "expected"),
    [
        # δ = (−0.3, −0.1, 0.9)
        (1.0, 0.95, [-0.3 + 0.95 * 0.755, -0.1 + 0.95 * 0.9, 0.9]),
        # δ = (0.9 · 0.2 − 0.5, 0.9 · 0.1 − 0.2, 0.9), each to come weighs 0.45
        (0.9, 0.5, [-0.32 + 0.45 * 0.295, -0.11 + 0.45 * 0.9, 0.9]),
        (1.0, 0.0, [-0.3, -0.1, 0.9]),  # one step ahead
        (1.0, 1.0, [0.5, 0.8, 0.9]),  # the reward to come less the value
    ],
)
def test_generalised_advantages(discount, trace_decay, expected):
    rewards, values = np.array([0.0, 0.0, 1.0]), np.float32([0.5, 0.2, 0.1])
    found = generalised_advantages(rewards, values, discount, trace_decay)
    assert found == close(expected, abs=1e-7)  # 0.2 and 0.1 are rounded to float32


def test_without_values_the_advantage_is_the_reward_to_come():
    found = generalised_advantages(np.array([1.0, -2.0, 4.0]), np.zeros(3), 1.0, 1.0)
    assert found.tolist() == [3.0, 2.0, 4.0]


def test_all_tokens_of_all_answers_are_whitened_together():
    found = whitened_tokens([np.array([0.0]), np.array([2.0, 0.0, 2.0])])
    assert [each.tolist() for each in found] == [[-1.0], [1.0, -1.0, 1.0]]


def test_scores_relative_to_their_group():
    """Means and spreads of groups do not matter, nor does a group of equal scores."""
    found = relative_to_group(np.array([1.0, 3.0, -50.0, 50.0, 9.0, 9.0]), 2)
    assert found.tolist() == [-1.0, 1.0, -1.0, 1.0, 0.0, 0.0]


def test_explained_variance():
    returns = np.array([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, np.full(4, 9.0)) == 0.0
    assert explained_variance(returns, np.array([2.0, 2.0, 3.0, 3.0])) == close(1 - 0.5 / 1.25)
    assert explained_variance(np.ones(4), returns) is None
