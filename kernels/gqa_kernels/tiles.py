"""Tile primitives that two kernels or more use."""

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
    """Rows start … start + BLOCK_ROWS − 1 of a matrix of num_rows × WIDTH; zero outside it."""
    rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    return tl.load(ptr + rows.to(tl.int64) * stride + columns, mask=mask, other=0.0)


@triton.jit
def load_tile(
    source,
    stride,
    batch,
    head,
    start,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Rows start … of one head: from a descriptor of `[batch, row, head, feature]`, or from a
    pointer to the head's row 0. Zero outside the rows and features."""
    if USE_TMA:
        return source.load([batch, start, head, 0]).reshape([BLOCK_ROWS, BLOCK_D])
    else:
        return load_rows(source, stride, start, num_rows, HEAD_DIM, BLOCK_ROWS, BLOCK_D)


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
    """Writes rows start … start + BLOCK_ROWS − 1 of a matrix, those that exist."""
    rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (rows < num_rows) & (columns < WIDTH)
    ptrs = ptr + rows.to(tl.int64) * stride + columns
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax_step(scores, running_max, running_sum, accumulator, exponent_scale):
    """Folds a tile of scores `[BLOCK_M, BLOCK_N]` into the running softmax (m, ℓ, O of the paper).

    Returns the tile's weights, to be multiplied by V, and the new state. The weights are
    exp2(exponent_scale · (score − max)): the softmax scale and log2(e) cost no instruction.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    # A row that has seen no key yet: −inf − (−inf) would be NaN, −inf − 0 is a weight of 0.
    anchor = tl.where(new_max == -float("inf"), 0.0, new_max) * exponent_scale
    weights = tl.math.exp2(scores * exponent_scale - anchor[:, None])
    rescale = tl.math.exp2(running_max * exponent_scale - anchor)
    running_sum = running_sum * rescale + tl.sum(weights, 1)
    return weights, new_max, running_sum, accumulator * rescale[:, None]


@triton.jit
def finish_softmax(running_max, running_sum, accumulator, softmax_scale):
    """(output, natural log-sum-exp) of the rows; 0 and −inf for a row that saw no key."""
    seen = running_sum != 0.0
    divisor = tl.where(seen, running_sum, 1.0)
    lse = tl.where(seen, running_max * softmax_scale + tl.log(divisor), -float("inf"))
    return accumulator / divisor[:, None], lse
