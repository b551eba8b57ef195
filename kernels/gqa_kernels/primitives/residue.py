"""Stores in 8 bits what a number lost when it was rounded to 16 bits.

    residue = round((exact − rounded) / step)        restored = rounded + residue · step

where step is 1/128 of the spacing of 16-bit numbers of this size: `restored` has seven bits more
than `rounded` if `exact` is within one spacing of `rounded`. Larger residues are clamped.
"""

import triton
import triton.language as tl


@triton.jit
def _exponent(rounded):
    """Returns the exponent bits of the number as float32, clamped from below: the spacing of
    float16 is constant below 2⁻¹⁴, and the steps of bfloat16 below 2⁻¹⁰⁰ would be subnormal."""
    LEAST: tl.constexpr = 127 - 100 if rounded.dtype == tl.bfloat16 else 127 - 14
    return tl.maximum(rounded.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000, LEAST << 23)


@triton.jit
def _steps(rounded):
    """The number of steps in a power of two: 128 for each 16-bit number between it and the next."""
    BITS: tl.constexpr = 7 + 7 if rounded.dtype == tl.bfloat16 else 10 + 7
    return 1 << BITS


@triton.jit
def residue_of(difference, rounded):
    """Returns the int8 residue of `difference` = exact − rounded; undefined if not finite."""
    inverse = ((254 << 23) - _exponent(rounded)).to(tl.float32, bitcast=True)
    steps = difference * (inverse * _steps(rounded))
    steps = tl.minimum(tl.maximum(tl.floor(steps + 0.5), -128.0), 127.0)
    return tl.where(steps == steps, steps, 0.0).to(tl.int8)


@triton.jit
def restore(rounded, residue):
    """Returns the restored number in float32; a number that is not finite is returned as it is."""
    exponent, number = _exponent(rounded), rounded.to(tl.float32)
    step = exponent.to(tl.float32, bitcast=True) / _steps(rounded)
    return tl.where(exponent == 0x7F800000, number, number + residue.to(tl.float32) * step)
