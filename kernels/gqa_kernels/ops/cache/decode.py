"""Decode attention: the last tokens of each sequence over its key/value cache.

    out = softmax(softmax_scale · q kᵀ) v   over the first seq_lens[b] entries of the cache

Split-KV: Dao et al. 2023, "Flash-Decoding for long-context inference". A sequence is split into
chunks of keys. A program processes a chunk of one key/value head with all the queries that read it
(the new tokens × the heads of the group, packed into the rows of one tile), so that K and V are
read once, and stores a partial result. The program that finishes last combines the partial results
in the order of the chunks, so one launch suffices and the result does not depend on which program
is last. A sequence of one chunk needs no partial result.

The device cuts the chunks by the length of the sequence alone. The result of a sequence has the
same bits alone and in any batch, in a contiguous and in a paged cache, for any capacity and page
size, and for any number of programs that share its chunks. This needs no special mode.

Entries beyond a sequence's length are never loaded. Within it, each new token may be limited to a
window or range of keys, and keys may be hidden from all new tokens.
"""

import torch
from torch import Tensor

from gqa_kernels.ops.cache import counters
from gqa_kernels.ops.cache.decode_kernel import _decode_kernel
from gqa_kernels.runtime import checks, configs, launch, layout, library, target

MAX_NEW_TOKENS = 16  # as in the reference

_launch_decode = launch.launcher(_decode_kernel)


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    q, k_cache, v_cache = map(layout.contiguous_features, (q, k_cache, v_cache))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    capacity = layout.cache_capacity(k_cache, block_table)
    lse_shape = batch, num_q_heads, seq_len_q
    if capacity == 0:
        none_seen = None
        if need_lse:
            none_seen = torch.full(lse_shape, -float("inf"), dtype=torch.float32, device=q.device)
            if sinks is not None:
                none_seen.copy_(sinks[:, None])
        return q.new_zeros(q.shape), none_seen
    key_mask = layout.key_mask(key_mask)
    sinks, alibi_slopes = (None if x is None else x.contiguous() for x in (sinks, alibi_slopes))
    softmax_scale = checks.softmax_scale(softmax_scale, head_dim)
    # Exceeds every distance between a query and a key.
    farthest = capacity + seq_len_q
    window_left, window_right = (
        None if side is None else min(side, farthest) for side in (window_left, window_right)
    )
    reach = capacity  # the largest number of keys in the chunks of a sequence
    if window_left is not None:
        reach = min(capacity, window_left + seq_len_q + configs.DECODE_CHUNK - 1)
    num_queries = batch * seq_len_q * num_q_heads
    num_rows = seq_len_q * (num_q_heads // num_kv_heads)
    config = configs.decode_config(k_cache.element_size(), head_dim)
    block_m = min(config.max_block_m, max(16, layout.power_of_2(num_rows)))
    if num_rows == 1:
        block_m = configs.DECODE_LONE_ROW
    block_d = max(16, layout.power_of_2(head_dim))
    num_tiles = batch * num_kv_heads * layout.cdiv(num_rows, block_m)
    num_slots = min(layout.cdiv(reach, configs.DECODE_CHUNK), configs.DECODE_MAX_SPLITS)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out_lse = None
    if need_lse:
        out_lse = torch.empty(*lse_shape, dtype=torch.float32, device=q.device)
    partial = torch.empty(num_queries, num_slots, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_queries, num_slots, dtype=torch.float32, device=q.device)
    with target.device_of(q):
        num_programs = configs.DECODE_PROGRAMS_PER_SM * target.current().num_sms
        _launch_decode(
            (num_tiles, min(num_slots, layout.cdiv(num_programs, max(num_tiles, 1)))),
            q_ptr=q,
            k_ptr=k_cache,
            v_ptr=v_cache,
            seq_lens_ptr=seq_lens,
            block_table_ptr=block_table,
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            key_ranges_ptr=key_ranges,
            key_mask_ptr=key_mask,
            sinks_ptr=sinks,
            alibi_slopes_ptr=alibi_slopes,
            out_ptr=out,
            out_lse_ptr=out_lse,
            partial_ptr=partial,
            lse_ptr=lse,
            counters_ptr=counters.zeroed(num_tiles, q.device),
            q_strides=q.stride()[:3],
            k_strides=k_cache.stride()[:3],
            v_strides=v_cache.stride()[:3],
            seq_lens_stride=0 if seq_lens is None else seq_lens.stride(0),
            block_table_strides=None if block_table is None else block_table.stride(),
            k_scale_strides=None if k_scale is None else k_scale.stride(),
            v_scale_strides=None if v_scale is None else v_scale.stride(),
            key_ranges_strides=None if key_ranges is None else key_ranges.stride(),
            key_mask_stride=None if key_mask is None else key_mask.stride(0),
            alibi_stride=None if alibi_slopes is None else layout.sequence_stride(alibi_slopes),
            capacity=capacity,
            num_pages=k_cache.shape[0],
            num_slots=num_slots,
            window_left=window_left,
            window_right=window_right or None,  # IS_CAUSAL replaces 0
            score_unit=softmax_scale if softcap is None else float(softcap),
            cap_scale=None if softcap is None else softmax_scale / softcap,
            NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=num_q_heads // num_kv_heads,
            SEQ_LEN_Q=seq_len_q,
            HEAD_DIM=head_dim,
            IS_CAUSAL=window_right == 0,
            PAGE_SIZE=1 if block_table is None else k_cache.shape[1],
            SCALE_PER_TOKEN=k_scale is not None and k_scale.dim() == 3,
            CHUNK=configs.DECODE_CHUNK,
            MAX_SPLITS=configs.DECODE_MAX_SPLITS,
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            BLOCK_R=min(block_m, configs.DECODE_COMBINE_FEATURES // block_d),
            BLOCK_S=configs.DECODE_COMBINE_SPLITS,
            NUM_STAGES=config.num_stages,
            num_warps=configs.DECODE_NUM_WARPS,
            num_stages=config.num_stages,
        )
    return out, out_lse


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    checks.tensor("q", q, shape=("batch", "seq_len_q", "num_q_heads", "head_dim"))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    like = ("q", q)
    if block_table is None:
        shape = (batch, "max_seq_len", "num_kv_heads", head_dim)
    else:
        shape = ("num_pages", "page_size", "num_kv_heads", head_dim)
    checks.kv_caches(k_cache, v_cache, k_scale, v_scale, shape=shape, like=like)
    if seq_lens is not None:
        checks.tensor("seq_lens", seq_lens, dtypes=checks.INTS, shape=(batch,), like=like)
    if block_table is not None:
        checks.block_table(block_table, batch, k_cache.shape[1], like=like)
    sizes = (batch, seq_len_q, layout.cache_capacity(k_cache, block_table))
    checks.key_limits(key_ranges, key_mask, sizes, like=like)
    checks.attention_heads(num_q_heads, k_cache.shape[2], head_dim, multiple=1)
    checks.softcap(softcap, checks.softmax_scale(softmax_scale, head_dim))
    checks.window((window_left, window_right))
    checks.head_terms(sinks, alibi_slopes, batch, num_q_heads, like=like)
    if not 1 <= seq_len_q <= MAX_NEW_TOKENS:
        raise NotImplementedError(
            f"q: expected a seq_len_q of 1 to {MAX_NEW_TOKENS}; got {seq_len_q}"
        )


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, seq_len_q, num_q_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, num_q_heads, seq_len_q), dtype=torch.float32)


refuse_gradient = library.refuse_gradient("decode")


_DECODE_ATTENTION = library.Op(
    "decode_attention", _forward, _fake, check=check, refuse=refuse_gradient
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor | None,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last tokens of each sequence over its cache; see
    `reference.decode_attention`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`, seq_len_q 1 to
            16; head_dim up to 256; any strides. Where head_dim is no multiple of 8, features are
            read one by one, which is slow.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]`, or with a block_table
            `[num_pages, page_size, num_kv_heads, head_dim]`, page_size a power of two; q's dtype,
            or both float8_e4m3fn or int8; any strides with contiguous features.
        seq_lens: int32 or int64 `[batch]` in [0, capacity], the new tokens included; capacity is
            max_seq_len, or max_pages · page_size. The kernel reads them on the device; a length
            above the capacity counts as the capacity. None: every sequence has length capacity.
        block_table: int32 `[batch, max_pages]`. Entries beyond a length are not read; the keys of
            an entry outside [0, num_pages) count as hidden.
        k_scale, v_scale: float32 `[num_kv_heads]` or `[*k_cache.shape[:2], num_kv_heads]`, for
            float8_e4m3fn and int8 caches only.
        causal: new token i sees entries up to its own; False: all entries of its sequence.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window, softcap, sinks, alibi_slopes: as in `flash_attention`. Tiles of keys before the
            windows of all new tokens are skipped.
        key_ranges, key_mask: as in `flash_attention`, with capacity for seq_len_kv.
        return_lse: also return the natural-log lse, float32 `[batch, num_q_heads, seq_len_q]`.
    Returns:
        out `[batch, seq_len_q, num_q_heads, head_dim]`, contiguous, or (out, lse). For a query that
        sees no key, out is 0 and lse is −inf or its sink.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: a head_dim above 256, more than 16 new tokens, a page_size that is no
            power of two, a float8_e4m3fn cache on a GPU without that type, or an input that
            requires a gradient.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    return_lse = checks.flag("return_lse", return_lse)
    softmax_scale = checks.optional_number("softmax_scale", softmax_scale)
    softcap = checks.optional_number("softcap", softcap)
    window_left, window_right = checks.window(window)
    window_right = 0 if checks.flag("causal", causal) else window_right
    out, lse = _DECODE_ATTENTION(
        q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, key_ranges, key_mask,
        softmax_scale, window_left, window_right, softcap, sinks, alibi_slopes,
        need_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
