"""One step of attention over a cache: a tile of queries attends to a tile of keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.ops.cache.pages import load_scales, load_vectors, locate_keys
from gqa_kernels.primitives.scores import mask, score
from gqa_kernels.primitives.tiles import Softmax, online_softmax_step


class KeyValues(NamedTuple):
    """The cached keys and values of one key/value head, each a `Cached`, and their scales; the
    scales of values per head are for the caller to multiply by."""

    k: Any
    v: Any
    k_scales: Any  # one per token, a `Cached`; None in an unquantised cache and with k_scale
    v_scales: Any
    k_scale: Any  # of the head; None in an unquantised cache and with k_scales


@triton.jit
def load_length(seq_lens_ptr, index, stride, capacity):
    """Loads a sequence's length, clamped to [0, capacity] before it is cast to 32 bits."""
    if seq_lens_ptr is None:
        return tl.cast(capacity, tl.int32)
    length = tl.load(seq_lens_ptr + index * stride).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)


@triton.jit
def _multiply(q, key):
    """q keyᵀ. A single row, 1/16 of a matrix tile, is multiplied as a vector."""
    if q.shape[0] == 1:
        return tl.sum(q.to(tl.float32) * key.to(tl.float32), 1)[None, :]
    return tl.dot(q, key.T, input_precision="ieee")


@triton.jit
def _add(weights, value, accumulator):
    """accumulator + Σⱼ weightⱼ · valueⱼ."""
    if weights.shape[0] == 1:
        return accumulator + tl.sum(tl.trans(weights) * value.to(tl.float32), 0)[None, :]
    return tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")


@triton.jit
def _add_scaled(weights, scales, value, accumulator):
    """accumulator + Σⱼ weightⱼ · scaleⱼ · valueⱼ.

    The weights, which are fewer than the values, are multiplied by the scales, divided by the
    largest scale first: small scales would underflow in float16.
    """
    largest = tl.max(tl.abs(scales), 0)
    ratios = scales / tl.where(largest == 0.0, 1.0, largest)
    added = _add(weights * ratios[None, :], value, tl.zeros_like(accumulator))
    return accumulator + largest * added


@triton.jit
def attend_to_tile(
    q,
    start,
    end,
    pages,
    cache,
    visible,
    scoring,
    softmax,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the keys start … start + BLOCK_N − 1, as far as they are below end, to the running
    softmax of the queries q.

    start is a multiple of BLOCK_N and below end, unless end is 0. Without MASKED, all queries see
    all keys of the tile that exist. EXACT is that of `online_softmax_step`.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    entries = locate_keys(pages, start, end, PAGE_SIZE, BLOCK_N)
    key = load_vectors(cache.k, entries, HEAD_DIM, BLOCK_D)
    scores = _multiply(q, key.to(q.dtype))  # [BLOCK_M, BLOCK_N]
    if cache.k_scales is not None:
        scores *= load_scales(cache.k_scales, entries)[None, :]
    elif cache.k_scale is not None:
        scores *= cache.k_scale
    keys = start + tl.arange(0, BLOCK_N)[None, :]
    scores = score(scores, keys, scoring)
    if pages.table_ptr is not None:
        scores = tl.where(entries.exist[None, :], scores, -float("inf"))
    if MASKED:
        scores = mask(scores, keys, visible)
    weights, softmax = online_softmax_step(scores, softmax, scoring.exponent_scale, 0, EXACT)
    value = load_vectors(cache.v, entries, HEAD_DIM, BLOCK_D).to(q.dtype)
    if cache.v_scales is not None:
        scales = load_scales(cache.v_scales, entries)
        accumulator = _add_scaled(weights, scales, value, softmax.accumulator)
    else:
        accumulator = _add(weights, value, softmax.accumulator)
    return Softmax(softmax.running_max, softmax.running_sum, softmax.rounded_sum, accumulator)
