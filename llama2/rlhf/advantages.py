"""From the scores of answers to the advantages of their tokens, in float64 on the host.

An answer of n tokens is an episode: token t is the action in the state before it, whose value the
critic gave. Scores are whitened over the batch and lie on the last token; every token pays for
leaving the reference: R = whiten(score) − β · Σ (log π − log π_ref), as in Touvron et al. 2023,
arXiv:2307.09288, section 3.2.3. What follows from these rewards is ours, as the paper says nothing
of it: generalised advantages (Schulman et al. 2016, arXiv:1506.02438) for PPO with a critic, and
advantages relative to a prompt's other answers (Shao et al. 2024, arXiv:2402.03300) without one.
"""

from collections.abc import Sequence

import numpy as np

# Of float32 scores: a spread that is less than this part of the largest is one of roundings.
_NO_SPREAD = 1e-6


def whitened(values: np.ndarray) -> np.ndarray:
    """(values − mean) / std, float64 in any shape, std that of the population.

    Values that differ by no more than roundings of float32 (a std of at most 1e-6 of the largest
    magnitude) say nothing: they become 0, not noise of magnitude 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        return values
    centred = values - values.mean()
    std = centred.std()
    if std <= _NO_SPREAD * np.abs(values).max():
        return np.zeros_like(values)
    return centred / std


def token_rewards(score: float, log_ratios: np.ndarray, kl_weight: float) -> np.ndarray:
    """Rewards of an answer's tokens, `[n]`: −β · (log π − log π_ref), plus the score on the last.

    Their sum is score − β · KL, where KL is its estimate from this one answer.

    Args:
        log_ratios: log π − log π_ref, `[n]`, n ≥ 1, in nats.
        kl_weight: β.
    """
    rewards = -kl_weight * np.float64(log_ratios)
    rewards[-1] += score
    return rewards


def generalised_advantages(
    rewards: np.ndarray, values: np.ndarray, discount: float, trace_decay: float
) -> np.ndarray:
    """A_t = δ_t + γ·λ·A_{t+1}, where δ_t = r_t + γ·V_{t+1} − V_t; nothing follows the last token.

    The return that a critic is to predict is A + V. With V = 0 and γ = λ = 1, A_t is the sum of the
    rewards from t on.

    Args:
        rewards, values: `[n]`, values[t] of the state before token t.
        discount, trace_decay: γ and λ.
    """
    rewards, values = np.float64(rewards), np.float64(values)
    errors = rewards + discount * np.append(values[1:], 0.0) - values
    advantages, following = np.empty_like(errors), 0.0
    for t in reversed(range(len(errors))):
        advantages[t] = following = errors[t] + discount * trace_decay * following
    return advantages


def whitened_tokens(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the advantages of all answers, whitened over all of their tokens together."""
    every = whitened(np.concatenate(advantages))
    return np.split(every, np.cumsum([len(answer) for answer in advantages])[:-1])


def relative_to_group(scores: np.ndarray, group_size: int) -> np.ndarray:
    """Each score whitened over the answers to its prompt, which stand one after another.

    Args:
        scores: `[num_prompts · group_size]`.
    """
    groups = np.asarray(scores, dtype=np.float64).reshape(-1, group_size)
    return np.concatenate([whitened(group) for group in groups])


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float | None:
    """1 − var(returns − values) / var(returns): 1 of a critic that foresees everything, 0 of a
    constant one; None where all returns are equal."""
    variance = np.var(np.float64(returns))
    if variance == 0.0:
        return None
    return float(1.0 - np.var(np.float64(returns) - np.float64(values)) / variance)
