"""The online softmax of the forward kernel for Hopper, and what the backward kernels share."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)

# A row of scores lies in four threads. Each adds up its own weights: `[row, thread]`.
OF_THREADS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)


class Softmax(NamedTuple):
    """The state of an online softmax over the keys so far."""

    running_max: Any
    running_sum: Any  # of each thread
    rounded_sum: Any  # of the weights as they multiply values; only if the residue needs it
    accumulators: Any  # of the parts of the features, without the values of the last tile
    weights: Any  # of the last tile, the left operand of the product with its values


@gluon.jit
def weigh(scores, running_max, running_sum, exponent_scale, MASKED: gl.constexpr):
    """(weights, new maximum, new sums, factor of all that was summed before) of a tile."""
    new_max = gl.maximum(running_max, gl.max(scores, 1))
    anchor = new_max * exponent_scale
    if MASKED:  # a row that has seen no key yet: −inf − (−inf) would be NaN
        anchor = gl.where(new_max == -float("inf"), 0.0, anchor)
    weights = gl.exp2(scores * exponent_scale - gl.expand_dims(anchor, 1))
    rescale = gl.exp2(running_max * exponent_scale - anchor)
    return weights, new_max, add_weights(running_sum, rescale, weights), rescale


@gluon.jit
def add_weights(sums, rescale, weights):
    """sums · rescale + the sums of each thread's weights."""
    NUM_ROWS: gl.constexpr = weights.shape[0]
    BLOCK_N: gl.constexpr = weights.shape[1]
    weights = weights.reshape([NUM_ROWS, BLOCK_N // 8, 4, 2])
    added = gl.convert_layout(gl.sum(gl.sum(weights, 3), 1), OF_THREADS)
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, OF_THREADS))
    return sums * gl.expand_dims(rescale, 1) + added


@gluon.jit
def sum_of_threads(sums, LAYOUT: gl.constexpr):
    """The sums of whole rows, in a layout."""
    return gl.convert_layout(gl.sum(sums, 1), LAYOUT)


@gluon.jit
def as_operand(weights, LAYOUT: gl.constexpr):
    """Keeps weights in registers as the left operand of a product."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, LAYOUT, k_width=2))
