"""The kernel of prefill attention; `prefill.py` says what it computes and in which order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.ops.cache.pages import Cached, Pages
from gqa_kernels.ops.cache.splits import Partials, combine, is_last, publish
from gqa_kernels.ops.cache.tile import KeyValues, attend_to_tile, load_length
from gqa_kernels.primitives import packed
from gqa_kernels.primitives.scores import Scoring, Visible, key_tiles
from gqa_kernels.primitives.tiles import LOG2_E, Softmax, empty_softmax, finish_softmax


class Queries(NamedTuple):
    """Packed rows: the new tokens of a sequence × the query heads of a key/value head."""

    token: Any  # of the sequence
    head: Any  # of all query heads
    row: Any  # of q, int64
    exist: Any


class NewTokens(NamedTuple):
    """The new tokens of a sequence."""

    first_token: Any  # of all new tokens, int64
    num_tokens: Any
    seq_len: Any  # the length of the sequence, these included


@triton.jit
def _unpack(packed_rows, new, kv_head, GROUP_SIZE: tl.constexpr):
    """Returns the queries of packed rows."""
    token = packed_rows // GROUP_SIZE
    head = (kv_head * GROUP_SIZE + packed_rows % GROUP_SIZE).to(tl.int64)
    return Queries(token, head, new.first_token + token, token < new.num_tokens)


@triton.jit
def _store(
    out_ptr, lse_ptr, out, lse, queries, total_q, NUM_Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Stores the results of some queries; lse unless lse_ptr is None."""
    columns = tl.arange(0, out.shape[1])[None, :]
    ptrs = out_ptr + ((queries.row * NUM_Q_HEADS + queries.head) * HEAD_DIM)[:, None] + columns
    mask = queries.exist[:, None] & (columns < HEAD_DIM)
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + queries.head * total_q + queries.row, lse, mask=queries.exist)


@triton.jit
def _attend(
    q_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    q_strides,
    new,
    queries,
    cache,
    pages,
    v_scale,
    first_own_key,
    split,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    IS_SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    MOST_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Returns (out, lse) of some queries over the keys that they see, or over those in a split. The
    first query is aligned with first_own_key; all of them belong to at most MOST_TOKENS tokens."""
    BLOCK_M: tl.constexpr = queries.row.shape[0]
    columns = tl.arange(0, BLOCK_D)[None, :]
    q_mask = queries.exist[:, None] & (columns < HEAD_DIM)
    q_offsets = queries.row * q_strides[0] + queries.head * q_strides[1]
    q = tl.load(q_ptr + q_offsets[:, None] + columns, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    own_keys = new.seq_len - new.num_tokens + queries.token
    slopes = None
    if alibi_slopes_ptr is not None:
        slopes = tl.load(alibi_slopes_ptr + queries.head, mask=queries.exist, other=0.0)
        slopes = (slopes / score_unit)[:, None]
    scoring = Scoring(own_keys[:, None], cap_scale, slopes, score_unit * LOG2_E)
    visible = Visible(own_keys[:, None], new.seq_len, window_left, window_right, None, None, None)
    softmax = empty_softmax(BLOCK_M, BLOCK_D)
    if sinks_ptr is not None:  # start as if a key with value 0 had been seen
        here = queries.exist
        if IS_SPLIT:
            # In the split in which the row's own window begins: the row's bits do not depend on
            # splits that only other rows see.
            begin = own_keys * 0
            if window_left is not None:
                begin = tl.maximum(own_keys - window_left, 0)
            here = begin // SPLIT_KEYS == split
        sinks = tl.load(sinks_ptr + queries.head, mask=queries.exist, other=0.0).to(tl.float32)
        running_max = tl.where(here, sinks / score_unit, softmax.running_max)
        running_sum = tl.where(here, 1.0, softmax.running_sum)
        softmax = Softmax(running_max, running_sum, running_sum, softmax.accumulator)

    first_tile, num_tiles, num_free = key_tiles(first_own_key, visible, MOST_TOKENS, BLOCK_N)
    end_tile = first_tile + num_tiles
    first_masked = first_tile + num_free
    if IS_SPLIT:  # all tiles are masked: loading keys takes longer
        SPLIT_TILES: tl.constexpr = SPLIT_KEYS // BLOCK_N
        first_masked = tl.maximum(first_tile, split * SPLIT_TILES)
        end_tile = tl.minimum(end_tile, (split + 1) * SPLIT_TILES)
    # Loop invariants are recomputed for each tile (disable_licm): hoisted, they would take the
    # registers of larger tiles.
    # A tile of which a row sees no key must not change the row, not even by a rounding: EXACT.
    if window_left is None and not IS_SPLIT:  # otherwise all tiles are masked
        for start in tl.range(
            first_tile * BLOCK_N,
            first_masked * BLOCK_N,
            BLOCK_N,
            num_stages=NUM_STAGES,
            disable_licm=True,
        ):
            softmax = attend_to_tile(
                q, start, new.seq_len, pages, cache, visible, scoring, softmax,
                False, True, HEAD_DIM, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
    for start in tl.range(
        first_masked * BLOCK_N,
        end_tile * BLOCK_N,
        BLOCK_N,
        num_stages=NUM_STAGES,
        disable_licm=True,
    ):
        softmax = attend_to_tile(
            q, start, new.seq_len, pages, cache, visible, scoring, softmax,
            True, True, HEAD_DIM, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    out, log_sum = finish_softmax(softmax)
    if v_scale is not None:
        out *= v_scale
    return out, softmax.running_max * score_unit + log_sum


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "programs_per_sequence",
        "partial_tokens",
        "total_q",
        "capacity",
        "num_pages",
        "num_slots",
        "window_left",
        "window_right",
    ]
)
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    block_table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    counters_ptr,
    q_strides,
    k_strides,
    v_strides,
    seq_lens_stride,
    block_table_strides,
    k_scale_strides,
    v_scale_strides,
    alibi_stride,
    num_sequences,
    programs_per_sequence,
    partial_tokens,
    total_q,
    capacity,
    num_pages,
    num_slots,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_LSE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """An item of work: BLOCK_M packed queries attend to the keys of one key/value head that they
    see, or to those in a split of SPLIT_KEYS keys.

    The first programs_per_sequence programs of a sequence and key/value head share the items of a
    sequence of at most SPLIT_TOKENS new tokens, its blocks of rows × splits. Each of the programs
    after these has one block of a longer sequence, with all its keys, or nothing to do.
    """
    tl.static_assert(SPLIT_KEYS % BLOCK_N == 0)
    tl.static_assert(BLOCK_M % BLOCK_R == 0)  # only the rows of the block are combined
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    # The most blocks of a sequence whose keys are split.
    SPLIT_BLOCKS: tl.constexpr = (SPLIT_TOKENS * GROUP_SIZE + BLOCK_M - 1) // BLOCK_M
    # The most tokens that BLOCK_M packed rows belong to.
    MOST_TOKENS: tl.constexpr = (BLOCK_M + GROUP_SIZE - 2) // GROUP_SIZE + 1
    program = tl.program_id(0)
    num_sharing = programs_per_sequence * num_sequences * NUM_KV_HEADS
    shares = program < num_sharing
    kv_head = program % NUM_KV_HEADS
    sequence = program // NUM_KV_HEADS % num_sequences
    item = program // NUM_KV_HEADS // num_sequences
    if not shares:
        program -= num_sharing
        num_blocks = total_q * GROUP_SIZE // BLOCK_M + num_sequences + 1
        kv_head = program // num_blocks
        sequence, item = packed.find(
            cu_seqlens_q_ptr, num_sequences, total_q, program % num_blocks, BLOCK_M, GROUP_SIZE
        )
    first_token, num_tokens = packed.bounds(
        cu_seqlens_q_ptr, sequence, num_sequences, total_q, total_q
    )
    num_row_blocks = tl.cdiv(num_tokens * GROUP_SIZE, BLOCK_M)
    # The tokens after the last sequence count as those of a longer one, without keys.
    is_split = (num_tokens <= SPLIT_TOKENS) & (sequence < num_sequences)
    if (is_split != shares) | (num_tokens == 0):
        return
    batch = tl.minimum(sequence, num_sequences - 1).to(tl.int64)
    seq_len = load_length(seq_lens_ptr, batch, seq_lens_stride, capacity)
    new = NewTokens(first_token, num_tokens, tl.where(sequence < num_sequences, seq_len, 0))

    k = Cached(k_ptr + kv_head.to(tl.int64) * k_strides[2], k_strides[0], k_strides[1])
    v = Cached(v_ptr + kv_head.to(tl.int64) * v_strides[2], v_strides[0], v_strides[1])
    k_scales = None
    v_scales = None
    k_scale = None
    v_scale = None
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * k_scale_strides[-1]
        v_scale_ptr += kv_head * v_scale_strides[-1]
        if SCALE_PER_TOKEN:
            k_scales = Cached(k_scale_ptr, k_scale_strides[0], k_scale_strides[1])
            v_scales = Cached(v_scale_ptr, v_scale_strides[0], v_scale_strides[1])
        else:
            k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    cache = KeyValues(k, v, k_scales, v_scales, k_scale)
    table_stride = None
    if block_table_ptr is not None:
        block_table_ptr += batch * block_table_strides[0]
        table_stride = block_table_strides[1]
    pages = Pages(batch, block_table_ptr, table_stride, num_pages)
    if alibi_slopes_ptr is not None:
        alibi_slopes_ptr += batch * alibi_stride

    if not shares:
        # Causal: the last queries see the most keys, so they start first.
        if item < num_row_blocks:
            first_row = (num_row_blocks - 1 - item) * BLOCK_M
            queries = _unpack(first_row + tl.arange(0, BLOCK_M), new, kv_head, GROUP_SIZE)
            first_own_key = new.seq_len - num_tokens + first_row // GROUP_SIZE
            out, lse = _attend(
                q_ptr, sinks_ptr, alibi_slopes_ptr, q_strides, new, queries, cache, pages, v_scale,
                first_own_key, 0, window_left, window_right, score_unit, cap_scale,
                False, SPLIT_KEYS, MOST_TOKENS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, NUM_STAGES,
            )  # fmt: skip
            _store(out_ptr, lse_ptr, out, lse, queries, total_q, NUM_Q_HEADS, HEAD_DIM)
    else:
        first_split = 0
        if window_left is not None:  # no query sees a key before the window of the first query
            first_split = tl.maximum(seq_len - num_tokens - window_left, 0) // SPLIT_KEYS
        end_split = tl.maximum(tl.cdiv(seq_len, SPLIT_KEYS), 1)
        num_splits = end_split - first_split
        partials = Partials(partial_ptr, partial_lse_ptr, num_slots)
        # The row of partials that belongs to the sequence's first token.
        first_partial = tl.where(partial_tokens > 0, batch * partial_tokens, first_token)
        counters_ptr += (sequence * NUM_KV_HEADS + kv_head) * SPLIT_BLOCKS
        for part in tl.range(
            item, num_row_blocks * num_splits, programs_per_sequence, disable_licm=True
        ):
            split = first_split + part // num_row_blocks
            block = part % num_row_blocks
            first_row = block * BLOCK_M
            queries = _unpack(first_row + tl.arange(0, BLOCK_M), new, kv_head, GROUP_SIZE)
            first_own_key = new.seq_len - num_tokens + first_row // GROUP_SIZE
            out, lse = _attend(
                q_ptr, sinks_ptr, alibi_slopes_ptr, q_strides, new, queries, cache, pages, v_scale,
                first_own_key, split, window_left, window_right, score_unit, cap_scale,
                True, SPLIT_KEYS, MOST_TOKENS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, NUM_STAGES,
            )  # fmt: skip
            if num_splits == 1:
                _store(out_ptr, lse_ptr, out, lse, queries, total_q, NUM_Q_HEADS, HEAD_DIM)
            else:
                rows = (first_partial + queries.token) * NUM_Q_HEADS + queries.head
                publish(partials, rows, split - first_split, out, lse, queries.exist, HEAD_DIM)
                if is_last(counters_ptr + block, num_splits):
                    end_row = tl.minimum(first_row + BLOCK_M, num_tokens * GROUP_SIZE)
                    for first in tl.range(first_row, end_row, BLOCK_R):
                        some = _unpack(first + tl.arange(0, BLOCK_R), new, kv_head, GROUP_SIZE)
                        some_rows = (first_partial + some.token) * NUM_Q_HEADS + some.head
                        total, total_lse = combine(
                            partials, some_rows, some.exist, first_split, end_split, end_split,
                            HEAD_DIM, BLOCK_LSE, BLOCK_S, BLOCK_D,
                        )  # fmt: skip
                        _store(
                            out_ptr, lse_ptr, total, total_lse, some, total_q,
                            NUM_Q_HEADS, HEAD_DIM,
                        )  # fmt: skip
