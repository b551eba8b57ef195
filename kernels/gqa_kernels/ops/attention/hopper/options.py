"""Options of the forward kernel for Hopper: which keys a query sees, and what their scores are.

Windows and the soft cap are those of `primitives/scores.py`. The tiles at both ends of the keys
that a block of queries sees get a mask, the first one that it processes in any case; those between
them get none.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gqa_kernels.ops.attention.hopper.tiles import hide, key_tiles
from gqa_kernels.primitives.soft_cap import cap


class Options(NamedTuple):
    """A query sees the keys own_key − window_left … own_key + window_right."""

    window_left: Any  # None, and then both, without a window
    window_right: Any
    cap_scale: Any  # None without a soft cap
    cu_seqlens_q: Any  # pointers to the bounds of packed sequences, or None
    cu_seqlens_kv: Any
    num_sequences: Any


class KeyTiles(NamedTuple):
    """The tiles of keys from `first` on that a block processes, from the last one downwards:
    `num_free` without a mask and, at the end, `num_left` that contain keys before the window."""

    first: Any
    count: Any
    num_free: Any
    num_left: Any


@gluon.jit
def seen_tiles(
    first_row, sizes, options, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr
):
    """The tiles that BLOCK_M queries process.

    Args:
        CAUSAL: without a window, a query sees the keys up to its own one instead of all.
    """
    if options.window_left is None:
        count, num_free = key_tiles(first_row, sizes, BLOCK_M, BLOCK_N, CAUSAL)
        return KeyTiles(0, count, num_free, 0)
    else:
        own_key = first_row + sizes.seq_len_kv - sizes.seq_len_q  # of the first row
        num_seen = gl.minimum(sizes.seq_len_kv, own_key + BLOCK_M + options.window_right)
        last = gl.maximum(num_seen + BLOCK_N - 1, BLOCK_N) // BLOCK_N - 1
        first = gl.minimum(gl.maximum(own_key - options.window_left, 0) // BLOCK_N, last)
        # From the tile `low` on, no key is before the window; before the tile `high`, none is
        # after it.
        low = gl.maximum(own_key + BLOCK_M - 1 - options.window_left + BLOCK_N - 1, 0) // BLOCK_N
        end = gl.minimum(sizes.seq_len_kv, own_key + options.window_right + 1)
        high = gl.maximum(end, 0) // BLOCK_N
        low = gl.minimum(gl.maximum(low, first), last)
        high = gl.minimum(gl.maximum(high, first), last)
        num_free = gl.maximum(high - low, 0)
        num_left = gl.minimum(low, high) - first
        return KeyTiles(first, last - first + 1, num_free, num_left)


@gluon.jit
def score(
    products,
    own_keys,
    start,
    seq_len_kv,
    options,
    LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASK: gl.constexpr,
):
    """Scores `[row, key]`: capped, and −inf where MASK hides a key from a row.

    Args:
        own_keys: the key that each row is aligned with.
        start: the first key of the tile.
        MASK: None: hides none. "all": keys that a row does not see. In tiles with a window of which
            all keys exist, "window" does the same and, if none of them is after the window, "left".
    """
    scores = cap(products, options.cap_scale)
    if MASK is None:
        return scores
    elif options.window_left is None:
        return hide(scores, own_keys, start, seq_len_kv, LAYOUT, CAUSAL)
    else:
        BLOCK_N: gl.constexpr = scores.shape[1]
        keys = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
        if MASK == "left":
            seen = keys >= gl.expand_dims(own_keys - (start + options.window_left), 1)
        else:  # one comparison of the distance from the last key, unsigned, saves registers
            last = gl.expand_dims(own_keys - (start - options.window_right), 1)
            width = options.window_left.to(gl.uint32) + options.window_right.to(gl.uint32)
            seen = (last - keys).to(gl.uint32) <= width
        if MASK == "all":
            seen = seen & (keys < seq_len_kv - start)
        return gl.where(seen, scores, -float("inf"))
