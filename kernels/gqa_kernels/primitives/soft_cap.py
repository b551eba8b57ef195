"""The soft cap of scores: score = tanh(cap_scale · product), in units of the cap."""

import triton
import triton.language as tl

_TWICE_LOG2_E = tl.constexpr(2.0 * 1.4426950408889634)


@triton.jit
def _tanh(x):
    """tanh, exact to a few float32 roundings, also near 0, where 1 − 2 / (1 + exp 2x) cancels.

    Both branches and the polynomial: Moshier, Cephes Mathematical Library, `tanhf.c`.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * (square * series)
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.math.exp2(magnitude * _TWICE_LOG2_E))
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def cap(products, cap_scale):
    """Scores of products; the products themselves if cap_scale is None."""
    if cap_scale is not None:
        products = _tanh(products * cap_scale)
    return products
