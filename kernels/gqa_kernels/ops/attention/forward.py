"""The forward kernel of flash attention.

    out = softmax(scores) v,  lse = log Σ exp(scores)

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691 (inner loop over keys, division at the
end); Shah et al. 2024, arXiv:2407.08608 (the product of the next tile overlaps the softmax of this
one). Query head h reads key/value head h // GROUP_SIZE: K and V are never repeated.

One program owns BLOCK_M queries of one head. It loops over the key tiles from the last to the
first: the tiles that need a mask, on the diagonal and at the end, come first, and the long loop
applies no mask. Tiles that no query sees are skipped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.ops.attention import sequences
from gqa_kernels.ops.attention.call import Call, block_d, choose, kernel_arguments, tile_arguments
from gqa_kernels.ops.attention.sequences import locate
from gqa_kernels.primitives.residue import residue_of
from gqa_kernels.primitives.scores import (
    Scoring,
    Visible,
    key_tiles,
    load_ranges,
    load_slope,
    mask,
    score,
)
from gqa_kernels.primitives.tiles import (
    LOG2_E,
    Rows,
    Softmax,
    add_values,
    empty_softmax,
    finish_softmax,
    load_rows,
    load_tile,
    online_softmax_step,
    store_rows,
)
from gqa_kernels.runtime import configs, launch, layout, target


@triton.jit
def _multiply(q, k, start, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr):
    """q times BLOCK_N keys from start on: `[BLOCK_M, BLOCK_N]`."""
    key = load_tile(k, start, HEAD_DIM, BLOCK_N, q.shape[1], USE_TMA)
    return tl.dot(q, key.T, input_precision="ieee")


@triton.jit
def _score(products, start, visible, scoring, MASKED: tl.constexpr):
    """Returns scores from products: scaled, capped, biased and, if MASKED, masked."""
    keys = (start + tl.arange(0, products.shape[1]))[None, :]
    scores = score(products, keys, scoring)
    if MASKED:
        scores = mask(scores, keys, visible)
    return scores


@triton.jit
def _fold(
    scores,
    v,
    start,
    scoring,
    softmax,
    EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Adds a tile of scores, and the values of its keys from start on, to the running softmax."""
    BLOCK_N: tl.constexpr = scores.shape[1]
    BLOCK_D: tl.constexpr = softmax.accumulator.shape[1]
    weights, softmax = online_softmax_step(scores, softmax, scoring.exponent_scale, DROPPED, EXACT)
    value = load_tile(v, start, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA)
    return add_values(weights, value, softmax)


@triton.jit
def _walk_ahead(
    q,
    k,
    v,
    visible,
    scoring,
    scores,
    softmax,
    last_tile,
    num_steps,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
    DROPPED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds num_steps tiles, downwards from last_tile, to the softmax; `scores` are those of
    last_tile. Returns the scores of the next tile and the softmax.

    Each step multiplies q by the next tile's keys before it needs the result, so the tensor cores
    are busy while this tile's softmax runs.
    """
    BLOCK_N: tl.constexpr = scores.shape[1]
    EXACT: tl.constexpr = q.dtype == tl.float32
    for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
        start = (last_tile - step) * BLOCK_N
        products = _multiply(q, k, start - BLOCK_N, HEAD_DIM, BLOCK_N, USE_TMA)
        softmax = _fold(scores, v, start, scoring, softmax, EXACT, HEAD_DIM, USE_TMA, DROPPED)
        scores = _score(products, start - BLOCK_N, visible, scoring, MASKED)
    return scores, softmax


@triton.jit
def _walk(
    q,
    k,
    v,
    visible,
    scoring,
    softmax,
    last_tile,
    num_steps,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    DROPPED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds num_steps tiles, downwards from last_tile, to the softmax; returns it. Keeps only one
    tile of scores in registers at a time."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
        start = (last_tile - step) * BLOCK_N
        products = _multiply(q, k, start, HEAD_DIM, BLOCK_N, USE_TMA)
        scores = _score(products, start, visible, scoring, MASKED)
        softmax = _fold(scores, v, start, scoring, softmax, EXACT, HEAD_DIM, USE_TMA, DROPPED)
    return softmax


@triton.jit(
    do_not_specialize=[
        *("num_sequences", "seq_len_q", "seq_len_kv", "section", "window_left", "window_right")
    ]
)
def _forward_kernel(
    q_ptr,
    k,
    v,
    out_ptr,
    residue_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_kv_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    key_ranges_ptr,
    key_mask_ptr,
    q_strides,
    k_strides,
    v_strides,
    alibi_stride,
    key_ranges_strides,
    key_mask_stride,
    num_sequences,
    seq_len_q,
    seq_len_kv,
    num_q_heads,
    section,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program attends from BLOCK_M queries of one head to all the keys that they see."""
    rows_per_batch = seq_len_q
    work = locate(
        cu_seqlens_q_ptr, cu_seqlens_kv_ptr, num_sequences, num_q_heads, seq_len_q, seq_len_kv,
        section, BLOCK_M,
    )  # fmt: skip
    seq_len_q, seq_len_kv = work.num_rows, work.num_other_rows
    if work.block * BLOCK_M >= seq_len_q:
        return
    # Causal: the last queries see the most keys, so they start first.
    start_m = (tl.cdiv(seq_len_q, BLOCK_M) - 1 - work.block) * BLOCK_M
    batch, head, kv_head = work.batch, work.head, work.head // GROUP_SIZE
    batch_64, head_64, kv_head_64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)

    q_ptr += batch_64 * q_strides[0] + work.first_row * q_strides[1] + head_64 * q_strides[2]
    if not USE_TMA:
        first_kv = work.first_other_row
        k += batch_64 * k_strides[0] + first_kv * k_strides[1] + kv_head_64 * k_strides[2]
        v += batch_64 * v_strides[0] + first_kv * v_strides[1] + kv_head_64 * v_strides[2]
    q = load_rows(q_ptr, q_strides[1], start_m, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    k = Rows(k, k_strides[1], batch, kv_head, seq_len_kv)
    v = Rows(v, v_strides[1], batch, kv_head, seq_len_kv)

    first_own_key = start_m + seq_len_kv - seq_len_q
    own_keys = (first_own_key + tl.arange(0, BLOCK_M))[:, None]
    queries = start_m + tl.arange(0, BLOCK_M)
    first_keys = None
    end_keys = None
    if key_ranges_ptr is not None:
        first_keys, end_keys = load_ranges(
            key_ranges_ptr, key_ranges_strides, batch, queries[:, None], seq_len_q, seq_len_kv
        )  # [BLOCK_M, 1]
    if key_mask_ptr is not None:
        key_mask_ptr += batch_64 * key_mask_stride
    visible = Visible(
        own_keys, seq_len_kv, window_left, window_right, first_keys, end_keys, key_mask_ptr
    )
    first_tile, num_tiles, num_free = key_tiles(first_own_key, visible, BLOCK_M, BLOCK_N)
    slope = load_slope(alibi_slopes_ptr, alibi_stride, work.sequence, head, score_unit)
    scoring = Scoring(own_keys, cap_scale, slope, score_unit * LOG2_E)
    # How many bits of float32 the weights lose when rounded; only the residue needs that.
    LOST: tl.constexpr = 16 if q.dtype == tl.bfloat16 else 13
    DROPPED: tl.constexpr = LOST if residue_ptr is not None else 0
    softmax = empty_softmax(BLOCK_M, BLOCK_D)
    if sinks_ptr is not None:  # start as if a key with value 0 had been seen
        sink = tl.load(sinks_ptr + head).to(tl.float32) / score_unit
        running_max = tl.zeros([BLOCK_M], dtype=tl.float32) + sink
        one = softmax.running_sum + 1.0
        softmax = Softmax(running_max, one, one, softmax.accumulator)

    last_tile = first_tile + num_tiles - 1
    LIMITED: tl.constexpr = first_keys is not None or key_mask_ptr is not None
    ALL_MASKED: tl.constexpr = window_left is not None or LIMITED
    if AHEAD:
        products = _multiply(q, k, last_tile * BLOCK_N, HEAD_DIM, BLOCK_N, USE_TMA)
        scores = _score(products, last_tile * BLOCK_N, visible, scoring, True)
        if ALL_MASKED or window_right is not None:
            num_masked = num_tiles - 1 - num_free
            scores, softmax = _walk_ahead(
                q, k, v, visible, scoring, scores, softmax, last_tile, num_masked,
                True, HEAD_DIM, USE_TMA, DROPPED, NUM_STAGES,
            )  # fmt: skip
            last_tile -= num_masked
        if not ALL_MASKED:
            scores, softmax = _walk_ahead(
                q, k, v, visible, scoring, scores, softmax, last_tile, num_free,
                False, HEAD_DIM, USE_TMA, DROPPED, NUM_STAGES,
            )  # fmt: skip
        EXACT: tl.constexpr = q.dtype == tl.float32
        start = first_tile * BLOCK_N
        softmax = _fold(scores, v, start, scoring, softmax, EXACT, HEAD_DIM, USE_TMA, DROPPED)
    else:
        num_masked = num_tiles - num_free
        softmax = _walk(
            q, k, v, visible, scoring, softmax, last_tile, num_masked,
            True, HEAD_DIM, BLOCK_N, USE_TMA, DROPPED, NUM_STAGES,
        )  # fmt: skip
        if not ALL_MASKED:
            softmax = _walk(
                q, k, v, visible, scoring, softmax, last_tile - num_masked, num_free,
                False, HEAD_DIM, BLOCK_N, USE_TMA, DROPPED, NUM_STAGES,
            )  # fmt: skip

    out, log_sum = finish_softmax(softmax)
    row = batch_64 * rows_per_batch + work.first_row  # the sequence's first row of out
    offset, stride = (row * num_q_heads + head) * HEAD_DIM, num_q_heads * HEAD_DIM
    if residue_ptr is not None:
        rounded_sum = tl.where(softmax.rounded_sum != 0.0, softmax.rounded_sum, 1.0)
        share = softmax.running_sum / rounded_sum - 1.0
        rounded = out.to(out_ptr.dtype.element_ty)
        residue = residue_of(out * share[:, None] + (out - rounded.to(tl.float32)), rounded)
        store_rows(
            residue_ptr + offset, stride, start_m, seq_len_q, residue, HEAD_DIM, BLOCK_M, BLOCK_D
        )
    store_rows(out_ptr + offset, stride, start_m, seq_len_q, out, HEAD_DIM, BLOCK_M, BLOCK_D)
    if lse_ptr is not None:
        lse_ptr += (batch_64 * num_q_heads + head) * rows_per_batch + work.first_row
        lse = softmax.running_max + log_sum / score_unit
        tl.store(lse_ptr + queries, lse, mask=queries < seq_len_q)


_launch = launch.launcher(_forward_kernel)


def launch_forward(
    call: Call, *, need_lse: bool, need_residue: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse, residue) of a prepared call, each of the last two None unless needed.

    Returns:
        out: of the shape of the call's q.
        lse: `[batch, num_q_heads, seq_len_q]`, in score units (`scores.py`), so that weights
            recomputed from large scores are as exact as the difference of score and lse.
        residue: int8, of the shape of a 16-bit out: the difference between the mean of the values
            under the rounded weights that multiplied them, which the backward pass needs, and out
            (`backward.py`).
    """
    q, k, v = call.q, call.k, call.v
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full((batch, num_q_heads, seq_len_q), -torch.inf, dtype=torch.float32)
        if call.sinks is not None:
            lse.copy_(call.sinks[:, None] / call.score_unit)
        residue = q.new_zeros(q.shape, dtype=torch.int8) if need_residue else None
        return q.new_zeros(q.shape), lse if need_lse else None, residue
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = residue = None
    if need_lse:
        lse = torch.empty(batch, num_q_heads, seq_len_q, dtype=torch.float32, device=q.device)
    if need_residue:
        residue = torch.empty_like(q, dtype=torch.int8, memory_format=torch.contiguous_format)
    with target.device_of(q):
        config = choose(call, configs.ATTENTION_FORWARD)
        # A TMA tile could reach into the rows of the next packed sequence.
        use_tma = target.current().has_tma and not call.packed
        use_tma = use_tma and layout.fits_tma(k) and layout.fits_tma(v)
        block = (config.block_n, block_d(head_dim))
        num_blocks = sequences.num_blocks(seq_len_q, call.num_sequences, config.block_m)
        _launch(
            (num_blocks * num_q_heads * batch,),
            q_ptr=q,
            k=layout.descriptor(k, *block) if use_tma else k,
            v=layout.descriptor(v, *block) if use_tma else v,
            out_ptr=out,
            residue_ptr=residue,
            lse_ptr=lse,
            sinks_ptr=call.sinks,
            num_q_heads=num_q_heads,
            section=sequences.section_of_queries(call),
            USE_TMA=use_tma,
            AHEAD=config.ahead,
            **kernel_arguments(call),
            **tile_arguments(config),
        )
    return out, lse, residue
