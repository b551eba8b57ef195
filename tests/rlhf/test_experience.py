"""What is learnt from a batch, computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from llama2.rlhf.experience import Measured, check_finite, described, experiences
from llama2.rlhf.ppo_config import PPOConfig
from llama2.rlhf.ppo_losses import Rollout

CONFIG = PPOConfig(batch_size=2, mini_batch_size=2, kl_weight=0.5, trace_decay=0.5)
# Rewards of 3 and 1, which are whitened to 1 and −1; log-ratios of (0.5, −1) and (2,).
BATCH = [
    Measured(
        Rollout([1, 4], [5, 2]),
        3.0,
        None,
        np.float32([-1.0, -2.0]),
        np.float32([1.0, 2.0]),
        np.float32([-1.5, -1.0]),
        np.float32([0.25, 0.5]),
    ),
    Measured(
        Rollout([1], [6], is_cut=True),
        1.0,
        None,
        np.float32([-1.0]),
        np.float32([3.0]),
        np.float32([-3.0]),
        np.float32([0.0]),
    ),
]


def test_with_a_critic():
    """Rewards (−0.25, 1 + 0.5) and (−1 − 1,): δ = (−0.25 + 0.5 − 0.25, 1.5 − 0.5) and (−2,)."""
    one, other = experiences(BATCH, CONFIG)
    advantages = np.array([0.0 + 0.5 * 1.0, 1.0, -2.0])
    assert one.returns.tolist() == [0.75, 1.5] and other.returns.tolist() == [-2.0]
    expected = (advantages - advantages.mean()) / advantages.std()
    assert [*one.advantages, *other.advantages] == pytest.approx(expected)
    assert one.log_probs is BATCH[0].log_probs and one.values is BATCH[0].values


def test_of_groups():
    """The score relative to the group, and −β times the log-ratios from the token on."""
    batch = [replace(each, values=None) for each in BATCH]
    one, other = experiences(batch, replace(CONFIG, group_size=2))
    assert one.advantages.tolist() == [1 - 0.5 * (0.5 - 1.0), 1 + 0.5 * 1.0]
    assert other.advantages.tolist() == [-1 - 0.5 * 2.0]
    assert one.values is one.returns is other.values is other.returns is None


def test_what_the_log_says():
    found = described(BATCH, experiences(BATCH, CONFIG), CONFIG)
    k3 = [np.exp(-x) - 1 + x for x in (0.5, -1.0, 2.0)]
    returns, rest = np.array([0.75, 1.5, -2.0]), np.array([0.5, 1.0, -2.0])
    assert found == pytest.approx(
        {
            "reward": 2.0,
            "reward_helpful": 2.0,
            "reward_safety": None,
            "objective": 2.0 - 0.5 * (-0.5 + 2.0) / 2,
            "kl": (-0.5 + 2.0) / 2,
            "kl_per_token": 0.5,
            "kl_k3_per_token": np.mean(k3),
            "entropy": 2.0,
            "explained_variance": 1 - rest.var() / returns.var(),
            "answer_tokens_mean": 1.5,
            "answer_tokens_max": 2,
            "cut": 0.5,
        }
    )


def test_the_reward_that_counts():
    """Safety's for prompts tagged so, and where its reward is below 0.15, that of a logit of
    −1.73."""
    tagged = Rollout([1], [2], is_safety=True)
    for safety, rollout, score in ((-1.7, BATCH[0].rollout, 3.0), (-1.8, BATCH[0].rollout, -1.8)):
        assert replace(BATCH[0], rollout=rollout, safety=safety).score == score
    assert replace(BATCH[0], rollout=tagged, safety=4.0).score == 4.0
    batch = [replace(each, safety=-2.0) for each in BATCH]
    found = described(batch, experiences(batch, CONFIG), CONFIG)
    assert found["reward"] == found["reward_safety"] == -2.0 and found["reward_helpful"] == 2.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("helpful", np.inf, "every score of the helpfulness reward model .* got 1 of 2"),
        ("safety", np.nan, "every score of the safety reward model .* got 1 of 2"),
        ("log_probs", np.float32([0.0, -np.inf]), "every log-probability of the policy .* 1 of 3"),
        ("reference_log_probs", np.float32([np.nan] * 2), "of the reference .* got 2 of 3"),
        ("values", np.float32([0.0, np.nan]), "every value of the critic .* got 1 of 3"),
    ],
)
def test_what_is_not_finite_is_named(name, value, message):
    batch = [replace(each, safety=0.0) for each in BATCH]
    check_finite(BATCH, 7)
    check_finite(batch, 7)
    batch[0] = replace(batch[0], **{name: value})
    with pytest.raises(FloatingPointError, match=f"iteration 7: expected .*{message}"):
        check_finite(batch, 7)
