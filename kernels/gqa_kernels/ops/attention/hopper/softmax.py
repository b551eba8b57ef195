"""The online softmax of the forward kernel for Hopper, and what the backward kernels share."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)


class Softmax(NamedTuple):
    """The state of an online softmax over the keys so far."""

    running_max: Any
    running_sum: Any
    rounded_sum: Any  # of the weights as they multiply values; only if the residue needs it
    accumulator: Any  # without the values of the last tile
    weights: Any  # of the last tile, the left operand of the product with its values


@gluon.jit
def weigh(scores, running_max, running_sum, exponent_scale, MASKED: gl.constexpr):
    """(weights, new maximum, new sum, factor of all that was summed before) of a tile."""
    new_max = gl.maximum(running_max, gl.max(scores, 1))
    anchor = new_max * exponent_scale
    if MASKED:  # a row that has seen no key yet: −inf − (−inf) would be NaN
        anchor = gl.where(new_max == -float("inf"), 0.0, anchor)
    weights = gl.exp2(scores * exponent_scale - gl.expand_dims(anchor, 1))
    rescale = gl.exp2(running_max * exponent_scale - anchor)
    return weights, new_max, running_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def as_operand(weights, LAYOUT: gl.constexpr):
    """Keeps weights in registers as the left operand of a product."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, LAYOUT, k_width=2))
