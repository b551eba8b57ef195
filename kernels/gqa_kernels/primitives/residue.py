"""What rounding to 16 bits took from a number, kept in 8 more.

    residue = round((exact − rounded) / step)        restored = rounded + residue · step

where step is 1/128 of the spacing of 16-bit numbers of this size: `restored` has seven bits more
than `rounded`, as far as `exact` lies within one spacing of it. A residue beyond is the largest
there is.
"""

import triton
import triton.language as tl


@triton.jit
def _exponent(rounded):
    """The exponent bits of the float32 number, those of the least power of two that has a spacing
    of its own: float16 has none below 2⁻¹⁴; of bfloat16, steps below 2⁻¹⁰⁰ would be subnormal."""
    LEAST: tl.constexpr = 127 - 100 if rounded.dtype == tl.bfloat16 else 127 - 14
    return tl.maximum(rounded.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000, LEAST << 23)


@triton.jit
def _steps(rounded):
    """In a power of two: 128 for each of the numbers of 16 bits from it to the next."""
    BITS: tl.constexpr = 7 + 7 if rounded.dtype == tl.bfloat16 else 10 + 7
    return 1 << BITS


@triton.jit
def residue_of(difference, rounded):
    """int8, of exact − rounded; of a number that is not finite it has no meaning."""
    inverse = ((254 << 23) - _exponent(rounded)).to(tl.float32, bitcast=True)
    steps = difference * (inverse * _steps(rounded))
    steps = tl.minimum(tl.maximum(tl.floor(steps + 0.5), -128.0), 127.0)
    return tl.where(steps == steps, steps, 0.0).to(tl.int8)


@triton.jit
def restore(rounded, residue):
    """The number in float32, itself where it is not finite."""
    exponent, number = _exponent(rounded), rounded.to(tl.float32)
    step = exponent.to(tl.float32, bitcast=True) / _steps(rounded)
    return tl.where(exponent == 0x7F800000, number, number + residue.to(tl.float32) * step)
