"""Rotates q and k and appends k and v to a key/value cache, in one launch.

    q, k ← rotated by the angles of their positions, as in `rope.py`
    k_cache[slot], v_cache[slot] ← k, v        or round(k / k_scale), round(v / v_scale)

A decode step runs this between its projections and its attention. Su et al. 2021, arXiv:2104.09864;
slots as in Kwon et al. 2023, "Efficient memory management for large language model serving with
PagedAttention", arXiv:2309.06180.

One program owns BLOCK_H heads, of q, of k or of v, of one token. It addresses all tensors by their
strides, so views of a fused projection and of a cache of many layers need no copy. A head is a tile
of pairs (`rotation.py`), for v too: quantisation uses the largest feature of a head, in either
half.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.primitives.rotation import (
    heads_at,
    heads_per_program,
    load_angles,
    load_pairs,
    rotate,
    store_pairs,
)
from gqa_kernels.runtime import checks, launch, layout, library, target

INT8_MAX = tl.constexpr(127.0)  # −128 is not used, so that negation is exact
E4M3_MAX = tl.constexpr(448.0)


class Cache(NamedTuple):
    """The cache of keys or of values; the scales are None unless it is quantised."""

    ptr: Any
    strides: Any
    scale_ptr: Any
    scale_strides: Any


class Slot(NamedTuple):
    """Where the heads of a token, from first_head on, are stored."""

    page: Any
    offset: Any
    first_head: Any


@triton.jit
def _encode_e4m3(x):
    """Returns the bits of the float8_e4m3fn nearest to float32 x, ties to even, clamped to ±448.

    It uses integer arithmetic because some targets and the interpreter do not round this way.
    """
    size = tl.minimum(tl.abs(x), E4M3_MAX)
    bits = size.to(tl.int32, bitcast=True)
    # Drops 20 of the 23 bits of the significand and changes the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ a code counts steps of 2⁻⁹, the last bit of 2¹⁴, so adding 2¹⁴ rounds to such steps.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(x == x, sign | code, 0x7F).to(tl.uint8)


@triton.jit
def _encode_int8(x):
    """Rounds x to the nearest of −127 … 127, ties to even; 0 for NaN, which int8 does not have."""
    # A separate variable: a compiler may replace NaN by a bound here, and x has to be NaN below.
    bounded = tl.minimum(tl.maximum(x, -INT8_MAX), INT8_MAX)
    # The last bit of 1.5 · 2²³ counts 1, so the low byte of the sum is the rounded number.
    code = (bounded + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, code, 0).to(tl.int8)


@triton.jit
def _append(
    cache,
    slot,
    a,
    b,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
):
    """Writes (a, b), float32 values of the model's dtype, to a slot of the cache."""
    BLOCK_H: tl.constexpr = a.shape[0]
    page, offset = slot.page, slot.offset
    cache_ptr = cache.ptr + page * cache.strides[0] + offset * cache.strides[1]
    if cache.scale_ptr is not None:
        # float8_e4m3fn is passed as its bits, uint8.
        IS_INT8: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
        scale_ptr, strides = cache.scale_ptr, cache.scale_strides
        if SCALE_PER_TOKEN:
            LARGEST: tl.constexpr = INT8_MAX if IS_INT8 else E4M3_MAX
            scale = tl.math.div_rn(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1), LARGEST)
            # A maximum may ignore NaN; the scale must not.
            unknown = tl.max(((a != a) | (b != b)).to(tl.int32), 1)
            scale = tl.where(unknown != 0, float("nan"), scale)
            scale_ptr += page * strides[0] + offset * strides[1]
            scales = heads_at(scale_ptr, strides[2], slot.first_head, NUM_HEADS, BLOCK_H)
            tl.store(scales.ptrs, scale, mask=scales.exist)
        else:
            scales = heads_at(scale_ptr, strides[0], slot.first_head, NUM_HEADS, BLOCK_H)
            scale = tl.load(scales.ptrs, mask=scales.exist, other=1.0)
        divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
        a, b = tl.math.div_rn(a, divisor), tl.math.div_rn(b, divisor)
        if IS_INT8:
            a, b = _encode_int8(a), _encode_int8(b)
        else:
            a, b = _encode_e4m3(a), _encode_e4m3(b)
    heads = heads_at(cache_ptr, cache.strides[2], slot.first_head, NUM_HEADS, BLOCK_H)
    store_pairs(heads, a, b, HEAD_DIM, INTERLEAVED)


@triton.jit(
    do_not_specialize=[
        "positions_stride_b",
        "positions_stride_t",
        "slots_stride_b",
        "slots_stride_t",
        "seq_len",
        "max_seq_len",
        "page_size",
        "num_pages",
    ]
)
def _append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_out_ptr,
    k_out_ptr,
    q_strides,
    k_strides,
    v_strides,
    k_cache_strides,
    v_cache_strides,
    k_scale_strides,
    v_scale_strides,
    positions_stride_b,
    positions_stride_t,
    slots_stride_b,
    slots_stride_t,
    seq_len,
    max_seq_len,
    page_size,
    num_pages,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
):
    """One program processes BLOCK_H heads of q, of k or of v of one token."""
    NUM_Q_BLOCKS: tl.constexpr = (NUM_Q_HEADS + BLOCK_H - 1) // BLOCK_H
    NUM_KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    batch, index = token // seq_len, token % seq_len

    number = tl.load(slots_ptr + batch * slots_stride_b + index * slots_stride_t).to(tl.int64)
    page, offset = number // page_size, number % page_size
    has_slot = (number >= 0) & (page < num_pages)

    if block < NUM_Q_BLOCKS + NUM_KV_BLOCKS:
        position_ptr = positions_ptr + batch * positions_stride_b + index * positions_stride_t
        position = tl.load(position_ptr).to(tl.int64)
        cos, sin = load_angles(cos_ptr, sin_ptr, position, max_seq_len, HEAD_DIM, BLOCK_PAIRS)
        if block < NUM_Q_BLOCKS:
            first_head = block * BLOCK_H
            q_ptr += batch * q_strides[0] + index * q_strides[1]
            q_out_ptr += token * NUM_Q_HEADS * HEAD_DIM
            heads = heads_at(q_ptr, q_strides[2], first_head, NUM_Q_HEADS, BLOCK_H)
            a, b = load_pairs(heads, HEAD_DIM, BLOCK_PAIRS, INTERLEAVED)
            a, b = rotate(a, b, cos, sin)
            heads = heads_at(q_out_ptr, HEAD_DIM, first_head, NUM_Q_HEADS, BLOCK_H)
            store_pairs(heads, a, b, HEAD_DIM, INTERLEAVED)
        else:
            first_head = (block - NUM_Q_BLOCKS) * BLOCK_H
            k_ptr += batch * k_strides[0] + index * k_strides[1]
            k_out_ptr += token * NUM_KV_HEADS * HEAD_DIM
            heads = heads_at(k_ptr, k_strides[2], first_head, NUM_KV_HEADS, BLOCK_H)
            a, b = load_pairs(heads, HEAD_DIM, BLOCK_PAIRS, INTERLEAVED)
            a, b = rotate(a, b, cos, sin)
            # The cache stores k as the model computes it, rounded to its dtype.
            dtype: tl.constexpr = k_out_ptr.dtype.element_ty
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
            heads = heads_at(k_out_ptr, HEAD_DIM, first_head, NUM_KV_HEADS, BLOCK_H)
            store_pairs(heads, a, b, HEAD_DIM, INTERLEAVED)
            if has_slot:
                cache = Cache(k_cache_ptr, k_cache_strides, k_scale_ptr, k_scale_strides)
                slot = Slot(page, offset, first_head)
                _append(cache, slot, a, b, NUM_KV_HEADS, HEAD_DIM, INTERLEAVED, SCALE_PER_TOKEN)
    elif has_slot:
        first_head = (block - NUM_Q_BLOCKS - NUM_KV_BLOCKS) * BLOCK_H
        v_ptr += batch * v_strides[0] + index * v_strides[1]
        heads = heads_at(v_ptr, v_strides[2], first_head, NUM_KV_HEADS, BLOCK_H)
        # v is not rotated, so it is loaded as halves even if the pairs of k are interleaved.
        a, b = load_pairs(heads, HEAD_DIM, BLOCK_PAIRS, False)
        cache = Cache(v_cache_ptr, v_cache_strides, v_scale_ptr, v_scale_strides)
        slot = Slot(page, offset, first_head)
        _append(cache, slot, a, b, NUM_KV_HEADS, HEAD_DIM, False, SCALE_PER_TOKEN)


_launch_append = launch.launcher(_append_kernel)


def _bits(cache: Tensor) -> Tensor:
    """Returns a float8_e4m3fn cache as uint8, since some targets' compilers lack the type."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = map(layout.contiguous_features, (q, k, v))
    batch, seq_len, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    num_pages, page_size = k_cache.shape[:2]
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    block_h = heads_per_program(num_q_heads, num_kv_heads)
    num_blocks = layout.cdiv(num_q_heads, block_h) + 2 * layout.cdiv(num_kv_heads, block_h)
    with target.device_of(q):
        _launch_append(
            (batch * seq_len, num_blocks),
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_cache_ptr=_bits(k_cache),
            v_cache_ptr=_bits(v_cache),
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            cos_ptr=cos.contiguous(),
            sin_ptr=sin.contiguous(),
            positions_ptr=positions,
            slots_ptr=slots,
            q_out_ptr=q_out,
            k_out_ptr=k_out,
            q_strides=q.stride()[:3],
            k_strides=k.stride()[:3],
            v_strides=v.stride()[:3],
            k_cache_strides=k_cache.stride()[:3],
            v_cache_strides=v_cache.stride()[:3],
            k_scale_strides=None if k_scale is None else k_scale.stride(),
            v_scale_strides=None if v_scale is None else v_scale.stride(),
            positions_stride_b=positions.stride(0),
            positions_stride_t=positions.stride(1),
            slots_stride_b=slots.stride(0),
            slots_stride_t=slots.stride(1),
            seq_len=seq_len,
            max_seq_len=cos.shape[0],
            # Pages of size 0 have no slot, so there is no page to write to.
            page_size=max(page_size, 1),
            num_pages=num_pages if page_size else 0,
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_H=block_h,
            BLOCK_PAIRS=layout.power_of_2(head_dim // 2),
            INTERLEAVED=interleaved,
            SCALE_PER_TOKEN=k_scale is not None and k_scale.dim() == 3,
            num_warps=1,
        )
    return q_out, k_out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
) -> None:
    checks.tensor("q", q, shape=("batch", "seq_len", "num_q_heads", "head_dim"))
    like = ("q", q)
    batch, seq_len, num_q_heads, head_dim = q.shape
    checks.tensor("k", k, shape=(batch, seq_len, "num_kv_heads", head_dim), like=like)
    checks.tensor("v", v, shape=k.shape, like=like)
    checks.same_dtype("k", k, *like)
    checks.same_dtype("v", v, *like)
    num_kv_heads = k.shape[2]
    checks.attention_heads(num_q_heads, num_kv_heads, head_dim)
    shape = ("num_pages", "page_size", num_kv_heads, head_dim)
    checks.kv_caches(k_cache, v_cache, k_scale, v_scale, shape=shape, like=like)
    checks.separate_entries("k_cache", k_cache)
    checks.separate_entries("v_cache", v_cache)
    shape = ("max_seq_len", head_dim // 2)
    checks.tensor("cos", cos, dtypes=(torch.float32,), shape=shape, like=like)
    checks.tensor("sin", sin, dtypes=(torch.float32,), shape=cos.shape, like=like)
    for name, x in (("positions", positions), ("slots", slots)):
        checks.tensor(name, x, dtypes=checks.INTS, shape=(batch, seq_len), like=like)


def _fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_ROPE_APPEND_KV = library.Op(
    "rope_append_kv",
    _forward,
    _fake,
    check=_check,
    mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
    refuse=library.refuse_gradient("append"),
)


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k, and writes k and v to their slots; see `reference.rope_append_kv`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len, num_q_heads, head_dim]`, any strides;
            head_dim a multiple of 8 up to 256.
        k, v: the same dtype, `[batch, seq_len, num_kv_heads, head_dim]`, any strides.
        k_cache, v_cache: the same dtype, or both float8_e4m3fn or int8, `[batch, max_seq_len,
            num_kv_heads, head_dim]` or `[num_pages, page_size, num_kv_heads, head_dim]`; any
            strides with contiguous features. Written.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`.
        positions: int32 or int64 `[batch, seq_len]`; for a position outside the table, k is NaN,
            also in the cache.
        slots: int64 or int32 `[batch, seq_len]`, indices into the first two dimensions of the
            caches, flattened; an index outside them (−1) writes nothing.
        k_scale, v_scale: for quantised caches; float32 `[num_kv_heads]`, which the op reads, or
            `[*k_cache.shape[:2], num_kv_heads]`, which it writes.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + head_dim / 2).
    Returns:
        (q, k) rotated, in new contiguous tensors.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: another head_dim, a float8_e4m3fn cache on a GPU without that type, or
            an input that requires a gradient while autograd records.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    interleaved = checks.flag("interleaved", interleaved)
    return _ROPE_APPEND_KV(
        q, k, v, k_cache, v_cache, cos, sin, positions, slots, k_scale, v_scale, interleaved
    )
