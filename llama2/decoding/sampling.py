"""Drawing a token from logits, with what is drawn settled beforehand by numbers in [0, 1)."""

import math
import secrets
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
) -> Tensor:
    """Draws a token per row from softmax(logits / temperature), cut to its nucleus, in float32.

    The nucleus is the shortest run of tokens, likeliest first and the lower id first among equals,
    whose probabilities reach `top_p`: a token belongs if those before it sum to less. The draw
    inverts the cumulative distribution, so it is a function of its arguments.

    Args:
        logits: `[batch, vocab_size]`, any floating dtype.
        uniform: float32 `[batch]` in [0, 1).
        temperature: of all rows, or float32 `[batch]`; 0 takes the likeliest token. The number 0
            spares the sort.
        top_p: of all rows, or float32 `[batch]`.
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    Reference: Holtzman et al. 2020, arXiv:1904.09751.
    """
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    tokens = logits.argmax(dim=-1)
    if isinstance(temperature, Tensor) or temperature > 0:
        temperature, top_p = (_column(logits, value) for value in (temperature, top_p))
        # Subtracting first keeps a small temperature from overflowing; tiny keeps it from being 0.
        scaled = (logits - highest) / temperature.clamp(min=torch.finfo(torch.float32).tiny)
        probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        reached = probabilities.cumsum(dim=-1)
        total = reached[:, -1:]  # 1 but for rounding
        size = (reached - probabilities < top_p * total).sum(dim=-1, keepdim=True)
        size = size.clamp(min=1)  # none where the probabilities are NaN
        target = uniform[:, None] * reached.gather(-1, size - 1)
        rank = (reached <= target).sum(dim=-1, keepdim=True).clamp(max=size - 1)
        tokens = torch.where(temperature > 0, order.gather(-1, rank), tokens[:, None])[:, 0]
    return tokens.where(highest.squeeze(-1).isfinite(), -1)


def _column(logits: Tensor, value: float | Tensor) -> Tensor:
    """float32 `[batch, 1]`."""
    if isinstance(value, Tensor):
        return value[:, None]
    return logits.new_full((len(logits), 1), in_float32(value))


def in_float32(temperature: float) -> float:
    """A temperature that float32 holds: at the hottest all tokens are equally likely already."""
    return min(temperature, torch.finfo(torch.float32).max)


def uniform_draws(seed: int | None, index: int, count: int) -> np.ndarray:
    """float32 `[count]` in [0, 1), which follow from (seed, index), the first of them whatever the
    count; None takes a new seed."""
    seed = secrets.randbits(64) if seed is None else seed
    return np.random.default_rng((seed, index)).random(count, dtype=np.float32)


def check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    """Raises ValueError unless these are what `generate` takes."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:  # false for NaN
        raise ValueError(f"temperature: expected a finite number ≥ 0; got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1]; got {top_p!r}")
    if seed is not None and (not is_whole(seed) or seed < 0):
        raise ValueError(f"seed: expected an int of at least 0, or None; got {seed!r}")


def _is_number(value: Any) -> bool:
    """Not a tensor, which would have to be waited for."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
