"""The backward kernels of flash attention.

With P = exp(scores − lse), dP = dO Vᵀ and delta = rowsum(dO ∘ O) − dlse,

    dS = P ∘ (dP − delta)      with respect to the scores; times 1 − tanh² under a soft cap
    dV = Pᵀ dO        dK = softmax_scale · dSᵀ Q        dQ = softmax_scale · dS K
    dsinks = −Σ over queries of exp(sink − lse) · delta

Dao 2023, arXiv:2307.08691, in two kernels with seven products, so that every gradient is summed in
one program's registers, in one order: the same bits in every run. One program of the first owns
BLOCK_N keys and values of one key/value head and walks the queries of all the heads of its group;
one of the second owns BLOCK_M queries of one head and walks its keys. The first computes Sᵀ and dPᵀ
as such: the transpose of a product is never the operand of another (miscompiled for Hopper before
Triton 3.7.1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels import configs, layout, sequences, target
from gqa_kernels.scores import (
    Scoring,
    Visible,
    add_bias,
    cap,
    cap_derivative,
    key_tiles,
    load_ranges,
    load_slope,
    mask,
    rows_that_see,
)
from gqa_kernels.sequences import locate
from gqa_kernels.tiles import LOG2_E, Rows, load_rows, load_tile, store_rows


@triton.jit(do_not_specialize=["seq_len_q"])
def _prepare_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    neg_lse_ptr,
    neg_delta_ptr,
    dout_strides,
    seq_len_q,
    num_heads,
    score_unit,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes −lse, in score units, and −delta of BLOCK_M queries of one head.

    Negated, they are where the accumulators of two products begin. A query that sees no key gets
    −∞ for its lse too: a weight of 0 for every key.
    """
    num_blocks = tl.cdiv(seq_len_q, BLOCK_M)
    start = tl.program_id(0) % num_blocks * BLOCK_M
    head = (tl.program_id(0) // num_blocks % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks // num_heads).to(tl.int64)
    out_ptr += (batch * seq_len_q * num_heads + head) * HEAD_DIM
    dout_ptr += batch * dout_strides[0] + head * dout_strides[2]
    out = load_rows(out_ptr, num_heads * HEAD_DIM, start, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout = load_rows(dout_ptr, dout_strides[1], start, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    neg_delta = -tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # [BLOCK_M]
    queries = start + tl.arange(0, BLOCK_M)
    exists = queries < seq_len_q
    offsets = (batch * num_heads + head) * seq_len_q + queries
    if dlse_ptr is not None:
        neg_delta += tl.load(dlse_ptr + offsets, mask=exists, other=0.0)
    tl.store(neg_delta_ptr + offsets, neg_delta, mask=exists)
    lse = tl.load(lse_ptr + offsets, mask=exists, other=0.0)
    neg_lse = tl.where(lse == -float("inf"), lse, -lse / score_unit)
    tl.store(neg_lse_ptr + offsets, neg_lse, mask=exists)


@triton.jit
def _load_statistics(neg_lse_ptr, neg_delta_ptr, queries, seq_len_q):
    """(−lse, −delta) of queries; those that do not exist weigh no key."""
    exists = queries < seq_len_q
    neg_lse = tl.load(neg_lse_ptr + queries, mask=exists, other=-float("inf"))
    return neg_lse, tl.load(neg_delta_ptr + queries, mask=exists, other=0.0)


@triton.jit
def _scores_less_lse(a, b_transposed, neg_lse, keys, scoring):
    """(scores − lse, capped scores) of the product of a and b, both in score units."""
    ROWS: tl.constexpr = a.shape[0]
    COLUMNS: tl.constexpr = b_transposed.shape[1]
    capped = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if scoring.cap_scale is None:
        scores = tl.dot(a, b_transposed, capped + neg_lse, input_precision="ieee")
    else:
        capped = cap(tl.dot(a, b_transposed, input_precision="ieee"), scoring.cap_scale)
        scores = capped + neg_lse
    return add_bias(scores, keys, scoring), capped


@triton.jit(
    do_not_specialize=["num_sequences", "seq_len_q", "seq_len_kv", "window_left", "window_right"]
)
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    neg_lse_ptr,
    neg_delta_ptr,
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
        neg_lse, neg_delta = _load_statistics(
            neg_lse_ptr + head_row, neg_delta_ptr + head_row, queries, seq_len_q
        )  # [BLOCK_M]
        slope = load_slope(alibi_slopes_ptr, alibi_stride, work.sequence, head, score_unit)
        own_keys = (queries + diagonal)[None, :]

        scoring = Scoring(own_keys, cap_scale, slope, score_unit * LOG2_E)
        scores, capped = _scores_less_lse(
            key, query.T, neg_lse[None, :], keys, scoring
        )  # [BLOCK_N, BLOCK_M]
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
        d_weights = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32) + neg_delta[None, :]
        d_scores = weights * tl.dot(value, d_out.T, d_weights, input_precision="ieee")
        if cap_scale is not None:
            d_scores *= cap_derivative(capped)
        dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee")

    offset = ((batch_64 * rows_kv + first_kv) * num_kv_heads + kv_head) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_rows(
        dk_ptr + offset, stride, start_n, seq_len_kv, dk * softmax_scale, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    store_rows(dv_ptr + offset, stride, start_n, seq_len_kv, dv, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _walk_keys(
    q,
    d_out,
    k,
    v,
    neg_lse,
    neg_delta,
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
    """dq and what num_steps tiles from first_tile on add to it."""
    BLOCK_D: tl.constexpr = q.shape[1]
    for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
        start = (first_tile + step) * BLOCK_N
        key = load_tile(k, start, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        value = load_tile(v, start, HEAD_DIM, BLOCK_N, BLOCK_D, False)
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        scores, capped = _scores_less_lse(q, key.T, neg_lse, keys, scoring)
        if MASKED:
            scores = mask(scores, keys, visible)
        weights = tl.math.exp2(scores * scoring.exponent_scale)
        d_weights = tl.zeros(weights.shape, dtype=tl.float32) + neg_delta
        d_scores = weights * tl.dot(d_out, value.T, d_weights, input_precision="ieee")
        if scoring.cap_scale is not None:
            d_scores *= cap_derivative(capped)
        dq = tl.dot(d_scores.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit(
    do_not_specialize=["num_sequences", "seq_len_q", "seq_len_kv", "window_left", "window_right"]
)
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    neg_lse_ptr,
    neg_delta_ptr,
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
        BLOCK_M,
    )  # fmt: skip
    seq_len_q, seq_len_kv = work.num_rows, work.num_other_rows
    if work.block * BLOCK_M >= seq_len_q:
        return
    start_m = (tl.cdiv(seq_len_q, BLOCK_M) - 1 - work.block) * BLOCK_M  # the most keys first
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
    neg_lse, neg_delta = _load_statistics(
        neg_lse_ptr + row, neg_delta_ptr + row, queries, seq_len_q
    )
    neg_lse, neg_delta = neg_lse[:, None], neg_delta[:, None]

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
            q, d_out, k, v, neg_lse, neg_delta, visible, scoring, dq, first_tile, num_free,
            False, HEAD_DIM, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
    dq = _walk_keys(
        q, d_out, k, v, neg_lse, neg_delta, visible, scoring, dq, first_tile + num_free,
        num_tiles - num_free, True, HEAD_DIM, BLOCK_N, NUM_STAGES,
    )  # fmt: skip
    dq_ptr += ((batch_64 * rows_q + first_q) * num_q_heads + head) * HEAD_DIM
    store_rows(
        dq_ptr, num_q_heads * HEAD_DIM, start_m, seq_len_q, dq * softmax_scale,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    *,
    need_dq: bool,
    need_dkdv: bool,
    need_dsinks: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dsinks), each None unless needed; shapes as in `forward`."""
    q, k, v, dout = map(layout.contiguous_features, (q, k, v, dout))
    out, lse = out.contiguous(), lse.contiguous()  # as the forward pass leaves them
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    seq_len_kv, num_kv_heads = k.shape[1:3]
    packed = cu_seqlens_q is not None
    num_sequences = cu_seqlens_q.shape[0] - 1 if packed else None
    block_d = max(16, triton.next_power_of_2(head_dim))
    neg_lse = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    neg_delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    shared = {
        "neg_lse_ptr": neg_lse,
        "neg_delta_ptr": neg_delta,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_kv_ptr": cu_seqlens_kv,
        "alibi_slopes_ptr": alibi_slopes,
        "key_ranges_ptr": key_ranges,
        "key_mask_ptr": key_mask,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3],
        "dout_strides": dout.stride()[:3],
        "alibi_stride": layout.sequence_stride(alibi_slopes),
        "key_ranges_strides": None if key_ranges is None else key_ranges.stride(),
        "key_mask_stride": None if key_mask is None else key_mask.stride(0),
        "num_sequences": num_sequences,
        "seq_len_q": seq_len_q,
        "seq_len_kv": seq_len_kv,
        "window_left": window_left,
        "window_right": window_right,
        "softmax_scale": softmax_scale,
        "score_unit": softmax_scale if softcap is None else softcap,
        "cap_scale": None if softcap is None else softmax_scale / softcap,
        "GROUP_SIZE": num_q_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "enable_fp_fusion": True,
    }
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_dq else None
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device) if need_dkdv else None
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if need_dkdv else None
    with target.device_of(q):
        gpu = target.current()

        def plan(
            table: tuple[configs.AttentionConfig, ...],
        ) -> tuple[configs.AttentionConfig, dict]:
            config = configs.attention_config(table, gpu.arch, q.element_size(), head_dim)
            return config, {
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "NUM_STAGES": config.num_stages,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            }

        if q.numel() > 0:
            block_m = configs.ATTENTION_PREPARE_BLOCK
            _prepare_kernel[(triton.cdiv(seq_len_q, block_m) * num_q_heads * batch,)](
                out_ptr=out,
                dout_ptr=dout,
                lse_ptr=lse,
                dlse_ptr=None if dlse is None else dlse.contiguous(),
                neg_lse_ptr=neg_lse,
                neg_delta_ptr=neg_delta,
                dout_strides=dout.stride()[:3],
                seq_len_q=seq_len_q,
                num_heads=num_q_heads,
                score_unit=shared["score_unit"],
                HEAD_DIM=head_dim,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                num_warps=configs.ATTENTION_PREPARE_NUM_WARPS,
                enable_fp_fusion=True,
            )
        if need_dkdv and k.numel() > 0:
            small = packed or softcap is not None
            config, numbers = plan(
                configs.ATTENTION_DKDV_SMALL if small else configs.ATTENTION_DKDV
            )
            num_blocks = sequences.num_blocks(seq_len_kv, num_sequences, config.block_n)
            _dkdv_kernel[(num_blocks * num_kv_heads * batch,)](
                q_ptr=q,
                dout_ptr=dout,
                k_ptr=k,
                v_ptr=v,
                dk_ptr=dk,
                dv_ptr=dv,
                num_kv_heads=num_kv_heads,
                RANGES_BLOCK=configs.ATTENTION_RANGES_BLOCK,
                **shared,
                **numbers,
            )
        if need_dq and q.numel() > 0:
            config, numbers = plan(configs.ATTENTION_DQ)
            num_blocks = sequences.num_blocks(seq_len_q, num_sequences, config.block_m)
            _dq_kernel[(num_blocks * num_q_heads * batch,)](
                q_ptr=q,
                dout_ptr=dout,
                k_ptr=k,
                v_ptr=v,
                dq_ptr=dq,
                num_q_heads=num_q_heads,
                **shared,
                **numbers,
            )
    dsinks = None
    if need_dsinks:
        weights = torch.exp(sinks.float()[:, None] - lse)  # [batch, num_q_heads, seq_len_q]
        weights = weights.masked_fill(lse == -torch.inf, 0.0)
        dsinks = (weights * neg_delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks
