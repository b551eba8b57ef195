"""Converts products of queries and keys to scores, and masks pairs that do not see each other.

    score = q·k                              in units of softmax_scale
          = tanh(cap_scale · q·k)            in units of softcap; cap_scale = softmax_scale /
          softcap
    score ← score − slope · |own_key − key|  slope in the same unit

Kernels keep scores in such units and multiply by the unit inside the exponent, so without cap and
slope a score is the product itself. The own key of query i is the key that it is aligned with,
i + seq_len_kv − seq_len_q; the query sees the keys own_key − window_left … own_key + window_right.
Causal attention is window_right = 0. In addition to the window, each query may be limited to a
range of keys, and keys may be hidden from all queries. Arguments that are None at launch cost
nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.primitives.soft_cap import cap


class Scoring(NamedTuple):
    """How products of queries and keys become scores, and scores become weights."""

    own_keys: Any  # of each query, in a shape that broadcasts with the scores
    cap_scale: Any  # None without a soft cap
    slope: Any  # None without ALiBi
    exponent_scale: Any  # weight = exp2(exponent_scale · score) / their sum


class Visible(NamedTuple):
    """Which keys a tile of queries sees; None stands for no limit."""

    own_keys: Any  # as in Scoring
    seq_len_kv: Any
    window_left: Any
    window_right: Any
    first_keys: Any  # of each query, in the shape of own_keys
    end_keys: Any
    key_mask_ptr: Any  # at key 0 of the batch entry


@triton.jit
def cap_derivative(capped):
    """d score / d product in units of softmax_scale, from the capped score."""
    return 1.0 - capped * capped


@triton.jit
def load_slope(alibi_slopes_ptr, stride, sequence, head, score_unit):
    """A head's slope in score units; None without ALiBi."""
    slope = None
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + sequence * stride + head) / score_unit
    return slope


@triton.jit
def add_bias(scores, keys, scoring):
    if scoring.slope is not None:
        scores -= scoring.slope * tl.abs(scoring.own_keys - keys).to(tl.float32)
    return scores


@triton.jit
def score(products, keys, scoring):
    """Converts products of queries and keys to scores: caps them, then adds the bias."""
    return add_bias(cap(products, scoring.cap_scale), keys, scoring)


@triton.jit
def load_ranges(key_ranges_ptr, strides, batch, queries, seq_len_q, seq_len_kv):
    """Loads (first key, end of the keys) that each query may see, in the shape of queries.

    (seq_len_kv, 0) for a query that sees none. Called only if there are ranges, because in Triton
    3.6 a function cannot return a tuple of None.
    """
    exists = queries < seq_len_q
    ptrs = key_ranges_ptr + batch.to(tl.int64) * strides[0] + queries.to(tl.int64) * strides[1]
    first = tl.maximum(tl.load(ptrs, mask=exists, other=0), 0)
    end = tl.minimum(tl.load(ptrs + strides[2], mask=exists, other=0), seq_len_kv)
    first_keys = tl.where(first < end, first, seq_len_kv).to(tl.int32)
    end_keys = tl.where(first < end, end, 0).to(tl.int32)
    return first_keys, end_keys


@triton.jit
def rows_that_see(
    start, end, key_ranges_ptr, strides, batch, seq_len_q, seq_len_kv, BLOCK: tl.constexpr
):
    """Returns (first query, end of the queries) whose ranges contain any of the keys start … end −
    1, and whether all queries between the two see all of those keys."""
    first_query, end_query, num_whole = seq_len_q, 0, 0
    for first in tl.range(0, seq_len_q, BLOCK):
        queries = first + tl.arange(0, BLOCK)
        first_keys, end_keys = load_ranges(
            key_ranges_ptr, strides, batch, queries, seq_len_q, seq_len_kv
        )
        sees = (first_keys < end) & (end_keys > start)
        whole = (first_keys <= start) & (end_keys >= end)
        num_whole += tl.sum(whole.to(tl.int32), 0)
        first_query = tl.minimum(first_query, tl.min(tl.where(sees, queries, seq_len_q), 0))
        end_query = tl.maximum(end_query, tl.max(tl.where(sees, queries + 1, 0), 0))
    return first_query, end_query, num_whole == end_query - first_query


@triton.jit
def mask(scores, keys, visible):
    """Replaces the scores of keys that do not exist, are hidden, or are outside the window or range
    of the query by −inf."""
    seen = keys < visible.seq_len_kv
    if visible.key_mask_ptr is not None:
        seen = tl.load(visible.key_mask_ptr + keys, mask=seen, other=0) != 0
    if visible.first_keys is not None:
        seen = seen & (keys >= visible.first_keys) & (keys < visible.end_keys)
    if visible.window_left is not None:
        seen = seen & (keys >= visible.own_keys - visible.window_left)
    if visible.window_right is not None:
        seen = seen & (keys <= visible.own_keys + visible.window_right)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def key_tiles(first_own_key, visible, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns (first tile, number of tiles, number of tiles at the front that need no mask) of the
    keys that BLOCK_M queries see; the first query is aligned with first_own_key.

    There is at least one tile, so queries that see no key take the same path, with all scores −inf.
    With a left window, ranges or a key mask, all tiles are masked: a left window leaves few tiles,
    too few for separate code for both ends, and the others may hide any key.
    """
    seq_len_kv = visible.seq_len_kv
    LEFT: tl.constexpr = visible.window_left is not None
    RANGES: tl.constexpr = visible.first_keys is not None
    first_key, end_key, num_free_keys = 0, seq_len_kv, seq_len_kv
    if visible.window_right is not None:
        end_key = tl.minimum(end_key, first_own_key + BLOCK_M + visible.window_right)
        num_free_keys = tl.minimum(num_free_keys, first_own_key + visible.window_right + 1)
    if LEFT:
        first_key = tl.maximum(first_own_key - visible.window_left, 0)
    if RANGES:
        first_key = tl.maximum(first_key, tl.min(visible.first_keys))
        end_key = tl.minimum(end_key, tl.max(visible.end_keys))
    end_tile = tl.cdiv(tl.maximum(end_key, 0), BLOCK_N)
    first_tile = 0
    if LEFT or RANGES:
        first_tile = tl.minimum(first_key // BLOCK_N, tl.maximum(end_tile - 1, 0))
    if LEFT or RANGES or visible.key_mask_ptr is not None:
        num_free_keys = 0
    num_tiles = tl.maximum(end_tile - first_tile, 1)
    num_free = tl.minimum(tl.maximum(num_free_keys, 0) // BLOCK_N, num_tiles - 1)
    return first_tile, num_tiles, num_free


@triton.jit
def load_statistics(lse_ptr, delta_ptr, queries, seq_len_q):
    """Loads (lse, delta) of queries; queries that do not exist get weights of 0."""
    exists = queries < seq_len_q
    lse = tl.load(lse_ptr + queries, mask=exists, other=-float("inf"))
    # The lse of a query that sees no key is −∞; ∞ makes all of its weights 0.
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return lse, tl.load(delta_ptr + queries, mask=exists, other=0.0)
