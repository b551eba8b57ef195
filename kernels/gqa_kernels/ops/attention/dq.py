"""The gradient of queries of flash attention; formulas in `backward.py`.

One program owns BLOCK_M queries of one head and loops over the head's keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.ops.attention import sequences
from gqa_kernels.ops.attention.call import Call, choose, tile_arguments
from gqa_kernels.ops.attention.sequences import locate
from gqa_kernels.primitives.scores import (
    Scoring,
    Visible,
    add_bias,
    cap,
    cap_derivative,
    key_tiles,
    load_ranges,
    load_slope,
    load_statistics,
    mask,
)
from gqa_kernels.primitives.tiles import LOG2_E, Rows, load_rows, load_tile, store_rows
from gqa_kernels.runtime import configs, launch


@triton.jit
def _walk_keys(
    q,
    d_out,
    k,
    v,
    lse,
    delta,
    visible,
    scoring,
    dq,
    first_tile,
    num_steps,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds the contributions of num_steps key tiles from first_tile on to dq; returns dq."""
    BLOCK_D: tl.constexpr = q.shape[1]
    for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
        start = (first_tile + step) * BLOCK_N
        key = load_tile(k, start, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        value = load_tile(v, start, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        capped = cap(tl.dot(q, key.T, input_precision="ieee"), scoring.cap_scale)
        scores = add_bias(capped, keys, scoring) - lse
        if MASKED:
            scores = mask(scores, keys, visible)
        weights = tl.math.exp2(scores * scoring.exponent_scale)
        d_weights = tl.dot(d_out, value.T, input_precision="ieee")
        d_scores = weights * (d_weights - delta)
        if scoring.cap_scale is not None:
            d_scores *= cap_derivative(capped)
        dq = tl.dot(d_scores.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit(
    do_not_specialize=[
        *("num_sequences", "seq_len_q", "seq_len_kv", "section", "window_left", "window_right")
    ]
)
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_kv_ptr,
    alibi_slopes_ptr,
    key_ranges_ptr,
    key_mask_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
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
    softmax_scale,
    score_unit,
    cap_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program sums the gradient of BLOCK_M queries of one head over the keys that they see."""
    rows_q = seq_len_q  # per batch entry
    work = locate(
        cu_seqlens_q_ptr, cu_seqlens_kv_ptr, num_sequences, num_q_heads, seq_len_q, seq_len_kv,
        section, BLOCK_M,
    )  # fmt: skip
    seq_len_q, seq_len_kv = work.num_rows, work.num_other_rows
    if work.block * BLOCK_M >= seq_len_q:
        return
    start_m = (tl.cdiv(seq_len_q, BLOCK_M) - 1 - work.block) * BLOCK_M  # most keys first
    first_q, first_kv = work.first_row, work.first_other_row
    batch, head, kv_head = work.batch, work.head, work.head // GROUP_SIZE
    batch_64, head_64, kv_head_64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    q_ptr += batch_64 * q_strides[0] + first_q * q_strides[1] + head_64 * q_strides[2]
    dout_ptr += batch_64 * dout_strides[0] + first_q * dout_strides[1] + head_64 * dout_strides[2]
    k_ptr += batch_64 * k_strides[0] + first_kv * k_strides[1] + kv_head_64 * k_strides[2]
    v_ptr += batch_64 * v_strides[0] + first_kv * v_strides[1] + kv_head_64 * v_strides[2]
    q = load_rows(q_ptr, q_strides[1], start_m, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    d_out = load_rows(dout_ptr, dout_strides[1], start_m, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    queries = start_m + tl.arange(0, BLOCK_M)
    row = (batch_64 * num_q_heads + head) * rows_q + first_q
    lse, delta = load_statistics(lse_ptr + row, delta_ptr + row, queries, seq_len_q)
    lse, delta = lse[:, None], delta[:, None]

    first_own_key = start_m + seq_len_kv - seq_len_q
    own_keys = (first_own_key + tl.arange(0, BLOCK_M))[:, None]
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
    k = Rows(k_ptr, k_strides[1], batch, kv_head, seq_len_kv)
    v = Rows(v_ptr, v_strides[1], batch, kv_head, seq_len_kv)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if window_left is None and first_keys is None and key_mask_ptr is None:
        dq = _walk_keys(
            q, d_out, k, v, lse, delta, visible, scoring, dq, first_tile, num_free,
            False, HEAD_DIM, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    dq = _walk_keys(
        q, d_out, k, v, lse, delta, visible, scoring, dq, first_tile + num_free,
        num_tiles - num_free, True, HEAD_DIM, BLOCK_N, NUM_STAGES,
    )  # fmt: skip
    dq_ptr += ((batch_64 * rows_q + first_q) * num_q_heads + head) * HEAD_DIM
    store_rows(
        dq_ptr, num_q_heads * HEAD_DIM, start_m, seq_len_q, dq * softmax_scale,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip


_launch = launch.launcher(_dq_kernel)


def query_gradient(call: Call, given: dict[str, Any]) -> Tensor:
    """dq of a prepared call; `given` holds the arguments from `backward.py`."""
    q = call.q
    batch, seq_len_q, num_q_heads, _ = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() > 0:
        config = choose(call, configs.ATTENTION_DQ)
        num_blocks = sequences.num_blocks(seq_len_q, call.num_sequences, config.block_m)
        _launch(
            (num_blocks * num_q_heads * batch,),
            q_ptr=q,
            k_ptr=call.k,
            v_ptr=call.v,
            dq_ptr=dq,
            num_q_heads=num_q_heads,
            section=sequences.section_of_queries(call),
            **given,
            **tile_arguments(config),
        )
    return dq
