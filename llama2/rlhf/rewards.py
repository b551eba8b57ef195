"""The reward of an answer, of two reward models: is it helpful, is it safe.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
"""

import math

SAFETY_THRESHOLD = 0.15  # a probability: below it an answer is judged by its safety alone
_THRESHOLD = math.log(SAFETY_THRESHOLD / (1 - SAFETY_THRESHOLD))


def combined(helpful: float, safety: float | None, is_safety: bool) -> float:
    """logit(R_c), where

        R_c = R_s  if the prompt is tagged as safety or R_s < 0.15,
              R_h  otherwise,

    R_h = σ(helpful), R_s = σ(safety), and logit is the inverse of σ: what comes back is one of the
    two arguments, unrounded. Answers to one prompt are ordered by it as by R_c.

    Args:
        helpful, safety: what the two reward models give, before σ; without a safety model, None:
            then the reward is `helpful`.
        is_safety: whether the prompt is tagged as safety.
    Raises:
        ValueError: one of them is not finite.
    """
    for name, value in (("helpful", helpful), ("safety", safety)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite reward; got {value}")
    if safety is not None and (is_safety or safety < _THRESHOLD):
        return safety
    return helpful
