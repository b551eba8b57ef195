"""The kernel of prefill attention; `prefill.py` says what it computes and in which order."""

import triton
import triton.language as tl

from gqa_kernels.ops.cache.pages import Cached, Pages
from gqa_kernels.ops.cache.tile import KeyValues, attend_to_tile, load_length
from gqa_kernels.primitives import packed
from gqa_kernels.primitives.scores import Scoring, Visible, key_tiles
from gqa_kernels.primitives.tiles import LOG2_E, Softmax, empty_softmax, finish_softmax


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "total_q",
        "capacity",
        "num_pages",
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
    q_strides,
    k_strides,
    v_strides,
    seq_lens_stride,
    block_table_strides,
    k_scale_strides,
    v_scale_strides,
    alibi_stride,
    num_sequences,
    total_q,
    capacity,
    num_pages,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program attends from BLOCK_M packed queries to the keys of one key/value head that they
    see."""
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    # The most tokens that BLOCK_M packed rows belong to.
    MOST_TOKENS: tl.constexpr = (BLOCK_M + GROUP_SIZE - 2) // GROUP_SIZE + 1
    num_blocks = total_q * GROUP_SIZE // BLOCK_M + num_sequences + 1
    kv_head = tl.program_id(0) // num_blocks
    sequence, block = packed.find(
        cu_seqlens_q_ptr, num_sequences, total_q, tl.program_id(0) % num_blocks, BLOCK_M, GROUP_SIZE
    )
    first_token, num_tokens = packed.bounds(
        cu_seqlens_q_ptr, sequence, num_sequences, total_q, total_q
    )
    num_rows = num_tokens * GROUP_SIZE
    if block * BLOCK_M >= num_rows:
        return
    # Causal: the last queries see the most keys, so they start first.
    first_row = (tl.cdiv(num_rows, BLOCK_M) - 1 - block) * BLOCK_M
    batch = tl.minimum(sequence, num_sequences - 1).to(tl.int64)
    seq_len = load_length(seq_lens_ptr, batch, seq_lens_stride, capacity)
    seq_len = tl.where(sequence < num_sequences, seq_len, 0)

    packed_rows = first_row + tl.arange(0, BLOCK_M)
    exist = packed_rows < num_rows
    tokens = packed_rows // GROUP_SIZE  # of the sequence
    heads = (kv_head * GROUP_SIZE + packed_rows % GROUP_SIZE).to(tl.int64)
    rows = first_token + tokens  # of q, int64
    columns = tl.arange(0, BLOCK_D)[None, :]
    q_mask = exist[:, None] & (columns < HEAD_DIM)
    q_offsets = rows * q_strides[0] + heads * q_strides[1]
    q = tl.load(q_ptr + q_offsets[:, None] + columns, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

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
            k_scale = tl.load(k_scale_ptr)
    cache = KeyValues(k, v, k_scales, v_scales, k_scale)
    table_stride = None
    if block_table_ptr is not None:
        block_table_ptr += batch * block_table_strides[0]
        table_stride = block_table_strides[1]
    pages = Pages(batch, block_table_ptr, table_stride, num_pages)

    own_keys = (seq_len - num_tokens + tokens)[:, None]
    slopes = None
    if alibi_slopes_ptr is not None:
        alibi_slopes_ptr += batch * alibi_stride
        slopes = tl.load(alibi_slopes_ptr + heads, mask=exist, other=0.0)
        slopes = (slopes / score_unit)[:, None]
    scoring = Scoring(own_keys, cap_scale, slopes, score_unit * LOG2_E)
    visible = Visible(own_keys, seq_len, window_left, window_right, None, None, None)
    softmax = empty_softmax(BLOCK_M, BLOCK_D)
    if sinks_ptr is not None:  # start as if a key with value 0 had been seen
        sinks = tl.load(sinks_ptr + heads, mask=exist, other=0.0).to(tl.float32)
        one = softmax.running_sum + 1.0
        softmax = Softmax(sinks / score_unit, one, one, softmax.accumulator)

    first_own_key = seq_len - num_tokens + first_row // GROUP_SIZE
    first_tile, num_tiles, num_free = key_tiles(first_own_key, visible, MOST_TOKENS, BLOCK_N)
    first_masked = (first_tile + num_free) * BLOCK_N
    # Loop invariants are recomputed for each tile (disable_licm): hoisted, they would take the
    # registers of larger tiles.
    # A tile of which a row sees no key must not change the row, not even by a rounding: EXACT.
    if window_left is None:  # otherwise all tiles are masked
        for start in tl.range(
            first_tile * BLOCK_N,
            first_masked,
            BLOCK_N,
            num_stages=NUM_STAGES,
            disable_licm=True,
        ):
            softmax = attend_to_tile(
                q, start, seq_len, pages, cache, visible, scoring, softmax,
                False, True, HEAD_DIM, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
    end = (first_tile + num_tiles) * BLOCK_N
    for start in tl.range(first_masked, end, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        softmax = attend_to_tile(
            q, start, seq_len, pages, cache, visible, scoring, softmax,
            True, True, HEAD_DIM, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip

    out, log_sum = finish_softmax(softmax)
    if v_scale_ptr is not None and not SCALE_PER_TOKEN:
        out *= tl.load(v_scale_ptr)
    out_ptrs = out_ptr + ((rows * NUM_Q_HEADS + heads) * HEAD_DIM)[:, None] + columns
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    if lse_ptr is not None:
        lse = softmax.running_max * score_unit + log_sum
        tl.store(lse_ptr + heads * total_q + rows, lse, mask=exist)
