"""Ops on a key/value cache, in plain PyTorch."""

import math

import torch
from torch import Tensor

from gqa_kernels.reference.attention import alibi_bias, attend, in_range, in_window, nonzero
from gqa_kernels.reference.rows import apply_rope, wide

MAX_NEW_TOKENS = 16  # per sequence, of `decode_attention`

# The largest value of each dtype of a quantised cache; int8's −128 is not used.
_LARGEST_STORED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def _quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale to the nearest value of dtype, ties to even. A scale of 0 divides by 1."""
    largest = _LARGEST_STORED[dtype]
    steps = (wide(x) / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-largest, largest)
    if dtype == torch.int8:  # which has no NaN
        steps = steps.round().nan_to_num(nan=0.0)
    return steps.to(dtype)


def _write(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """cache[slot] = x for each token whose slot there is, without asking the device which.

    A token without a slot writes once more what another one writes; if none has a slot, what the
    first slot holds.
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
    """`apply_rope`, then the rotated k, as rounded to its dtype, and v go to their slots of the
    caches. Nothing else is written.

    Slots count the first two dimensions of a cache as one: token p of sequence b of a contiguous
    cache is slot b · max_seq_len + p, that at an offset in a page is page · page_size + offset.
    A slot outside [0, number of slots) writes nothing: −1 is the way to skip a token. Of two tokens
    with one slot either may win, feature by feature.

    A quantised cache gets x / scale, rounded to nearest even, at most ±448 (float8_e4m3fn) or ±127
    (int8) in size. A scale per head is given. A scale per token is what takes the head's largest
    |x| there, max |x| / 448 or / 127, and is written too. A head of zeros has the scale 0, which
    divides by 1. NaN or an infinity in a head makes its scale per token NaN or infinite, and with
    it all that is read back of this head NaN; under a scale per head an infinity is stored as the
    largest value, NaN as NaN in float8_e4m3fn and as 0 in int8.

    Args:
        q: `[batch, seq_len, num_q_heads, head_dim]`.
        k, v: `[batch, seq_len, num_kv_heads, head_dim]`, of q's dtype.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]` or `[num_pages, page_size,
            num_kv_heads, head_dim]`, in q's dtype or both quantised.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`.
        positions: integer `[batch, seq_len]`; as in `apply_rope`.
        slots: integer `[batch, seq_len]`.
        k_scale, v_scale: of quantised caches, float32, `[num_kv_heads]` or, one per token,
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
    """stored · scale in the dtype of the queries; the cache itself where it has no scale."""
    if scale is None:
        return cache
    return (cache.to(scale.dtype) * scale[..., None]).to(dtype)


def _gathered(cache: Tensor, pages: Tensor) -> Tensor:
    """`[batch, max_pages · page_size, num_kv_heads, head_dim]`: each sequence's pages in a row."""
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

    Sequence b holds `seq_lens[b]` tokens, its new ones included. New token i stands on the key
    p = seq_lens[b] − seq_len_q + i. Causal, it sees the keys j ≤ p; otherwise all j < seq_lens[b].
    Scores are those of `flash_attention`. What lies in the cache beyond a length, NaN included,
    never matters. A query that sees no key gives 0.

    Without `block_table` entry j of sequence b is `cache[b, j]`, and a sequence has room for
    capacity = max_seq_len tokens. With it the cache is paged: entry j is
    `cache[block_table[b, j // page_size], j % page_size]`, and capacity = max_pages · page_size.
    What the table says beyond a length never matters. A page outside [0, num_pages) within it is
    not there: its keys are hidden.

    A quantised cache holds value / scale, rounded to its dtype: value = stored · scale. Measured in
    float64 on 2048 bfloat16 keys and values of head_dim 128, over 16 draws, the error that this
    leaves in the output, root mean square over root mean square (bench/results/quantised_cache.md):

        scales                     float8_e4m3fn           int8
                                 per head  per token  per head  per token
        normal numbers             3.8 %      3.8 %     1.5 %     0.9 %
        … and tokens of
        log-normal size, σ = 0.5   5.6 %      5.6 %     3.9 %     1.3 %

    Args:
        q: `[batch, seq_len_q, num_q_heads, head_dim]`, seq_len_q ≤ 16.
        k_cache, v_cache: `[batch, max_seq_len, num_kv_heads, head_dim]`, or paged
            `[num_pages, page_size, num_kv_heads, head_dim]`, page_size a power of two; in q's
            dtype, or both quantised, float8_e4m3fn or int8.
        seq_lens: int32 or int64 `[batch]`, in [0, capacity], on q's device; read there only.
            A length above the capacity counts as the capacity. None: every sequence fills it.
        block_table: int32 `[batch, max_pages]`: the page of each page_size tokens of a sequence.
        k_scale, v_scale: of a quantised cache, float32, `[num_kv_heads]` or, one per token,
            `[*cache.shape[:2], num_kv_heads]`.
        causal: False lets the new tokens see each other's keys in both directions.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window, softcap, sinks, alibi_slopes: as in `flash_attention`.
        key_ranges, key_mask: as in `flash_attention`, with capacity for seq_len_kv: they name
            positions in a sequence, wherever its pages lie.
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
