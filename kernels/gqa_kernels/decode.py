"""Decode attention: the last tokens of each sequence over its key/value cache.

    out = softmax(softmax_scale · q kᵀ) v   over the first seq_lens[b] entries of the cache

Dao et al. 2023, "Flash-Decoding for long-context inference". The context is split into chunks of a
fixed number of keys. One program of the first kernel owns one chunk of one key/value head and all
the queries that read it (the new tokens × the heads of the group, packed into the rows of one
tile), so that K and V are read once; one program of the second combines one query's partial
results, in order. Lengths are read on the device only. Chunks do not depend on the batch: a
sequence's result has the same bits whatever else is decoded with it.

Entries beyond a sequence's length are never loaded. Within it, each new token may have a range of
keys of its own and keys may be hidden from all of them.
"""

from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels import checks, configs, layout, library, target
from gqa_kernels.scores import load_ranges, mask
from gqa_kernels.tiles import LOG2_E, finish_softmax, load_rows, online_softmax_step

MAX_NEW_TOKENS = 16


@triton.jit
def _load_length(seq_lens_ptr, index, stride, capacity):
    """A sequence's length in [0, capacity], clamped before it is narrowed."""
    length = tl.load(seq_lens_ptr + index * stride).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)


@triton.jit(do_not_specialize=["capacity", "num_splits"])
def _partial_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seq_lens_ptr,
    key_ranges_ptr,
    key_mask_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    seq_lens_stride,
    key_ranges_strides,
    key_mask_stride,
    capacity,
    num_splits,
    softmax_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SEQ_LEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program attends from BLOCK_M packed queries to one chunk of one key/value head."""
    tl.static_assert(CHUNK % BLOCK_N == 0)
    split = tl.program_id(1)
    NUM_ROWS: tl.constexpr = SEQ_LEN_Q * GROUP_SIZE
    NUM_ROW_BLOCKS: tl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    row_block = tl.program_id(0) % NUM_ROW_BLOCKS
    kv_head = (tl.program_id(0) // NUM_ROW_BLOCKS) % NUM_KV_HEADS
    batch = (tl.program_id(0) // NUM_ROW_BLOCKS // NUM_KV_HEADS).to(tl.int64)
    seq_len = _load_length(seq_lens_ptr, batch, seq_lens_stride, capacity)
    start = split * CHUNK
    if start >= seq_len:
        return  # the combining kernel knows the length too
    end = tl.minimum(start + CHUNK, seq_len)

    packed = row_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    token = packed // GROUP_SIZE
    head = (kv_head * GROUP_SIZE + packed % GROUP_SIZE).to(tl.int64)
    exists = packed < NUM_ROWS
    columns = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = q_ptr + batch * q_strides[0] + token.to(tl.int64) * q_strides[1] + head * q_strides[2]
    q_mask = exists[:, None] & (columns < HEAD_DIM)
    q = tl.load(q_ptrs[:, None] + columns, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    last_key = seq_len - SEQ_LEN_Q + token  # [BLOCK_M]
    first_keys, end_keys = load_ranges(
        key_ranges_ptr, key_ranges_strides, batch, token[:, None], SEQ_LEN_Q, seq_len
    )  # [BLOCK_M, 1]
    if key_mask_ptr is not None:
        key_mask_ptr += batch * key_mask_stride

    k_ptr += batch * k_strides[0] + kv_head.to(tl.int64) * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head.to(tl.int64) * v_strides[2]
    exponent_scale = softmax_scale * LOG2_E
    running_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for tile in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        key = load_rows(k_ptr, k_strides[1], tile, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, key.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        keys = tile + tl.arange(0, BLOCK_N)[None, :]
        # A tile reaches beyond its chunk only at the end of the sequence.
        scores = mask(
            scores, last_key[:, None], keys, seq_len, None, 0, first_keys, end_keys, key_mask_ptr
        )
        weights, running_max, running_sum, accumulator = online_softmax_step(
            scores, running_max, running_sum, accumulator, exponent_scale
        )
        value = load_rows(v_ptr, v_strides[1], tile, end, HEAD_DIM, BLOCK_N, BLOCK_D)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")

    out, lse = finish_softmax(running_max, running_sum, accumulator, softmax_scale)
    query = (batch * SEQ_LEN_Q + token) * (NUM_KV_HEADS * GROUP_SIZE) + head
    rows = query * num_splits + split  # [BLOCK_M]
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + columns, out, mask=q_mask)
    tl.store(lse_ptr + rows, lse, mask=exists)


@triton.jit(do_not_specialize=["capacity", "num_splits", "queries_per_batch"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    seq_lens_ptr,
    out_ptr,
    seq_lens_stride,
    capacity,
    num_splits,
    queries_per_batch,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program combines one query's partial results: Σ exp(lse) · partial / Σ exp(lse)."""
    query = tl.program_id(0).to(tl.int64)
    batch = query // queries_per_batch
    seq_len = _load_length(seq_lens_ptr, batch, seq_lens_stride, capacity)
    num_written = tl.cdiv(seq_len, CHUNK)
    columns = tl.arange(0, BLOCK_D)[None, :]
    running_max = tl.full([1], -float("inf"), dtype=tl.float32)
    running_sum = tl.zeros([1], dtype=tl.float32)
    accumulator = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for first in tl.range(0, num_written, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        rows = query * num_splits + splits
        lse = tl.load(lse_ptr + rows, mask=splits < num_written, other=-float("inf"))
        mask = (splits < num_written)[:, None] & (columns < HEAD_DIM)
        partial = tl.load(partial_ptr + rows[:, None] * HEAD_DIM + columns, mask=mask, other=0.0)
        weights, running_max, running_sum, accumulator = online_softmax_step(
            lse[None, :], running_max, running_sum, accumulator, LOG2_E
        )
        accumulator += tl.sum(tl.trans(weights) * partial, 0)[None, :]
    out, _ = finish_softmax(running_max, running_sum, accumulator, 1.0)
    mask = columns < HEAD_DIM
    tl.store(out_ptr + query * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
) -> Tensor:
    q, k_cache, v_cache = map(layout.contiguous_features, (q, k_cache, v_cache))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    capacity, num_kv_heads = k_cache.shape[1:3]
    if capacity == 0:
        return q.new_zeros(q.shape)
    chunk = configs.decode_chunk(capacity)
    num_splits = triton.cdiv(capacity, chunk)
    key_mask = layout.key_mask(key_mask)
    num_queries = batch * seq_len_q * num_q_heads
    num_rows = seq_len_q * (num_q_heads // num_kv_heads)
    config = configs.DECODE_TILES[q.element_size()]
    block_m = min(config.max_block_m, max(16, triton.next_power_of_2(num_rows)))
    block_d = max(16, triton.next_power_of_2(head_dim))
    partial = torch.empty(num_queries, num_splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_queries, num_splits, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with target.device_of(q):
        _partial_kernel[(batch * num_kv_heads * triton.cdiv(num_rows, block_m), num_splits)](
            q_ptr=q,
            k_ptr=k_cache,
            v_ptr=v_cache,
            seq_lens_ptr=seq_lens,
            key_ranges_ptr=key_ranges,
            key_mask_ptr=key_mask,
            out_ptr=partial,
            lse_ptr=lse,
            q_strides=q.stride()[:3],
            k_strides=k_cache.stride()[:3],
            v_strides=v_cache.stride()[:3],
            seq_lens_stride=seq_lens.stride(0),
            key_ranges_strides=None if key_ranges is None else key_ranges.stride(),
            key_mask_stride=None if key_mask is None else key_mask.stride(0),
            capacity=capacity,
            num_splits=num_splits,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
            NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=num_q_heads // num_kv_heads,
            SEQ_LEN_Q=seq_len_q,
            HEAD_DIM=head_dim,
            CHUNK=chunk,
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            NUM_STAGES=configs.DECODE_NUM_STAGES,
            num_warps=configs.DECODE_NUM_WARPS,
            num_stages=configs.DECODE_NUM_STAGES,
            enable_fp_fusion=True,
        )
        _combine_kernel[(num_queries,)](
            partial_ptr=partial,
            lse_ptr=lse,
            seq_lens_ptr=seq_lens,
            out_ptr=out,
            seq_lens_stride=seq_lens.stride(0),
            capacity=capacity,
            num_splits=num_splits,
            queries_per_batch=seq_len_q * num_q_heads,
            HEAD_DIM=head_dim,
            CHUNK=chunk,
            BLOCK_S=16,
            BLOCK_D=block_d,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
) -> None:
    checks.tensor("q", q, shape=("batch", "seq_len_q", "num_q_heads", "head_dim"))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    shape = (batch, "max_seq_len", "num_kv_heads", head_dim)
    checks.tensor("k_cache", k_cache, shape=shape, like=("q", q))
    checks.tensor("v_cache", v_cache, shape=tuple(k_cache.shape), like=("q", q))
    checks.same_dtype("k_cache", k_cache, "q", q)
    checks.same_dtype("v_cache", v_cache, "q", q)
    checks.tensor("seq_lens", seq_lens, dtypes=checks.INTS, shape=(batch,), like=("q", q))
    checks.key_limits(key_ranges, key_mask, (batch, seq_len_q, k_cache.shape[1]), like=("q", q))
    checks.attention_heads(num_q_heads, k_cache.shape[2], head_dim)
    checks.softmax_scale(softmax_scale, head_dim)
    if not 1 <= seq_len_q <= MAX_NEW_TOKENS:
        raise NotImplementedError(f"q: expected a seq_len_q of 1 to 16; got {seq_len_q}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: expected contiguous features; got strides {x.stride()}")


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _refuse_gradient(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(
        "q: expected inputs without a gradient (decode under torch.no_grad()); got one that "
        "requires grad"
    )


_DECODE_ATTENTION = library.Op(
    "decode_attention",
    _forward,
    _fake,
    check=_check,
    setup_context=_refuse_gradient,
    backward=_refuse_gradient,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's last tokens over its cache; see `reference.decode_attention`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`, seq_len_q 1 to
            16; head_dim a multiple of 8 up to 256; any strides.
        k_cache, v_cache: the same dtype, `[batch, max_seq_len, num_kv_heads, head_dim]`; any
            strides with contiguous features.
        seq_lens: int32 or int64 `[batch]` in [0, max_seq_len], the new tokens included. Read on
            the device; a length above max_seq_len counts as max_seq_len.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        key_ranges, key_mask: as in `flash_attention`, with max_seq_len for seq_len_kv.
    Returns:
        `[batch, seq_len_q, num_q_heads, head_dim]`, contiguous; 0 where a query sees no key.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: another head_dim, more than 16 new tokens, or an input that requires a
            gradient: a cache has none.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    tensors = (q, k_cache, v_cache, seq_lens, key_ranges, key_mask)
    if library.is_traced(*tensors):
        return _DECODE_ATTENTION.dispatched(*tensors, softmax_scale)
    _check(*tensors, softmax_scale)
    if library.needs_graph(q, k_cache, v_cache):
        _refuse_gradient()
    return _forward(*tensors, softmax_scale)
