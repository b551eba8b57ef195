"""Advantages of tokens from the scores of answers, in float64 on the host.

An answer of n tokens is an episode: token t is the action in the state before it, whose value the
critic estimates. Scores are whitened over the batch and added to the last token's reward; every
token has a KL penalty: R = whiten(score) − β · Σ (log π − log π_ref), as in Touvron et al. 2023,
arXiv:2307.09288, section 3.2.3. The paper does not say how advantages follow from these rewards;
our choices are generalised advantages (Schulman et al. 2016, arXiv:1506.02438) for PPO with a
critic, and advantages relative to a prompt's other answers (Shao et al. 2024, arXiv:2402.03300)
without one.
"""

from collections.abc import Sequence

import numpy as np

# Relative spread of float32 scores below which it is rounding error.
_NO_SPREAD = 1e-6


def whitened(values: np.ndarray) -> np.ndarray:
    """Returns (values − mean) / std, float64 in any shape, with the population's std.

    Values that differ only by float32 rounding (a std of at most 1e-6 times the largest magnitude)
    become 0 instead of noise of magnitude 1.
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
    """Returns the rewards of an answer's tokens, `[n]`: −β · (log π − log π_ref), plus the score
    for the last token.

    Their sum is score − β · KL, where KL is estimated from this one answer.

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
    """Returns A_t = δ_t + γ·λ·A_{t+1}, where δ_t = r_t + γ·V_{t+1} − V_t, with A and V zero after
    the last token.

    The critic's target is the return A + V. With V = 0 and γ = λ = 1, A_t is the sum of the rewards
    from t on.

    Args:
        rewards, values: `[n]`, values[t] is that of the state before token t.
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
    """Returns each score whitened over the answers to its prompt, which are consecutive.

    Args:
        scores: `[num_prompts · group_size]`.
    """
    groups = np.asarray(scores, dtype=np.float64).reshape(-1, group_size)
    return np.concatenate([whitened(group) for group in groups])


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float | None:
    """Returns 1 − var(returns − values) / var(returns): 1 for a perfect critic, 0 for a constant
    one; None if all returns are equal."""
    variance = np.var(np.float64(returns))
    if variance == 0.0:
        return None
    return float(1.0 - np.var(np.float64(returns) - np.float64(values)) / variance)
