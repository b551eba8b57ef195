"""The part of `flash_attn_with_kvcache` that rotates the new tokens and writes them to the cache.

`rope_append_kv` does both in one launch where headdim is a multiple of 8 and all of it, or its
first interleaved pairs, are rotated. Otherwise the rotated features and the rest are separate
tensors of fewer features, and features whose number is no multiple of 8 are written by PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from gqa_kernels.ops.cache.append import rope_append_kv
from gqa_kernels.ops.rope import apply_rope
from gqa_kernels.runtime import checks


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    before: Tensor,
    rows: Tensor | None,
    turns: bool,
    interleaved: bool,
) -> Tensor:
    """Writes k, rotated, and v to the entries after `before` of their sequences; returns q rotated.

    Args:
        cos, sin: None: nothing is rotated.
        before: int64 (batch,).
        rows: the rows of the caches that hold each sequence, see `pages.py`; None: row b holds
            sequence b.
        turns: query i is rotated by the angle of entry before + i, otherwise by that of `before`.
    """
    entries = before[:, None] + torch.arange(k.shape[1], device=q.device)
    slots = _slots(entries, k_cache, rows)
    if cos is None or cos.shape[1] == 0:
        _write(k, v, k_cache, v_cache, slots)
        return q
    headdim, rotary_dim = q.shape[3], 2 * cos.shape[1]
    places = before[:, None] + torch.arange(q.shape[1], device=q.device) * turns
    together = turns and q.shape[1] == k.shape[1]  # q and k are rotated by the same entries
    options = {"interleaved": interleaved}
    if headdim % 8 == 0 and (interleaved or rotary_dim == headdim):
        rest = headdim // 2 - cos.shape[1]  # pairs that are not rotated
        cos, sin = F.pad(cos.float(), (0, rest), value=1.0), F.pad(sin.float(), (0, rest))
        written = (k_cache, v_cache, cos, sin, entries, slots)
        if together:
            return rope_append_kv(q, k, v, *written, **options)[0]
        rope_append_kv(k, k, v, *written, **options)
        return apply_rope(q, q[:, :, : k.shape[2]], cos, sin, places, **options)[0]
    angles = cos.float(), sin.float()
    turned_q, turned_k = q[..., :rotary_dim], k[..., :rotary_dim]
    if together:
        turned_q, turned_k = apply_rope(turned_q, turned_k, *angles, entries, **options)
    else:
        turned_k, _ = apply_rope(turned_k, turned_k[:, :, :1], *angles, entries, **options)
        turned_q, _ = apply_rope(turned_q, turned_q[:, :, :1], *angles, places, **options)
    k = torch.cat([turned_k, k[..., rotary_dim:]], -1)
    _write(k, v, k_cache, v_cache, slots)
    return torch.cat([turned_q, q[..., rotary_dim:]], -1)


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes k and v to their slots as they are."""
    headdim = k.shape[3]
    if headdim % 8 == 0:  # rotates by 0
        cos = torch.ones(1, headdim // 2, dtype=torch.float32, device=k.device)
        angles = cos, torch.zeros_like(cos), torch.zeros_like(slots)
        rope_append_kv(k, k, v, k_cache, v_cache, *angles, slots)
        return
    if not is_compiling():  # checks are not traced
        checks.separate_entries("k_cache", k_cache)
        checks.separate_entries("v_cache", v_cache)
    for cache, x in ((k_cache, k), (v_cache, v)):
        if cache.numel() and x.numel():
            _scatter(x.flatten(0, 1), cache, slots.flatten())


def _scatter(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    """cache[slot] = x for each token that has a slot, without waiting for the device: a token
    without one repeats the write of one that has, or what slot 0 holds if there is none."""
    size = cache.shape[1]
    there = (slots >= 0) & (slots < cache.shape[0] * size)
    token = torch.arange(len(slots), device=x.device)
    token = torch.where(there, token, there.int().argmax())
    new = torch.where(there.any(), x[token], cache[0, 0])
    slots = torch.where(there.any(), slots[token], 0)
    cache.index_put_((slots // size, slots % size), new)


def _slots(entries: Tensor, cache: Tensor, rows: Tensor | None) -> Tensor:
    """Slots: indices into the first two dimensions of a cache, flattened; −1 for an entry beyond
    the rows of its sequence. A row that is not there gives slots that are not there."""
    size = cache.shape[1]
    if rows is None:
        row = torch.arange(len(entries), device=entries.device)[:, None]
        slots, capacity = row * size + entries, size
    else:
        num_rows = rows.shape[1]
        capacity = size * num_rows
        if capacity == 0:
            return torch.full_like(entries, -1)
        index = (entries // size).clamp(0, num_rows - 1)
        slots = rows.long().gather(1, index) * size + entries % size
    return torch.where((entries >= 0) & (entries < capacity), slots, -1)
