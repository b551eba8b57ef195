"""The gradients of keys and values of flash attention; formulas in `backward.py`.

One program owns BLOCK_N keys and values of one key/value head and walks the queries of all the
heads of its group. It computes Sᵀ and dPᵀ as such: the transpose of a product is never the operand
of another (miscompiled for Hopper before Triton 3.7.1).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.ops.attention import sequences
from gqa_kernels.ops.attention.call import Call, choose, kernel_arguments
from gqa_kernels.ops.attention.sequences import locate
from gqa_kernels.primitives.scores import (
    Scoring,
    Visible,
    add_bias,
    cap,
    cap_derivative,
    load_ranges,
    load_slope,
    load_statistics,
    mask,
    rows_that_see,
)
from gqa_kernels.primitives.tiles import LOG2_E, load_rows, store_rows
from gqa_kernels.runtime import configs


@triton.jit(
    do_not_specialize=["num_sequences", "seq_len_q", "seq_len_kv", "window_left", "window_right"]
)
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    num_kv_heads,
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
    RANGES_BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program sums the gradients of BLOCK_N keys and values over all heads of a group."""
    rows_q, rows_kv = seq_len_q, seq_len_kv  # per batch entry
    work = locate(
        cu_seqlens_kv_ptr, cu_seqlens_q_ptr, num_sequences, num_kv_heads, seq_len_kv, seq_len_q,
        BLOCK_N,
    )  # fmt: skip
    seq_len_kv, seq_len_q = work.num_rows, work.num_other_rows
    start_n = work.block * BLOCK_N
    if start_n >= seq_len_kv:
        return
    first_kv, first_q = work.first_row, work.first_other_row
    batch, kv_head = work.batch, work.head
    batch_64, kv_head_64 = batch.to(tl.int64), kv_head.to(tl.int64)
    k_ptr += batch_64 * k_strides[0] + first_kv * k_strides[1] + kv_head_64 * k_strides[2]
    v_ptr += batch_64 * v_strides[0] + first_kv * v_strides[1] + kv_head_64 * v_strides[2]
    key = load_rows(k_ptr, k_strides[1], start_n, seq_len_kv, HEAD_DIM, BLOCK_N, BLOCK_D)
    value = load_rows(v_ptr, v_strides[1], start_n, seq_len_kv, HEAD_DIM, BLOCK_N, BLOCK_D)

    q_ptr += batch_64 * q_strides[0] + first_q * q_strides[1]
    dout_ptr += batch_64 * dout_strides[0] + first_q * dout_strides[1]

    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    diagonal = seq_len_kv - seq_len_q  # query i stands on key i + diagonal
    first_tile, end_query = 0, seq_len_q
    if window_right is not None:
        first_tile = tl.maximum(start_n - window_right - diagonal, 0) // BLOCK_M
    if window_left is not None:
        end_query = tl.minimum(end_query, start_n + BLOCK_N + window_left - diagonal)
    if key_ranges_ptr is not None:
        first_row, end_row = rows_that_see(
            start_n, start_n + BLOCK_N, key_ranges_ptr, key_ranges_strides, batch,
            seq_len_q, seq_len_kv, RANGES_BLOCK,
        )  # fmt: skip
        first_tile = tl.maximum(first_tile, first_row // BLOCK_M)
        end_query = tl.minimum(end_query, end_row)
    if key_mask_ptr is not None:
        key_mask_ptr += batch_64 * key_mask_stride
    num_tiles = tl.maximum(tl.cdiv(tl.maximum(end_query, 0), BLOCK_M) - first_tile, 0)

    row = batch_64 * num_kv_heads * GROUP_SIZE * rows_q + first_q  # of the statistics, head 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # One loop over all tiles of all heads: its loads run ahead across the heads' borders.
    for step in tl.range(0, num_tiles * GROUP_SIZE, num_stages=NUM_STAGES):
        head = kv_head * GROUP_SIZE + step // num_tiles
        start_m = (first_tile + step % num_tiles) * BLOCK_M
        queries = start_m + tl.arange(0, BLOCK_M)
        head_64 = head.to(tl.int64)
        query = load_rows(
            q_ptr + head_64 * q_strides[2],
            q_strides[1], start_m, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        d_out = load_rows(
            dout_ptr + head_64 * dout_strides[2],
            dout_strides[1], start_m, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        head_row = row + head_64 * rows_q
        lse, delta = load_statistics(
            lse_ptr + head_row, delta_ptr + head_row, queries, seq_len_q
        )  # [BLOCK_M]
        slope = load_slope(alibi_slopes_ptr, alibi_stride, work.sequence, head, score_unit)
        own_keys = (queries + diagonal)[None, :]

        scoring = Scoring(own_keys, cap_scale, slope, score_unit * LOG2_E)
        products = tl.dot(key, query.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        capped = cap(products, cap_scale)
        scores = add_bias(capped, keys, scoring) - lse[None, :]
        first_keys = None
        end_keys = None
        if key_ranges_ptr is not None:
            first_keys, end_keys = load_ranges(
                key_ranges_ptr, key_ranges_strides, batch, queries[None, :], seq_len_q, seq_len_kv
            )  # [1, BLOCK_M]
        LIMITED: tl.constexpr = key_ranges_ptr is not None or key_mask_ptr is not None
        # Keys that do not exist have rows of their own, which are not stored.
        if window_left is not None or window_right is not None or LIMITED:
            visible = Visible(
                own_keys, seq_len_kv, window_left, window_right, first_keys, end_keys, key_mask_ptr
            )
            scores = mask(scores, keys, visible)
        weights = tl.math.exp2(scores * scoring.exponent_scale)
        dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision="ieee")
        d_weights = tl.dot(value, d_out.T, input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        if cap_scale is not None:
            d_scores *= cap_derivative(capped)
        dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee")

    offset = ((batch_64 * rows_kv + first_kv) * num_kv_heads + kv_head) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_rows(
        dk_ptr + offset, stride, start_n, seq_len_kv, dk * softmax_scale, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    store_rows(dv_ptr + offset, stride, start_n, seq_len_kv, dv, HEAD_DIM, BLOCK_N, BLOCK_D)


def key_value_gradients(call: Call, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(dk, dv) of a prepared call; `given` are the arguments that `backward` adds."""
    k = call.k
    batch, seq_len_kv, num_kv_heads, _ = k.shape
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if k.numel() > 0:
        small = call.packed or call.softcap is not None
        config = choose(call, configs.ATTENTION_DKDV_SMALL if small else configs.ATTENTION_DKDV)
        num_blocks = sequences.num_blocks(seq_len_kv, call.num_sequences, config.block_n)
        _dkdv_kernel[(num_blocks * num_kv_heads * batch,)](
            q_ptr=call.q,
            k_ptr=k,
            v_ptr=call.v,
            dk_ptr=dk,
            dv_ptr=dv,
            num_kv_heads=num_kv_heads,
            RANGES_BLOCK=configs.ATTENTION_RANGES_BLOCK,
            **given,
            **kernel_arguments(call, config),
        )
    return dk, dv
