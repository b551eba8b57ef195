"""The gradients of keys and values of flash attention; formulas in `backward.py`.

One program owns BLOCK_N keys and values of one key/value head and loops over the queries of all the
heads of its group. It computes Sᵀ and dPᵀ directly and never passes the transpose of a product to
another product: Triton before 3.7.1 miscompiles that for Hopper.
"""

from typing import Any, NamedTuple

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
    load_ranges,
    load_slope,
    load_statistics,
    mask,
    rows_that_see,
)
from gqa_kernels.primitives.tiles import LOG2_E, load_rows, store_rows
from gqa_kernels.runtime import configs, launch


class _Queries(NamedTuple):
    """The queries that a program loops over, those of the heads of a group, and their lse and
    delta."""

    q_ptr: Any  # at the sequence's query 0 of head 0
    dout_ptr: Any
    q_strides: Any
    dout_strides: Any
    lse_ptr: Any  # at query 0 of head 0 too
    delta_ptr: Any
    statistics_stride: Any  # of lse and delta, between heads
    alibi_slopes_ptr: Any
    alibi_stride: Any
    key_ranges_ptr: Any
    key_ranges_strides: Any
    sequence: Any
    batch: Any
    first_head: Any  # of the group
    seq_len_q: Any


@triton.jit
def _walk_queries(
    of,
    key,
    value,
    keys,
    seq_len_kv,
    window_left,
    window_right,
    cap_scale,
    score_unit,
    dk,
    dv,
    first_tile,
    num_before,
    num_skipped,
    num_tiles,
    MASKED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Adds the contributions of num_tiles tiles of queries per head to dk and dv; returns both.

    The tiles are num_before tiles from first_tile on and, after num_skipped others, the rest. One
    loop covers the tiles of all heads, so that it issues the loads of the next head early.
    """
    BLOCK_D: tl.constexpr = key.shape[1]
    diagonal = seq_len_kv - of.seq_len_q  # query i sees keys up to i + diagonal
    for step in tl.range(0, num_tiles * GROUP_SIZE, num_stages=NUM_STAGES):
        head, tile = step // num_tiles, step % num_tiles
        if MASKED:
            tile += tl.where(tile < num_before, 0, num_skipped)
        start_m = (first_tile + tile) * BLOCK_M
        queries = start_m + tl.arange(0, BLOCK_M)
        own_head = (of.first_head + head).to(tl.int64)
        query = load_rows(
            of.q_ptr + own_head * of.q_strides[2],
            of.q_strides[1], start_m, of.seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        d_out = load_rows(
            of.dout_ptr + own_head * of.dout_strides[2],
            of.dout_strides[1], start_m, of.seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        row = own_head * of.statistics_stride
        lse, delta = load_statistics(
            of.lse_ptr + row, of.delta_ptr + row, queries, of.seq_len_q
        )  # [BLOCK_M]
        slope = load_slope(
            of.alibi_slopes_ptr, of.alibi_stride, of.sequence, of.first_head + head, score_unit
        )
        own_keys = (queries + diagonal)[None, :]

        scoring = Scoring(own_keys, cap_scale, slope, score_unit * LOG2_E)
        products = tl.dot(key, query.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        capped = cap(products, cap_scale)
        scores = add_bias(capped, keys, scoring) - lse[None, :]
        if MASKED:
            first_keys = None
            end_keys = None
            if of.key_ranges_ptr is not None:
                first_keys, end_keys = load_ranges(
                    of.key_ranges_ptr, of.key_ranges_strides, of.batch, queries[None, :],
                    of.seq_len_q, seq_len_kv,
                )  # fmt: skip
            visible = Visible(
                own_keys, seq_len_kv, window_left, window_right, first_keys, end_keys, None
            )
            scores = mask(scores, keys, visible)
        weights = tl.math.exp2(scores * scoring.exponent_scale)
        dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision="ieee")
        d_weights = tl.dot(value, d_out.T, input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        if cap_scale is not None:
            d_scores *= cap_derivative(capped)
        dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(
    do_not_specialize=[
        *("num_sequences", "seq_len_q", "seq_len_kv", "section", "window_left", "window_right")
    ]
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
    RANGES_BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    APART: tl.constexpr,
):
    """One program sums the gradients of BLOCK_N keys and values over all heads of a group."""
    rows_q, rows_kv = seq_len_q, seq_len_kv  # per batch entry
    work = locate(
        cu_seqlens_kv_ptr, cu_seqlens_q_ptr, num_sequences, num_kv_heads, seq_len_kv, seq_len_q,
        section, BLOCK_N,
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

    row = batch_64 * num_kv_heads * GROUP_SIZE * rows_q + first_q  # of lse and delta, head 0
    of = _Queries(
        q_ptr, dout_ptr, q_strides, dout_strides, lse_ptr + row, delta_ptr + row, rows_q,
        alibi_slopes_ptr, alibi_stride, key_ranges_ptr, key_ranges_strides,
        work.sequence, batch, kv_head * GROUP_SIZE, seq_len_q,
    )  # fmt: skip
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    diagonal = seq_len_kv - seq_len_q  # query i is aligned with key i + diagonal
    # Queries that see at least one key of this block, and those that see all its keys.
    first_query, end_query = 0, seq_len_q
    first_free, end_free = 0, seq_len_q
    if window_right is not None:
        first_query = tl.maximum(start_n - window_right - diagonal, 0)
        first_free = tl.maximum(start_n + BLOCK_N - 1 - window_right - diagonal, 0)
    if window_left is not None:
        end_query = tl.minimum(end_query, start_n + BLOCK_N + window_left - diagonal)
        end_free = tl.minimum(end_free, start_n + 1 + window_left - diagonal)
    if key_ranges_ptr is not None:
        first_row, end_row, all_see_all = rows_that_see(
            start_n, tl.minimum(start_n + BLOCK_N, seq_len_kv), key_ranges_ptr, key_ranges_strides,
            batch, seq_len_q, seq_len_kv, RANGES_BLOCK,
        )  # fmt: skip
        first_query = tl.maximum(first_query, first_row)
        end_query = tl.minimum(end_query, end_row)
        first_free = tl.maximum(first_free, first_row)
        end_free = tl.minimum(end_free, tl.where(all_see_all, end_row, 0))
    first_tile, end_tile = first_query // BLOCK_M, tl.cdiv(tl.maximum(end_query, 0), BLOCK_M)
    num_tiles = tl.maximum(end_tile - first_tile, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    num_before, num_free = 0, num_tiles
    MASKS: tl.constexpr = (
        window_left is not None or window_right is not None or key_ranges_ptr is not None
    )
    if MASKS:
        # Queries beyond seq_len_q need no mask: `load_statistics` makes their weights 0.
        num_free = 0
        if APART:
            end_free_tile = tl.where(end_free < seq_len_q, end_free // BLOCK_M, end_tile)
            first_free_tile = tl.maximum(tl.cdiv(first_free, BLOCK_M), first_tile)
            num_free = tl.maximum(tl.minimum(end_free_tile, end_tile) - first_free_tile, 0)
            num_before = tl.minimum(first_free_tile - first_tile, num_tiles)
        dk, dv = _walk_queries(
            of, key, value, keys, seq_len_kv, window_left, window_right, cap_scale, score_unit,
            dk, dv, first_tile, num_before, num_free, num_tiles - num_free,
            True, GROUP_SIZE, HEAD_DIM, BLOCK_M, NUM_STAGES,
        )  # fmt: skip
    if APART or not MASKS:
        dk, dv = _walk_queries(
            of, key, value, keys, seq_len_kv, window_left, window_right, cap_scale, score_unit,
            dk, dv, first_tile + num_before, num_free, 0, num_free,
            False, GROUP_SIZE, HEAD_DIM, BLOCK_M, NUM_STAGES,
        )  # fmt: skip
    if key_mask_ptr is not None:  # clearing the rows of a hidden key replaces masking its scores
        key_mask_ptr += batch_64 * key_mask_stride
        seen = tl.load(key_mask_ptr + keys, mask=keys < seq_len_kv, other=0) != 0  # [BLOCK_N, 1]
        dk = tl.where(seen, dk, 0.0)
        dv = tl.where(seen, dv, 0.0)

    offset = ((batch_64 * rows_kv + first_kv) * num_kv_heads + kv_head) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_rows(
        dk_ptr + offset, stride, start_n, seq_len_kv, dk * softmax_scale, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    store_rows(dv_ptr + offset, stride, start_n, seq_len_kv, dv, HEAD_DIM, BLOCK_N, BLOCK_D)


_launch = launch.launcher(_dkdv_kernel)


def key_value_gradients(call: Call, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(dk, dv) of a prepared call; `given` holds the arguments from `backward.py`."""
    k = call.k
    batch, seq_len_kv, num_kv_heads, _ = k.shape
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(k, memory_format=torch.contiguous_format)
    if k.numel() > 0:
        small = call.packed or call.softcap is not None
        config = choose(call, configs.ATTENTION_DKDV_SMALL if small else configs.ATTENTION_DKDV)
        num_blocks = sequences.num_blocks(seq_len_kv, call.num_sequences, config.block_n)
        _launch(
            (num_blocks * num_kv_heads * batch,),
            q_ptr=call.q,
            k_ptr=k,
            v_ptr=call.v,
            dk_ptr=dk,
            dv_ptr=dv,
            num_kv_heads=num_kv_heads,
            section=sequences.section_of_keys(call),
            RANGES_BLOCK=configs.ATTENTION_RANGES_BLOCK,
            APART=config.apart,
            **given,
            **tile_arguments(config),
        )
    return dk, dv
