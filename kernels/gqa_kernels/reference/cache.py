"""Ops on a key/value cache, in plain PyTorch."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from gqa_kernels.reference.attention import (
    alibi_bias,
    attend,
    in_range,
    in_window,
    nonzero,
    packed_bounds,
)
from gqa_kernels.reference.rows import apply_rope, wide

MAX_NEW_TOKENS = 16  # per sequence, in `decode_attention`

# The largest value of each dtype of a quantised cache; int8's −128 is not used.
_LARGEST_STORED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def _quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds x / scale to the nearest value of dtype, ties to even. A scale of 0 divides by 1."""
    largest = _LARGEST_STORED[dtype]
    steps = (wide(x) / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-largest, largest)
    if dtype == torch.int8:  # has no NaN
        steps = steps.round().nan_to_num(nan=0.0)
    return steps.to(dtype)


def _write(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """cache[slot] = x for each token whose slot exists, without reading the slots on the host.

    A token without a slot repeats the write of another token; if no token has a slot, it rewrites
    the content of the first slot.
    """
    if x.shape[0] == 0 or cache.shape[0] * cache.shape[1] == 0:
        return
    there = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])  # [num_tokens]
    another = torch.where(there.any(), there.to(torch.uint8).argmax(), len(x))
    token = torch.where(there, torch.arange(len(x), device=x.device), another)
    slots = torch.cat([slots, slots.new_zeros(1)])[token].long()
    x = torch.cat([x, cache[:1, 0]])[token]
    cache[slots // cache.shape[1], slots % cache.shape[1]] = x


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
    """Applies `apply_rope`, then writes the rotated k, rounded to its dtype, and v to their slots
    of the caches. Nothing else is written.

    A slot is an index into the first two dimensions of a cache, flattened: token p of sequence b of
    a contiguous cache is slot b · max_seq_len + p, the token at an offset in a page is slot
    page · page_size + offset. A slot outside [0, number of slots), such as −1, writes nothing. If
    two tokens have the same slot, each feature gets the value of either.

    A quantised cache stores x / scale, rounded to nearest even and clamped to ±448 (float8_e4m3fn)
    or ±127 (int8). Scales per head are inputs. Scales per token are outputs: max |x| / 448 or / 127
    over the head. A head of zeros has the scale 0, which divides by 1. With scales per token, NaN
    or an infinity in a head makes its scale NaN or infinite and the whole dequantised head NaN;
    with scales per head, an infinity is stored as the largest value, NaN as NaN in float8_e4m3fn
    and as 0 in int8.

    Args:
        q: `[batch, seq_len, num_q_heads, head_dim]`.
        k, v: `[batch, seq_len, num_kv_heads, head_dim]`, of q's dtype.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]` or `[num_pages, page_size,
            num_kv_heads, head_dim]`, in q's dtype or both quantised.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`.
        positions: integer `[batch, seq_len]`; as in `apply_rope`.
        slots: integer `[batch, seq_len]`.
        k_scale, v_scale: for quantised caches, float32, `[num_kv_heads]` or, one per token,
            `[*k_cache.shape[:2], num_kv_heads]`.
        interleaved: as in `apply_rope`.
    Returns:
        (q, k) rotated, in new tensors.
    Reference: slots: Kwon et al. 2023, arXiv:2309.06180.
    """
    q, k = apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    slots = slots.flatten()
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x.flatten(0, 1)
        if scale is not None:
            if scale.dim() == 3:
                largest = wide(x).abs().amax(-1)
                per_token = (largest / _LARGEST_STORED[cache.dtype]).to(scale)
                _write(scale, slots, per_token)
                scale = per_token
            x = _quantized(x, scale, cache.dtype)
        _write(cache, slots, x)
    return q, k


def dequantized(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns stored · scale in the dtype of the queries; the cache itself if it has no scale."""
    if scale is None:
        return cache
    return (cache.to(scale.dtype) * scale[..., None]).to(dtype)


def _gathered(cache: Tensor, pages: Tensor) -> Tensor:
    """Concatenates the pages of each sequence: `[batch, max_pages · page_size, num_kv_heads,
    head_dim]`."""
    return cache[pages].flatten(1, 2)


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
    """Attention of the last 1…16 tokens of each sequence over its key/value cache.

    Sequence b has `seq_lens[b]` tokens, including its new ones. New token i is aligned with key
    p = seq_lens[b] − seq_len_q + i. With causal it sees the keys j ≤ p, otherwise all keys
    j < seq_lens[b]. The scores are those of `flash_attention`. Entries of the cache beyond a length
    have no effect, not even NaN. For a query that sees no key, out is 0.

    Without `block_table`, entry j of sequence b is `cache[b, j]`, and the capacity of a sequence is
    max_seq_len tokens. With it the cache is paged: entry j is
    `cache[block_table[b, j // page_size], j % page_size]`, and the capacity is max_pages ·
    page_size. Table entries beyond a length have no effect. A page outside [0, num_pages) does not
    exist: its keys are hidden.

    A quantised cache stores value / scale, rounded to its dtype: value = stored · scale. The error
    of the output that results, root mean square over root mean square, measured in float64 on 2048
    bfloat16 keys and values of head_dim 128, over 16 draws (bench/results/quantised_cache.md):

        scales                     float8_e4m3fn           int8
                                 per head  per token  per head  per token
        normal numbers             3.8 %      3.8 %     1.5 %     0.9 %
        … with tokens of
        log-normal size, σ = 0.5   5.6 %      5.6 %     3.9 %     1.3 %

    Args:
        q: `[batch, seq_len_q, num_q_heads, head_dim]`, seq_len_q ≤ 16.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]`, or paged
            `[num_pages, page_size, num_kv_heads, head_dim]`, page_size a power of two; in q's
            dtype, or both quantised, float8_e4m3fn or int8.
        seq_lens: int32 or int64 `[batch]`, in [0, capacity], on q's device, where it is read. A
            length above the capacity counts as the capacity. None: every length is the capacity.
        block_table: int32 `[batch, max_pages]`: the page of each page_size tokens of a sequence.
        k_scale, v_scale: for a quantised cache, float32, `[num_kv_heads]` or, one per token,
            `[*cache.shape[:2], num_kv_heads]`.
        causal: new token i sees no key after its own.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window, softcap, sinks, alibi_slopes: as in `flash_attention`.
        key_ranges, key_mask: as in `flash_attention`, with the capacity as seq_len_kv. Their keys
            are positions in a sequence, not in the pages.
        return_lse: also return lse, as `flash_attention` does.
    Returns:
        out `[batch, seq_len_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log lse
        `[batch, num_q_heads, seq_len_q]`, −inf or its sink where a query sees no key.
    Raises:
        NotImplementedError: another number of new tokens.
    Reference: pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    seq_len_q = q.shape[1]
    if not 1 <= seq_len_q <= MAX_NEW_TOKENS:
        raise NotImplementedError(
            f"q: expected a seq_len_q of 1 to {MAX_NEW_TOKENS}; got {seq_len_q}"
        )
    k, v = dequantized(k_cache, k_scale, q.dtype), dequantized(v_cache, v_scale, q.dtype)
    exists = None
    if block_table is not None:
        num_pages, page_size = k.shape[:2]
        if num_pages == 0:
            out, lse = torch.zeros_like(q), wide(q[..., 0]).transpose(1, 2)
            lse = torch.full_like(lse, -math.inf)
            lse = lse if sinks is None else wide(sinks)[:, None].to(lse.dtype).expand_as(lse)
            return (out, lse) if return_lse else out
        here = (block_table >= 0) & (block_table < num_pages)
        pages = torch.where(here, block_table, 0)
        k, v = _gathered(k, pages), _gathered(v, pages)
        exists = here.repeat_interleave(page_size, dim=1)  # [batch, capacity]
    capacity = k.shape[1]
    if seq_lens is None:
        seq_lens = torch.full(q.shape[:1], capacity, dtype=torch.int64, device=q.device)
    seq_lens = seq_lens.clamp(0, capacity)[:, None]
    keys = torch.arange(capacity, device=q.device)
    new = torch.arange(seq_len_q, device=q.device)
    own_key = (seq_lens - seq_len_q + new)[:, None, :, None]  # [batch, 1, seq_len_q, 1]
    absent = keys >= seq_lens if exists is None else (keys >= seq_lens) | ~exists
    visible = ~absent[:, None, None]
    limits = in_window(own_key, keys, causal, window), in_range(key_ranges, keys), nonzero(key_mask)
    for limit in limits:
        if limit is not None:
            visible = visible & limit
    k, v = (x.masked_fill(absent[:, :, None, None], 0.0) for x in (k, v))
    bias = alibi_bias(alibi_slopes, own_key, keys)
    out, lse = attend(q, k, v, visible, softmax_scale, softcap=softcap, bias=bias, sinks=sinks)
    return (out, lse) if return_lse else out


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of any number of new tokens of each sequence over its key/value cache.

    The new tokens of sequence b are the rows cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 of q; they
    are the last of its `seq_lens[b]` tokens, all of which are in the cache. Each sequence computes
    what `decode_attention` computes, for any number of new tokens: new token i of n is aligned with
    key p = seq_lens[b] − n + i and, with causal, sees the keys j ≤ p. The rows after the last
    sequence see no key.

    Args:
        q: `[total_q, num_q_heads, head_dim]`.
        cu_seqlens_q: int32 or int64 `[batch + 1]`, from 0 and never decreasing; a sequence may have
            no new token.
        alibi_slopes: `[num_q_heads]` or `[batch, num_q_heads]`, a constant.
        All else as in `decode_attention`.
    Returns:
        out `[total_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log lse
        `[num_q_heads, total_q]`. For a query that sees no key, out is 0 and lse is −inf or its
        sink.
    Reference: chunks of prompts batched with decode steps: Agrawal et al. 2024, arXiv:2403.02310.
    """
    k_cache, v_cache = (
        dequantized(cache, scale, q.dtype)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    bounds = packed_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    batch, page_size = len(bounds) - 1, k_cache.shape[1]
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    lengths = [capacity] * batch if seq_lens is None else seq_lens.clamp(0, capacity).tolist()
    outs, lses = [], []
    # The rows after the last sequence become one more sequence, without keys.
    for b, (first, end) in enumerate(pairwise([*bounds, q.shape[0]])):
        row = min(b, max(batch - 1, 0))
        length = lengths[b] if b < batch and len(k_cache) else 0
        exist = None
        if block_table is None:
            k, v = (cache[row : row + 1].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        else:
            pages = block_table[row : row + 1, : -(-length // page_size)].flatten()
            here = (pages >= 0) & (pages < len(k_cache))
            exist = here.repeat_interleave(page_size)[:length]  # [length]
            k, v = (
                cache[torch.where(here, pages, 0)]
                .flatten(0, 1)[:length]
                .masked_fill(~exist[:, None, None], 0.0)
                for cache in (k_cache, v_cache)
            )
        keys = torch.arange(length, device=q.device)
        own_key = (torch.arange(end - first, device=q.device) + length - (end - first))[:, None]
        visible = in_window(own_key, keys, causal, window)
        if exist is not None:
            visible = exist[None] if visible is None else visible & exist
        slopes = alibi_slopes if b < batch else None  # no key, no bias
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        bias = alibi_bias(slopes, own_key, keys)
        rows = q[None, first:end]
        out, lse = attend(
            rows, k[None], v[None], visible, softmax_scale, softcap=softcap, bias=bias, sinks=sinks
        )
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out
