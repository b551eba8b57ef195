"""Attention in plain PyTorch."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from gqa_kernels.reference.rows import wide

_FARTHEST = 2**62  # no key is further away; the key at this distance is still an int64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    softmax_scale: float | None,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with a boolean mask. For a query that sees no key and has no sink, out is 0
    and lse is −inf."""
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    group_size = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)  # [batch, num_q_heads, seq_len_q, head_dim]
    k = k.transpose(1, 2).repeat_interleave(group_size, dim=1)
    v = v.transpose(1, 2).repeat_interleave(group_size, dim=1)
    scores = wide(q @ k.transpose(-1, -2)) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # [batch, num_q_heads, seq_len_q]
    if sinks is not None:
        lse = torch.logaddexp(lse, wide(sinks)[:, None].to(lse.dtype))
    blind = lse == -math.inf
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse


def in_window(
    own_key: Tensor, key: Tensor, causal: bool, window: tuple[int | None, int | None] | None
) -> Tensor | None:
    """Whether a key is in the window around the key with which a query is aligned; None if no side
    is limited."""
    sides = window or (None, None)
    left, right = (None if side is None else min(side, _FARTHEST) for side in sides)
    if causal:
        right = 0
    sides = []
    if left is not None:
        sides.append(key >= own_key - left)
    if right is not None:
        sides.append(key <= own_key + right)
    return torch.stack(torch.broadcast_tensors(*sides)).all(0) if sides else None


def alibi_bias(slopes: Tensor | None, own_key: Tensor, key: Tensor) -> Tensor | None:
    """−slope · |p − j|, `[…, num_q_heads, seq_len_q, seq_len_kv]`."""
    return None if slopes is None else -slopes[..., None, None] * (own_key - key).abs()


def in_range(key_ranges: Tensor | None, key: Tensor) -> Tensor | None:
    """Whether a key is in a query's range, `[batch, 1, seq_len_q, seq_len_kv]`."""
    if key_ranges is None:
        return None
    first, end = key_ranges[:, None, :, :1], key_ranges[:, None, :, 1:]
    return (key >= first) & (key < end)


def nonzero(key_mask: Tensor | None) -> Tensor | None:
    """Whether a key is visible, `[batch, 1, 1, seq_len_kv]`."""
    return None if key_mask is None else (key_mask != 0)[:, None, None]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped key/value heads.

    With p = i + seq_len_kv − seq_len_q, the key that query i is aligned with (the last query is
    aligned with the last key), the score of query i and key j of head h is

        s = softmax_scale · qᵢ · kⱼ
        s ← softcap · tanh(s / softcap)                     with `softcap`
        s ← s − alibi_slopes[h] · |p − j|                   with `alibi_slopes`

    and out_i = Σⱼ exp(s − lse) vⱼ, lse = log(Σⱼ exp(s) [+ exp(sinks[h])]), over the visible keys.

    Args:
        q: `[batch, seq_len_q, num_q_heads, head_dim]`.
        k, v: `[batch, seq_len_kv, num_kv_heads, head_dim]`; num_q_heads is a multiple of
            num_kv_heads (equal: MHA; 1: MQA; between: GQA).
        causal: query i sees keys j ≤ p.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window: (left, right): query i sees keys p − left ≤ j ≤ p + right; None does not limit a
            side. Causal attention sees no key to the right, regardless of the window.
        softcap: positive.
        sinks: `[num_q_heads]`: the score of one more key per head, whose value is 0.
        alibi_slopes: `[num_q_heads]` or `[batch, num_q_heads]`, a constant.
        key_ranges: `[batch, seq_len_q, 2]`: (first, end) of the keys that each query may see,
            first ≤ j < end, in addition to all other masks. With an empty range it sees no key.
        key_mask: `[batch, seq_len_kv]`: a key with 0 is hidden from every query.
        return_lse: also return lse.
    Returns:
        out `[batch, seq_len_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log
        lse `[batch, num_q_heads, seq_len_q]` in float32. For a query that sees no key, out is 0 and
        lse is −inf or its sink.
    Reference: Dao et al. 2022, arXiv:2205.14135; Ainslie et al. 2023, arXiv:2305.13245. Windows:
        Beltagy et al. 2020, arXiv:2004.05150. Soft cap: Gemma Team 2024, arXiv:2408.00118. Sinks:
        OpenAI 2025, arXiv:2508.10925. ALiBi: Press et al. 2022, arXiv:2108.12409.
    """
    own_key = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)[None, :]
    visible = in_window(own_key, key, causal, window)
    for limit in (in_range(key_ranges, key), nonzero(key_mask)):
        if limit is not None:
            visible = limit if visible is None else visible & limit
    bias = alibi_bias(alibi_slopes, own_key, key)
    out, lse = attend(q, k, v, visible, softmax_scale, softcap=softcap, bias=bias, sinks=sinks)
    return (out, lse) if return_lse else out


def packed_bounds(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Returns the bounds of packed sequences as numbers; those beyond `total` count as `total`.

    Raises:
        ValueError: bounds that do not begin at 0, or decrease.
    """
    bounds = [min(bound, total) for bound in cu_seqlens.tolist()]
    if bounds[0] != 0 or bounds != sorted(bounds):
        raise ValueError(f"{name}: expected bounds from 0 that never decrease; got {bounds!r:.80}")
    return bounds


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of packed sequences; a sequence does not see the others.

    Sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 and the keys
    cu_seqlens_kv[b] … cu_seqlens_kv[b + 1] − 1. Either may be empty. Rows after the last sequence
    belong to no sequence: they see no key and no query sees them.

    Args:
        q: `[total_q, num_q_heads, head_dim]`.
        k, v: `[total_kv, num_kv_heads, head_dim]`.
        cu_seqlens_q, cu_seqlens_kv: int32 or int64 `[num_sequences + 1]`, from 0 and never
            decreasing.
        alibi_slopes: `[num_q_heads]` or `[num_sequences, num_q_heads]`, a constant.
        All else as in `flash_attention`.
    Returns:
        out `[total_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log lse
        `[num_q_heads, total_q]` in float32.
    """
    bounds_q = packed_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_kv = packed_bounds("cu_seqlens_kv", cu_seqlens_kv, k.shape[0])
    # The rows after the last sequence become one more sequence without keys.
    bounds_q, bounds_kv = [*bounds_q, q.shape[0]], [*bounds_kv, bounds_kv[-1]]
    lengths_q, lengths_kv = ([j - i for i, j in pairwise(x)] for x in (bounds_q, bounds_kv))
    # The gradient of a split is one tensor; each slice would have a gradient of the size of q.
    queries = q.split(lengths_q)
    keys, values = (x[: bounds_kv[-1]].split(lengths_kv) for x in (k, v))
    outs, lses = [], []
    for b in range(len(queries)):
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[min(b, slopes.shape[0] - 1)]
        out, lse = flash_attention(
            queries[b][None],
            keys[b][None],
            values[b][None],
            causal=causal,
            softmax_scale=softmax_scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=slopes,
            return_lse=True,
        )
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out
