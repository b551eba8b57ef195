"""Training targets of PPO from the models' outputs on rollouts, computed on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama2.rlhf.advantages import (
    explained_variance,
    generalised_advantages,
    relative_to_group,
    token_rewards,
    whitened,
    whitened_tokens,
)
from llama2.rlhf.ppo_config import PPOConfig
from llama2.rlhf.ppo_losses import Experience, Rollout
from llama2.rlhf.rewards import combined


@dataclass(frozen=True)
class Measured:
    """A rollout and the models' outputs on it before the gradient steps.

    Attributes:
        helpful, safety: logits of the two rewards; safety is None without a safety model.
        log_probs, entropies: float32 `[n]`, of each answer token under the policy, in nats.
        reference_log_probs: the same under the reference.
        values: float32 `[n]`, the critic's; None without a critic.
    """

    rollout: Rollout
    helpful: float
    safety: float | None
    log_probs: np.ndarray
    entropies: np.ndarray
    reference_log_probs: np.ndarray
    values: np.ndarray | None

    @property
    def score(self) -> float:
        """The logit of the combined reward."""
        return combined(self.helpful, self.safety, self.rollout.is_safety)

    @property
    def log_ratios(self) -> np.ndarray:
        """log π − log π_ref, float64 `[n]`."""
        return np.float64(self.log_probs) - np.float64(self.reference_log_probs)


def check_finite(batch: Sequence[Measured], iteration: int) -> None:
    """Raises FloatingPointError unless all numbers of the batch are finite."""
    for name, numbers in (
        ("score of the helpfulness reward model", [each.helpful for each in batch]),
        ("score of the safety reward model", [each.safety for each in batch]),
        ("log-probability of the policy", [each.log_probs for each in batch]),
        ("log-probability of the reference", [each.reference_log_probs for each in batch]),
        ("value of the critic", [each.values for each in batch]),
    ):
        if numbers[0] is None:
            continue
        every = np.concatenate([np.atleast_1d(each) for each in numbers])
        if count := np.count_nonzero(~np.isfinite(every)):
            raise FloatingPointError(
                f"iteration {iteration}: expected every {name} to be finite; got {count:,} of "
                f"{every.size:,} that are not. The last saved state is unchanged"
            )


def experiences(batch: Sequence[Measured], config: PPOConfig) -> list[Experience]:
    """Returns the experiences of a whole batch; with `group_size`, the answers to each prompt are
    consecutive."""
    scores = np.array([each.score for each in batch], dtype=np.float64)
    if config.group_size:
        return _of_groups(batch, relative_to_group(scores, config.group_size), config)
    advantages, returns = [], []
    for each, score in zip(batch, whitened(scores), strict=True):
        rewards = token_rewards(score, each.log_ratios, config.kl_weight)
        found = generalised_advantages(rewards, each.values, config.discount, config.trace_decay)
        advantages.append(found)
        returns.append(found + each.values)
    learnt = zip(batch, whitened_tokens(advantages), returns, strict=True)
    return [Experience(each.rollout, each.log_probs, a, each.values, g) for each, a, g in learnt]


def _of_groups(
    batch: Sequence[Measured], scores: np.ndarray, config: PPOConfig
) -> list[Experience]:
    """Returns experiences whose token advantages are the answer's score relative to its group plus
    the sum of the KL penalties from that token on."""
    learnt = []
    for each, score in zip(batch, scores, strict=True):
        penalties = token_rewards(0.0, each.log_ratios, config.kl_weight)
        to_come = generalised_advantages(penalties, np.zeros_like(penalties), 1.0, 1.0)
        learnt.append(Experience(each.rollout, each.log_probs, score + to_come))
    return learnt


def described(
    batch: Sequence[Measured], learnt: Sequence[Experience], config: PPOConfig
) -> dict[str, Any]:
    """Returns the log's fields about the answers of an iteration and the models that judged them:

    - reward, reward_helpful, reward_safety: mean logits of the combined reward and of each
      model;
    - objective: mean of score − β · Σ (log π − log π_ref) over answers. The whitened scores used
      for training always have mean 0;
    - kl, kl_per_token: mean of Σ (log π − log π_ref) over answers, and of its terms over tokens;
      kl_k3_per_token: mean of exp(−x) − 1 + x over the same terms x, which is never negative.
      Schulman 2020, "Approximating KL divergence", calls these estimates k1 and k3;
    - entropy: mean over tokens of the policy's entropy, in nats;
    - explained_variance: that of the returns by the critic's values;
    - answer_tokens_mean, answer_tokens_max; cut: the share of truncated answers.
    """
    scores = np.array([each.score for each in batch], dtype=np.float64)
    ratios = [each.log_ratios for each in batch]
    divergences, every = np.array([ratio.sum() for ratio in ratios]), np.concatenate(ratios)
    has_safety, has_critic = batch[0].safety is not None, batch[0].values is not None
    explained = None
    if has_critic:
        values = np.concatenate([each.values for each in batch])
        explained = explained_variance(np.concatenate([each.returns for each in learnt]), values)
    lengths = [len(each.rollout.answer) for each in batch]
    record = {
        "reward": scores.mean(),
        "reward_helpful": np.mean([each.helpful for each in batch]),
        "reward_safety": np.mean([each.safety for each in batch]) if has_safety else None,
        "objective": (scores - config.kl_weight * divergences).mean(),
        "kl": divergences.mean(),
        "kl_per_token": every.mean(),
        "kl_k3_per_token": (np.expm1(-every) + every).mean(),
        "entropy": np.concatenate([each.entropies for each in batch]).mean(dtype=np.float64),
        "explained_variance": explained,
        "answer_tokens_mean": np.mean(lengths),
        "answer_tokens_max": max(lengths),
        "cut": np.mean([each.rollout.is_cut for each in batch]),
    }
    return {name: x if x is None or type(x) is int else float(x) for name, x in record.items()}
