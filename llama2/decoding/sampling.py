"""Sampling of tokens from logits by given uniform numbers in [0, 1)."""

import math
import secrets
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sample(
    sample_tokens: Callable[..., Tensor],
    logits: Tensor,
    uniform: Tensor,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
) -> Tensor:
    """Samples a token per row with the op `sample_tokens`; see `gqa_kernels.reference`.

    Args:
        sample_tokens: the op, of a backend.
        logits: `[batch, vocab_size]`, any floating dtype that the backend supports.
        uniform: float32 `[batch]` in [0, 1).
        temperature: of all rows, or float32 `[batch]`; 0 takes the likeliest token. The number 0
            avoids sorting.
        top_p: of all rows, or float32 `[batch]`.
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    """
    if isinstance(temperature, Tensor) or temperature > 0:
        return sample_tokens(
            logits, _of_rows(logits, temperature), _of_rows(logits, top_p), uniform
        )
    return logits.argmax(dim=-1).where(logits.amax(dim=-1).isfinite(), -1)


def _of_rows(logits: Tensor, value: float | Tensor) -> Tensor:
    """Returns float32 `[batch]` on the logits' device."""
    if isinstance(value, Tensor):
        return value
    return logits.new_full(logits.shape[:1], in_float32(value), dtype=torch.float32)


def in_float32(temperature: float) -> float:
    """Clips a temperature to float32's range; at its largest number all tokens are equally likely
    anyway."""
    return min(temperature, torch.finfo(torch.float32).max)


def uniform_draws(seed: int | None, index: int, count: int) -> np.ndarray:
    """Returns float32 `[count]` in [0, 1), determined by (seed, index); a larger count extends the
    same sequence. None uses a new seed."""
    seed = secrets.randbits(64) if seed is None else seed
    return np.random.default_rng((seed, index)).random(count, dtype=np.float32)


def check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    """Raises ValueError for sampling settings that `generate` refuses."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:  # false for NaN
        raise ValueError(f"temperature: expected a finite number ≥ 0; got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1]; got {top_p!r}")
    if seed is not None and (not is_whole(seed) or seed < 0):
        raise ValueError(f"seed: expected an int of at least 0, or None; got {seed!r}")


def _is_number(value: Any) -> bool:
    """Returns whether it is a number, not a tensor, whose value would need a device
    synchronisation."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
