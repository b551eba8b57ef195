"""The clipped losses of PPO over a micro-batch of answers, for a policy and for a critic.

Both are means over tokens: the sum over a micro-batch's answer tokens is divided by the
mini-batch's answer tokens per row, times the micro-batch's rows. The mean over equal parts of a
mini-batch, such as micro-batches or the parts of processes, is the mini-batch's mean over its
tokens, whatever number each part has (as for `packing.answer_loss`). All tokens have the same
weight, in long and short answers.

The policy's loss is PPO's (Schulman et al. 2017, arXiv:1707.06347, equation 7), with the range of
Llama 2's paper. That paper gives no critic's loss; ours, with its clipping, is that of
implementations by PPO's authors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama2.model import Llama2
from llama2.rlhf.ragged import Ragged, packed
from llama2.scalar_model import ScalarModel


@dataclass(frozen=True)
class Rollout:
    """A prompt and the policy's answer as ids, which are never decoded and encoded again.

    Attributes:
        answer: the new tokens, at least one; the last is the stop token unless `is_cut`.
        is_safety: the prompt is marked as written to provoke an unsafe answer.
        is_cut: the answer was truncated at `max_new_tokens`.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    is_safety: bool = False
    is_cut: bool = False

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer]


@dataclass(frozen=True)
class Experience:
    """A rollout and its training targets, `[n]` numbers each, one per answer token.

    Attributes:
        log_probs: float32 or wider, in nats, under the policy at the beginning of the iteration.
        advantages: float64.
        values, returns: the critic's values before the iteration, float32 or wider, and its
            targets, float64; None without a critic.
    """

    rollout: Rollout
    log_probs: np.ndarray
    advantages: np.ndarray
    values: np.ndarray | None = None
    returns: np.ndarray | None = None


def _places(rollouts: Sequence[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (tokens `[1, total]`, cu_seqlens, places int64 `[num_answer_tokens]`): all rollouts
    packed without their last tokens, and the places in `total` whose next token belongs to an
    answer."""
    sequences = [rollout.ids[:-1] for rollout in rollouts]
    starts = np.cumsum([0, *map(len, sequences)])
    places = [
        np.arange(start + len(rollout.prompt) - 1, end)
        for rollout, start, end in zip(rollouts, starts, starts[1:], strict=False)
    ]
    tokens, cu_seqlens = packed(sequences, device)
    return tokens, cu_seqlens, torch.from_numpy(np.concatenate(places)).to(device)


def answer_log_probs(
    policy: Llama2, rollouts: Sequence[Rollout], temperature: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns (log-probabilities, entropies) of all answer tokens, one rollout after another,
    `[num_answer_tokens]` in float32 or wider, in nats, under softmax(logits / temperature), the
    sampling distribution. Prompt tokens are not projected onto the vocabulary. The entropies have
    no gradient."""
    tokens, cu_seqlens, places = _places(rollouts, device)
    ids = np.concatenate([np.asarray(rollout.answer, dtype=np.int64) for rollout in rollouts])
    targets = torch.from_numpy(ids).to(device)
    log_probs, entropies = policy.log_probs_at(
        tokens, places, targets, cu_seqlens=cu_seqlens, temperature=temperature
    )
    return log_probs, entropies.detach()


def answer_values(critic: ScalarModel, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """Returns the values of the states before the answer tokens, `[num_answer_tokens]`, float32 or
    wider."""
    tokens, cu_seqlens, places = _places(rollouts, device)
    return critic(tokens, cu_seqlens=cu_seqlens)[0].index_select(0, places)


def clipped_policy_losses(
    log_ratio: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Returns (−min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A), ρ) of each token, where ρ = π / π_old =
    exp(log_ratio)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def clipped_value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float
) -> Tensor:
    """Returns max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²) / 2 of each token: values more
    than ε away from the old ones get no gradient that moves them further."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def tokens_per_row(rows: Sequence[Experience]) -> float:
    """Returns the answer tokens per row of a whole mini-batch, by which the losses of its parts are
    divided."""
    return sum(len(row.rollout.answer) for row in rows) / len(rows)


class PolicyLoss:
    """The `Objective` of a mini-batch's parts for the policy, which also collects statistics.

    Args:
        per_row: `tokens_per_row` of the mini-batch.
    """

    def __init__(self, per_row: float, clip_range: float, temperature: float) -> None:
        self._per_row, self._clip_range, self._temperature = per_row, clip_range, temperature
        self._noted: list[Tensor] = []

    def __call__(self, policy: Llama2, rows: Ragged) -> Tensor:
        """Returns the loss of one micro-batch of `Experience`s, a scalar."""
        rollouts = [row.rollout for row in rows.items]
        log_probs, _ = answer_log_probs(policy, rollouts, self._temperature, rows.device)
        old = _joined([row.log_probs for row in rows.items], log_probs)
        advantages = _joined([row.advantages for row in rows.items], log_probs)
        log_ratio = log_probs - old
        losses, ratio = clipped_policy_losses(log_ratio, advantages, self._clip_range)
        with torch.no_grad():
            deviation = (ratio - 1).abs()
            clipped = (deviation > self._clip_range).to(ratio.dtype).sum()
            # k3 of KL(π_old ‖ π), which is never negative; ratio − 1 would have few digits near 0
            divergence = (log_ratio.expm1() - log_ratio).sum()
            self._noted.append(torch.stack([deviation.max(), clipped, divergence]))
        return losses.sum() / (self._per_row * len(rows))

    def seen(self) -> dict[str, float]:
        """Returns statistics of the micro-batches so far: the largest |ρ − 1|, the number of tokens
        whose ratio was outside the clip range, and the sum over tokens of the divergence from the
        old policy."""
        deviation, clipped, divergence = torch.stack(self._noted).T
        return {
            "ratio_deviation": deviation.max().item(),
            "clipped": clipped.sum().item(),
            "divergence": divergence.sum().item(),
        }


class ValueLoss:
    """The `Objective` of a mini-batch's parts for the critic; arguments as for `PolicyLoss`."""

    def __init__(self, per_row: float, clip_range: float) -> None:
        self._per_row, self._clip_range = per_row, clip_range

    def __call__(self, critic: ScalarModel, rows: Ragged) -> Tensor:
        """Returns the loss of one micro-batch of `Experience`s, a scalar."""
        values = answer_values(critic, [row.rollout for row in rows.items], rows.device)
        old = _joined([row.values for row in rows.items], values)
        returns = _joined([row.returns for row in rows.items], values)
        losses = clipped_value_losses(values, old, returns, self._clip_range)
        return losses.sum() / (self._per_row * len(rows))


def _joined(parts: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Returns the concatenated parts, `[num_answer_tokens]`, on the device and in the dtype of
    `like`."""
    return torch.from_numpy(np.concatenate(parts)).to(like)
