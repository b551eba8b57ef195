"""The combined reward of two reward models, of helpfulness and of safety.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
"""

import math

SAFETY_THRESHOLD = 0.15  # a probability; below it only the safety reward counts
_THRESHOLD = math.log(SAFETY_THRESHOLD / (1 - SAFETY_THRESHOLD))


def combined(helpful: float, safety: float | None, is_safety: bool) -> float:
    """Returns logit(R_c), where

        R_c = R_s  if the prompt is a safety prompt or R_s < 0.15,
              R_h  otherwise,

    R_h = σ(helpful), R_s = σ(safety), and logit is the inverse of σ: the result is one of the two
    arguments, unrounded. It orders answers to a prompt like R_c.

    Args:
        helpful, safety: outputs of the two reward models, before σ; without a safety model, safety
            is None and the reward is `helpful`.
        is_safety: whether it is a safety prompt.
    Raises:
        ValueError: one of them is not finite.
    """
    for name, value in (("helpful", helpful), ("safety", safety)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite reward; got {value}")
    if safety is not None and (is_safety or safety < _THRESHOLD):
        return safety
    return helpful
