"""Partial results of the splits of a sequence's keys: published, counted and combined.

    lse = log Σₛ exp(lseₛ)        out = Σₛ exp(lseₛ − lse) · outₛ

Every program that computed a split publishes its result and counts itself; the one that arrives
last combines the results in the order of the splits, so the bits do not depend on which one it is.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.primitives.tiles import LOG2_E


class Partials(NamedTuple):
    """Memory for float32 partial results."""

    out_ptr: Any  # [row, slot, HEAD_DIM]
    lse_ptr: Any  # [row, slot]
    num_slots: Any


@triton.jit
def publish(partials, rows, slot, out, lse, exist, HEAD_DIM: tl.constexpr):
    """Stores the results `[BLOCK_M, BLOCK_D]` and `[BLOCK_M]` of a split of some rows."""
    slots = rows * partials.num_slots + slot
    columns = tl.arange(0, out.shape[1])[None, :]
    mask = exist[:, None] & (columns < HEAD_DIM)
    tl.store(partials.out_ptr + slots[:, None] * HEAD_DIM + columns, out, mask=mask)
    tl.store(partials.lse_ptr + slots, lse, mask=exist)


@triton.jit
def is_last(counter_ptr, num_arrivals):
    """Counts an arrival and returns whether it is the last one. The last one sees what the others
    stored, and clears the counter for the next launch."""
    # The barrier orders the stores of all threads before the atomic add of the one that counts.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def combine(
    partials,
    rows,
    exist,
    first_split,
    end_split,
    end_lse,
    HEAD_DIM: tl.constexpr,
    BLOCK_LSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns (out `[BLOCK_R, BLOCK_D]`, lse `[BLOCK_R]`) of some rows, of which the splits
    first_split … end_split − 1 are in the slots from 0 on. end_lse is end_split, or a constant that
    is no smaller: where that is BLOCK_LSE, the first loop is a single step.

    Steps begin at multiples of BLOCK_LSE and BLOCK_S splits, and a split in which a row saw no key
    adds 0 exactly: the bits of a row do not depend on such splits. Other programs wrote the splits,
    so loads bypass the L1 cache, which is not coherent.
    """
    BLOCK_R: tl.constexpr = rows.shape[0]
    slots = rows * partials.num_slots - first_split  # [BLOCK_R], int64
    largest = tl.full([BLOCK_R], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in tl.range(first_split // BLOCK_LSE * BLOCK_LSE, end_lse, BLOCK_LSE):
        every = first + tl.arange(0, BLOCK_LSE)[:, None]
        written = (every >= first_split) & (every < end_split) & exist[None, :]
        ptrs = partials.lse_ptr + slots[None, :] + every
        lses = tl.load(ptrs, mask=written, other=-float("inf"), cache_modifier=".cg")
        before = largest
        largest = tl.maximum(largest, tl.max(lses, 0))
        anchor = tl.where(largest == -float("inf"), 0.0, largest)  # no key: −inf − 0 weighs 0
        weights = tl.math.exp2((lses - anchor[None, :]) * LOG2_E)
        total = total * tl.math.exp2((before - anchor) * LOG2_E) + tl.sum(weights, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    seen = tl.where(total == 0.0, 1.0, total)
    unit = 1.0 / seen  # [BLOCK_R]

    columns = tl.arange(0, BLOCK_D)[None, :]
    out = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for first in tl.range(first_split // BLOCK_S * BLOCK_S, end_split, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)[:, None]
        written = (splits >= first_split) & (splits < end_split) & exist[None, :]
        which = slots[None, :] + splits  # [BLOCK_S, BLOCK_R]
        lse = tl.load(
            partials.lse_ptr + which, mask=written, other=-float("inf"), cache_modifier=".cg"
        )
        partial = tl.load(
            partials.out_ptr + which[:, :, None] * HEAD_DIM + columns[None],
            mask=written[:, :, None] & (columns < HEAD_DIM)[None],
            other=0.0,
            cache_modifier=".cg",
        )
        weights = tl.math.exp2((lse - largest[None, :]) * LOG2_E) * unit[None, :]
        out += tl.sum(weights[:, :, None] * partial, 0)
    return out, tl.where(total == 0.0, -float("inf"), largest + tl.log(seen))
