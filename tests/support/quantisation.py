"""The error of storing a value in 8 bits."""

import torch


def half_a_step(stored, scale):
    """The largest error of a value that was rounded to `stored`: half a step for int8; for
    float8_e4m3fn 2⁻⁴ of the value and at least half the smallest step, 2⁻⁹; plus the float32
    rounding of the quotient and of its product with the scale."""
    size = stored.float().abs()
    half = torch.full_like(size, 0.5)
    if stored.dtype == torch.float8_e4m3fn:
        half = (size * 2.0**-4).clamp(min=2.0**-10)
    return (half + 2 * size * torch.finfo(torch.float32).eps) * scale
