"""Tile primitives that two kernels or more use."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr,
    stride,
    start,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Loads rows start … start + BLOCK_ROWS − 1 of a num_rows × WIDTH matrix; 0 outside it."""
    rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    return tl.load(ptr + rows.to(tl.int64) * stride + columns, mask=mask, other=0.0)


class Rows(NamedTuple):
    """The keys or values of one head."""

    source: Any  # a descriptor of `[batch, row, head, feature]`, or a pointer to the head's row 0
    stride: Any  # between rows
    batch: Any
    head: Any
    num_rows: Any


@triton.jit
def load_tile(
    rows,
    start,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Loads BLOCK_ROWS rows from start on of one head; 0 outside its rows and features."""
    if USE_TMA:
        tile = rows.source.load([rows.batch, start, rows.head, 0])
        return tile.reshape([BLOCK_ROWS, BLOCK_D])
    else:
        return load_rows(
            rows.source, rows.stride, start, rows.num_rows, HEAD_DIM, BLOCK_ROWS, BLOCK_D
        )


@triton.jit
def store_rows(
    ptr,
    stride,
    start,
    num_rows,
    tile,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Stores rows start … start + BLOCK_ROWS − 1 of a matrix, as far as they exist."""
    rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    ptrs = ptr + rows.to(tl.int64) * stride + columns
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


class Softmax(NamedTuple):
    """The state of an online softmax: m, ℓ and O of the paper, over the keys so far."""

    running_max: Any
    running_sum: Any
    rounded_sum: Any  # the sum of the weights after rounding; updated only if DROPPED
    accumulator: Any


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    running_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    none = tl.zeros([BLOCK_M], dtype=tl.float32)
    return Softmax(running_max, none, none, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32))


@triton.jit
def online_softmax_step(
    scores, softmax, exponent_scale, DROPPED: tl.constexpr = 0, EXACT: tl.constexpr = False
):
    """Adds a tile of scores `[BLOCK_M, BLOCK_N]` to the running softmax.

    Returns the tile's weights, to be multiplied by V, and the new state. The weights are
    exp2(exponent_scale · (score − max)), so the softmax scale and log2(e) cost no instruction.
    """
    new_max = tl.maximum(softmax.running_max, tl.max(scores, 1))
    # For a row that has seen no key yet, −inf − (−inf) would be NaN; −inf − 0 gives a weight of 0.
    anchor = tl.where(new_max == -float("inf"), 0.0, new_max) * exponent_scale
    weights = tl.math.exp2(scores * exponent_scale - anchor[:, None])
    rescale = tl.math.exp2(softmax.running_max * exponent_scale - anchor)
    if EXACT:
        # In a fused multiply-add, the product above is not rounded like the anchor, so rescale
        # would be only nearly 1, in every tile. That matters in float32 only; with 16-bit weights,
        # this statement would make ptxas sink the exponentials.
        rescale = tl.where(softmax.running_max == new_max, 1.0, rescale)
    running_sum = softmax.running_sum * rescale + tl.sum(weights, 1)
    rounded_sum = softmax.rounded_sum
    if DROPPED > 0:
        # Rounds the bits: a conversion and back would cost as much as the exponential. Ties, one
        # weight in 2¹³ or fewer, are rounded up: rounding to even would cost as much again, and the
        # exponentials would no longer overlap the products.
        bits = weights.to(tl.int32, bitcast=True) + (1 << (DROPPED - 1))
        rounded = (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True)
        rounded_sum = rounded_sum * rescale + tl.sum(rounded, 1)
    accumulator = softmax.accumulator * rescale[:, None]
    return weights, Softmax(new_max, running_sum, rounded_sum, accumulator)


@triton.jit
def add_values(weights, value, softmax):
    """Adds a tile of weighted values to the accumulator of the softmax."""
    accumulator = tl.dot(
        weights.to(value.dtype), value, softmax.accumulator, input_precision="ieee"
    )
    return Softmax(softmax.running_max, softmax.running_sum, softmax.rounded_sum, accumulator)


@triton.jit
def finish_softmax(softmax):
    """Returns (output, natural log of the running sum) of the rows; (0, −inf) for a row that saw no
    key."""
    seen = softmax.running_sum != 0.0
    divisor = tl.where(seen, softmax.running_sum, 1.0)
    log_sum = tl.where(seen, tl.log(divisor), -float("inf"))
    return softmax.accumulator / divisor[:, None], log_sum
