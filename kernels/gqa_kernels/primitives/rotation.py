"""Loads, rotates and stores pairs of features of some heads.

(a, b) are tiles `[BLOCK_H, BLOCK_PAIRS]`: all first and all second features of the pairs of BLOCK_H
heads, in float32. A pair is (2i, 2i + 1) if interleaved, otherwise (i, i + HEAD_DIM / 2).
"""

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """Some heads of one token, `[BLOCK_H]` each."""

    ptrs: Any  # to the data of each head: its features, or its scale
    exist: Any


@triton.jit
def heads_at(ptr, stride, first_head, NUM_HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Returns heads first_head … first_head + BLOCK_H − 1 of the token at ptr."""
    heads = first_head + tl.arange(0, BLOCK_H)
    return Heads(ptr + heads.to(tl.int64) * stride, heads < NUM_HEADS)


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, position, max_seq_len, HEAD_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):
    """Loads (cos, sin) `[1, BLOCK_PAIRS]` of a position: NaN outside the table, since a kernel
    cannot raise; 0 for pairs beyond the head, so that they stay 0."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    # Clamps to one row beyond the table, so that the offset of a huge position cannot wrap into it.
    position = tl.minimum(tl.maximum(position, -1), max_seq_len)
    angle = position * HALF + pairs  # index into cos and sin
    mask = (pairs < HALF) & (angle >= 0) & (angle < max_seq_len.to(tl.int64) * HALF)
    cos = tl.load(cos_ptr + angle, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + angle, mask=mask, other=float("nan"))
    return tl.where(pairs < HALF, cos, 0.0), tl.where(pairs < HALF, sin, 0.0)


@triton.jit
def rotate(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def load_pairs(heads, HEAD_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Loads (a, b) of some heads; 0 where there is no such head or feature."""
    ptrs, exist = heads.ptrs[:, None], heads.exist[:, None]
    if INTERLEAVED:
        # Loads both features of a pair in one access: strided loads would not be 16 bytes wide.
        features = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        mask = exist & (features < HEAD_DIM)
        x = tl.load(ptrs + features, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_PAIRS, 2]))
    else:
        HALF: tl.constexpr = HEAD_DIM // 2
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        mask = exist & (pairs < HALF)
        a = tl.load(ptrs + pairs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptrs + HALF + pairs, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(heads, a, b, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Stores (a, b), converted to the dtype of the pointers, for heads and features that exist."""
    BLOCK_PAIRS: tl.constexpr = a.shape[1]
    dtype = heads.ptrs.dtype.element_ty
    ptrs, exist = heads.ptrs[:, None], heads.exist[:, None]
    if INTERLEAVED:
        features = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        mask = exist & (features < HEAD_DIM)
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * BLOCK_PAIRS])
        tl.store(ptrs + features, x.to(dtype), mask=mask)
    else:
        HALF: tl.constexpr = HEAD_DIM // 2
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        mask = exist & (pairs < HALF)
        tl.store(ptrs + pairs, a.to(dtype), mask=mask)
        tl.store(ptrs + HALF + pairs, b.to(dtype), mask=mask)


@cache
def heads_per_program(*head_counts: int) -> int:
    """The largest power of two up to 8 that divides the head counts, so that no lane is idle; at
    least 4, which one warp's 16-byte loads cover at head_dim 128."""
    block = 8
    while block > 4 and any(count % block for count in head_counts):
        block //= 2
    return block
