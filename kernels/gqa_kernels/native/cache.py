"""Ops on the entries of a key/value cache that are in use; contracts as in `reference.cache`."""

from itertools import pairwise

import torch
from torch import Tensor

from gqa_kernels import reference
from gqa_kernels.native.attention import attend, flash_attention
from gqa_kernels.native.rows import apply_rope, reads_freely
from gqa_kernels.reference.attention import packed_bounds


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
    """See `reference.rope_append_kv`, which also writes quantised caches."""
    caches = k_cache, v_cache
    if k_scale is not None or v_scale is not None or not reads_freely(q):
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        angles = cos, sin, positions
        return reference.rope_append_kv(
            q, k, v, *caches, *angles, slots, **scales, interleaved=interleaved
        )
    q, k = apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    _write(caches, slots.flatten().long(), (k, v))
    return q, k


def _write(caches: tuple[Tensor, Tensor], slots: Tensor, new: tuple[Tensor, Tensor]) -> None:
    """cache[slot] = x for each token whose slot is in the cache."""
    num_slots, numbers = caches[0].shape[0] * caches[0].shape[1], slots.tolist()
    new = tuple(x.reshape(-1, *x.shape[2:]) for x in new)
    if not numbers:
        return
    if min(numbers) < 0 or max(numbers) >= num_slots:
        there = ((slots >= 0) & (slots < num_slots)).nonzero()[:, 0]
        slots, new = slots[there], tuple(x[there] for x in new)
    for cache, x in zip(caches, new, strict=True):
        if cache.is_contiguous():
            cache.view(num_slots, *cache.shape[2:]).index_copy_(0, slots, x)
        else:
            cache[slots // cache.shape[1], slots % cache.shape[1]] = x


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
    """See `reference.decode_attention`, which computes all but causal attention over a cache of
    q's dtype without further options."""
    options = k_scale, v_scale, window, softcap, sinks, alibi_slopes, key_ranges, key_mask
    plain = causal and all(option is None for option in options)
    taken = 0 < q.shape[1] <= reference.MAX_NEW_TOKENS  # the reference raises for others
    if plain and taken and not return_lse and reads_freely(q):
        lengths = _lengths(q, k_cache, seq_lens, block_table)
        out = _attend_to_used(q, k_cache, v_cache, lengths, block_table, softmax_scale)
        if out is not None:
            return out
    return reference.decode_attention(
        q,
        k_cache,
        v_cache,
        seq_lens,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_ranges=key_ranges,
        key_mask=key_mask,
        return_lse=return_lse,
    )


def _lengths(
    q: Tensor, k_cache: Tensor, seq_lens: Tensor | None, block_table: Tensor | None
) -> list[int]:
    if seq_lens is None:
        return [_capacity(k_cache, block_table)] * len(q)
    return seq_lens.tolist()


def _capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """The most tokens that a sequence can have."""
    return k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _attend_to_used(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: list[int],
    block_table: Tensor | None,
    softmax_scale: float | None,
) -> Tensor | None:
    """Attention over the longest length in the batch. None if all sequences are empty, if one
    that is not has fewer tokens than there are new ones, if a length exceeds the capacity, or if a
    page does not exist: the reference computes these cases."""
    seq_len_q, longest, shortest = q.shape[1], max(lengths, default=0), min(lengths, default=0)
    if shortest <= 0 < longest:  # empty sequences give 0
        used = [row for row, length in enumerate(lengths) if length > 0]
        rows = torch.tensor(used, dtype=torch.int64, device=q.device)
        if block_table is None:
            k_cache, v_cache = k_cache[rows, :longest], v_cache[rows, :longest]
        else:
            block_table = block_table[rows]
        lengths = [lengths[row] for row in used]
        some = _attend_to_used(q[rows], k_cache, v_cache, lengths, block_table, softmax_scale)
        return None if some is None else torch.zeros_like(q).index_copy(0, rows, some)
    if longest > _capacity(k_cache, block_table):
        return None
    if shortest < seq_len_q:
        return None
    visible = None
    if shortest < longest or seq_len_q > 1:
        keys = torch.arange(longest, device=q.device)
        ends = torch.tensor(lengths, dtype=torch.int64, device=q.device)[:, None, None]
        new = torch.arange(1 - seq_len_q, 1, device=q.device)
        visible = (keys < ends + new[:, None])[:, None]
    if block_table is None and shortest == longest:
        k, v = k_cache.narrow(1, 0, longest), v_cache.narrow(1, 0, longest)
    else:
        slots = _slots(lengths, k_cache.shape, block_table)
        if slots is None:
            return None
        k, v = _entries(k_cache, slots), _entries(v_cache, slots)
    return attend(q, k, v, softmax_scale, visible=visible)


def _slots(
    lengths: list[int], cache_shape: torch.Size, block_table: Tensor | None
) -> Tensor | None:
    """Returns the slots of each sequence's entries, int64 `[batch, longest]`. A shorter sequence
    repeats its last slot, so that nothing beyond its length is read. None if a page does not
    exist."""
    num_pages, page_size = cache_shape[:2]
    ends = torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
    entry = torch.arange(max(lengths), device="cpu").minimum(ends - 1)
    if block_table is None:
        return entry + torch.arange(len(lengths), device="cpu")[:, None] * page_size
    pages = block_table.gather(1, entry // page_size)
    lowest, highest = (bound.item() for bound in pages.aminmax())
    if lowest < 0 or highest >= num_pages:
        return None
    return pages.long() * page_size + entry % page_size


def _entries(cache: Tensor, slots: Tensor) -> Tensor:
    if cache.is_contiguous():
        rows = cache.view(-1, *cache.shape[2:]).index_select(0, slots.flatten())
        return rows.view(*slots.shape, *cache.shape[2:])
    return cache[slots // cache.shape[1], slots % cache.shape[1]]


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
    """See `reference.prefill_attention`, which computes all options but those of the cache."""
    plain = causal and all(x is None for x in (window, softcap, sinks, alibi_slopes))
    if plain and not return_lse and reads_freely(q):
        caches = (k_cache, k_scale), (v_cache, v_scale)
        out = _prefill_used(q, caches, cu_seqlens_q, seq_lens, block_table, softmax_scale)
        if out is not None:
            return out
    return reference.prefill_attention(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        seq_lens,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )


def _prefill_used(
    q: Tensor,
    caches: tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    cu_seqlens_q: Tensor,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
) -> Tensor | None:
    """Attention over the entries of each sequence; `caches` are keys and values, each with its
    scale. None if there is no new token, if a sequence has fewer tokens than new ones, if a row
    belongs to no sequence, if a length exceeds the capacity, or if a page does not exist: the
    reference computes these cases."""
    k_cache = caches[0][0]
    capacity = _capacity(k_cache, block_table)
    bounds = packed_bounds("cu_seqlens_q", cu_seqlens_q, len(q))
    lengths = [capacity] * (len(bounds) - 1) if seq_lens is None else seq_lens.tolist()
    if len(q) == 0 or bounds[-1] != len(q) or max(lengths) > capacity:
        return None
    outs = []
    for row, ((first, end), length) in enumerate(zip(pairwise(bounds), lengths, strict=True)):
        if first == end:
            continue
        if end - first > length:
            return None
        table = None if block_table is None else block_table[row : row + 1]
        slots = _slots([length], k_cache.shape, table)
        if slots is None:
            return None
        if block_table is None:
            slots = slots + row * capacity
        k, v = (_dequantized(cache, scale, slots, q.dtype) for cache, scale in caches)
        outs.append(
            flash_attention(q[None, first:end], k, v, causal=True, softmax_scale=softmax_scale)
        )
    return torch.cat(outs, dim=1)[0]


def _dequantized(cache: Tensor, scale: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    entries = _entries(cache, slots)
    if scale is None:
        return entries
    if scale.dim() == 3:
        scale = _entries(scale, slots)
    return (entries.to(scale.dtype) * scale[..., None]).to(dtype)
