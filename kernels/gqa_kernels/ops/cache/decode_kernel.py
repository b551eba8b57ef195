"""The kernel of decode attention; `decode.py` says what it computes and in which order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.ops.cache.pages import Cached, Pages
from gqa_kernels.ops.cache.splits import Partials, combine, is_last, publish
from gqa_kernels.ops.cache.tile import KeyValues, attend_to_tile, load_length
from gqa_kernels.primitives.scores import Scoring, Visible, load_ranges
from gqa_kernels.primitives.tiles import LOG2_E, Softmax, empty_softmax, finish_softmax


class Queries(NamedTuple):
    """Packed rows: the new tokens of a sequence × the query heads of a key/value head."""

    token: Any
    head: Any  # of all query heads
    row: Any  # in an output `[batch, seq_len_q, num_q_heads]`
    lse_row: Any  # in `[batch, num_q_heads, seq_len_q]`
    exist: Any


@triton.jit
def _cut(seq_len, CHUNK: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """(keys per split, number of splits) of a sequence: a multiple of CHUNK, and at least 1."""
    chunk = tl.maximum(tl.cdiv(seq_len, CHUNK * MAX_SPLITS), 1) * CHUNK
    return chunk, tl.maximum(tl.cdiv(seq_len, chunk), 1)


@triton.jit
def _unpack(
    packed,
    batch,
    kv_head,
    SEQ_LEN_Q: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Returns the queries of packed rows."""
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    token = packed // GROUP_SIZE
    head = (kv_head * GROUP_SIZE + packed % GROUP_SIZE).to(tl.int64)
    row = (batch * SEQ_LEN_Q + token) * NUM_Q_HEADS + head
    lse_row = (batch * NUM_Q_HEADS + head) * SEQ_LEN_Q + token
    return Queries(token, head, row, lse_row, packed < SEQ_LEN_Q * GROUP_SIZE)


@triton.jit
def _store_lse(lse_ptr, lse, queries):
    """Stores lse unless lse_ptr is None."""
    if lse_ptr is not None:
        tl.store(lse_ptr + queries.lse_row, lse, mask=queries.exist)


@triton.jit
def _with_sinks(softmax, sinks_ptr, queries, split, score_unit):
    """Starts the softmax of the first split as if it had seen the sinks, keys with value 0."""
    sinks = tl.load(sinks_ptr + queries.head, mask=queries.exist, other=0.0).to(tl.float32)
    running_max = tl.where(split == 0, sinks / score_unit, softmax.running_max)
    running_sum = tl.where(split == 0, 1.0, softmax.running_sum)
    return Softmax(running_max, running_sum, running_sum, softmax.accumulator)


@triton.jit(do_not_specialize=["capacity", "num_pages", "num_slots", "window_left", "window_right"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seq_lens_ptr,
    block_table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    key_ranges_ptr,
    key_mask_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    out_ptr,
    out_lse_ptr,
    partial_ptr,
    lse_ptr,
    counters_ptr,
    q_strides,
    k_strides,
    v_strides,
    seq_lens_stride,
    block_table_strides,
    k_scale_strides,
    v_scale_strides,
    key_ranges_strides,
    key_mask_stride,
    alibi_stride,
    capacity,
    num_pages,
    num_slots,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SEQ_LEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program attends from BLOCK_M packed queries to every num_programs-th split of the keys
    of one key/value head."""
    tl.static_assert(CHUNK % BLOCK_N == 0)
    tl.static_assert(BLOCK_M % BLOCK_R == 0)  # a program combines its own rows only
    NUM_ROWS: tl.constexpr = SEQ_LEN_Q * GROUP_SIZE
    NUM_ROW_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    first_row = (tl.program_id(0) % NUM_ROW_BLOCKS) * BLOCK_M
    kv_head = (tl.program_id(0) // NUM_ROW_BLOCKS) % NUM_KV_HEADS
    batch = (tl.program_id(0) // NUM_ROW_BLOCKS // NUM_KV_HEADS).to(tl.int64)
    seq_len = load_length(seq_lens_ptr, batch, seq_lens_stride, capacity)
    first_chunk = 0
    if window_left is not None:  # no query sees a key before the window of the first query
        first_key = tl.maximum(seq_len - SEQ_LEN_Q - window_left, 0)
        first_chunk = first_key // CHUNK * CHUNK
    chunk, num_splits = _cut(seq_len - first_chunk, CHUNK, MAX_SPLITS)
    if tl.program_id(1) >= num_splits:
        return

    packed = first_row + tl.arange(0, BLOCK_M)
    queries = _unpack(packed, batch, kv_head, SEQ_LEN_Q, NUM_KV_HEADS, GROUP_SIZE)  # [BLOCK_M]
    columns = tl.arange(0, BLOCK_D)[None, :]
    q_rows = queries.token.to(tl.int64) * q_strides[1] + queries.head * q_strides[2]
    q_mask = queries.exist[:, None] & (columns < HEAD_DIM)
    q_ptrs = q_ptr + batch * q_strides[0] + q_rows[:, None] + columns
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    own_keys = (seq_len - SEQ_LEN_Q + queries.token)[:, None]
    first_keys = None
    end_keys = None
    if key_ranges_ptr is not None:
        first_keys, end_keys = load_ranges(
            key_ranges_ptr, key_ranges_strides, batch, queries.token[:, None], SEQ_LEN_Q, seq_len
        )  # [BLOCK_M, 1]
    if key_mask_ptr is not None:
        key_mask_ptr += batch * key_mask_stride

    k = Cached(k_ptr + kv_head.to(tl.int64) * k_strides[2], k_strides[0], k_strides[1])
    v = Cached(v_ptr + kv_head.to(tl.int64) * v_strides[2], v_strides[0], v_strides[1])
    k_scales = None
    v_scales = None
    k_scale = None
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * k_scale_strides[-1]
        v_scale_ptr += kv_head * v_scale_strides[-1]
        if SCALE_PER_TOKEN:
            k_scales = Cached(k_scale_ptr, k_scale_strides[0], k_scale_strides[1])
            v_scales = Cached(v_scale_ptr, v_scale_strides[0], v_scale_strides[1])
        else:
            k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    cache = KeyValues(k, v, k_scales, v_scales, k_scale)
    partials = Partials(partial_ptr, lse_ptr, num_slots)
    table_stride = None
    if block_table_ptr is not None:
        block_table_ptr += batch * block_table_strides[0]
        table_stride = block_table_strides[1]
    pages = Pages(batch, block_table_ptr, table_stride, num_pages)
    slopes = None
    if alibi_slopes_ptr is not None:
        alibi_slopes_ptr += batch * alibi_stride
        slopes = tl.load(alibi_slopes_ptr + queries.head, mask=queries.exist, other=0.0)
        slopes = (slopes / score_unit)[:, None]
    scoring = Scoring(own_keys, cap_scale, slopes, score_unit * LOG2_E)
    right = window_right
    if IS_CAUSAL:
        right = 0
    visible = Visible(own_keys, seq_len, window_left, right, first_keys, end_keys, key_mask_ptr)
    # Each split recomputes the loop invariants of the loop below (disable_licm): hoisted, they
    # would take a third of the registers.
    for split in tl.range(tl.program_id(1), num_splits, tl.num_programs(1), disable_licm=True):
        start = first_chunk + split * chunk
        end = tl.minimum(start + chunk, seq_len)
        if window_left is not None:
            start = tl.maximum(start, first_key // BLOCK_N * BLOCK_N)
        softmax = empty_softmax(BLOCK_M, BLOCK_D)
        if sinks_ptr is not None:
            softmax = _with_sinks(softmax, sinks_ptr, queries, split, score_unit)
        # A tile of which a row sees no key must not change the row, not even by a rounding: EXACT.
        for tile in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
            softmax = attend_to_tile(
                q, tile, end, pages, cache, visible, scoring, softmax,
                True, True, HEAD_DIM, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip

        out, log_sum = finish_softmax(softmax)
        lse = softmax.running_max * score_unit + log_sum
        if v_scale_ptr is not None and not SCALE_PER_TOKEN:
            out *= v_scale
        if num_splits == 1:
            ptrs = out_ptr + queries.row[:, None] * HEAD_DIM + columns
            tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=q_mask)
            _store_lse(out_lse_ptr, lse, queries)
        else:
            publish(partials, queries.row, split, out, lse, queries.exist, HEAD_DIM)

    if num_splits > 1:
        num_arrivals = tl.minimum(num_splits, tl.num_programs(1))
        if is_last(counters_ptr + tl.program_id(0), num_arrivals):
            for first in tl.range(first_row, tl.minimum(first_row + BLOCK_M, NUM_ROWS), BLOCK_R):
                some = first + tl.arange(0, BLOCK_R)
                rows = _unpack(some, batch, kv_head, SEQ_LEN_Q, NUM_KV_HEADS, GROUP_SIZE)
                total, total_lse = combine(
                    partials, rows.row, rows.exist, 0, num_splits, MAX_SPLITS,
                    HEAD_DIM, MAX_SPLITS, BLOCK_S, BLOCK_D,
                )  # fmt: skip
                ptrs = out_ptr + rows.row[:, None] * HEAD_DIM + columns
                mask = rows.exist[:, None] & (columns < HEAD_DIM)
                tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
                _store_lse(out_lse_ptr, total_lse, rows)
