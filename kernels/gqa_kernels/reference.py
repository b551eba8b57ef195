"""The ops in plain PyTorch: the specification that every kernel is checked against.

Nothing here is tuned. Every function runs on any device and in any floating dtype, differentiates
through autograd, and keeps its intermediate results in `promote_types(dtype, float32)` wherever the
kernels keep them in float32. Evaluated in float64, a function is its own oracle.

Layout: `[batch, seq_len, num_heads, head_dim]`. Query head h reads key/value head h // group_size,
where group_size = num_q_heads / num_kv_heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest value of each dtype of a quantised cache; int8's −128 is not used.
_LARGEST_STORED = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = cast(x / sqrt(mean(x²) + eps)) · weight, the mean over the last dimension.

    Llama's order of roundings: statistics in float32, cast to `x.dtype`, then times `weight`.

    Args:
        x: `[..., hidden_size]`.
        weight: `[hidden_size]`.
        eps: added to the mean square; the Llama 2 checkpoints use 1e-5.
    Returns:
        `[..., hidden_size]` in `promote_types(x.dtype, weight.dtype)`.
    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    wide = _wide(x)
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalized.to(x.dtype) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = x + residual, rounded to `x.dtype`; y = rms_norm(h, weight, eps).

    Args:
        x, residual: `[..., hidden_size]`, of one shape and dtype.
        weight: `[hidden_size]`.
    Returns:
        (y, h): the normalised sum, and the sum itself, which is the next residual.
    """
    hidden = x + residual
    return rms_norm(hidden, weight, eps), hidden


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, with silu(z) = z / (1 + exp(-z)), computed in float32 and rounded once.

    Args:
        gate, up: `[..., intermediate_size]`, of one shape and dtype.
    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = _wide(x)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return out.to(x.dtype)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates each pair of features (a, b) of q and k at position p by the angle of the pair:
    (a, b) → (a·cos[p] − b·sin[p], b·cos[p] + a·sin[p]), in float32, rounded once.

    Args:
        q: `[batch, seq_len, num_q_heads, head_dim]`.
        k: `[batch, seq_len, num_kv_heads, head_dim]`.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`.
        positions: integer `[batch, seq_len]`; None means 0, 1, … seq_len − 1 in every sequence.
            A position outside [0, max_seq_len) gives NaN in its row.
        interleaved: pairs are (2i, 2i + 1), as in Meta's checkpoints; otherwise
            (i, i + head_dim / 2), as in Hugging Face's.
    Returns:
        (q, k) rotated, in new tensors.
    Reference: Su et al. 2021, arXiv:2104.09864.
    """
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    outside = (positions < 0) | (positions >= cos.shape[0])
    if cos.shape[0] == 0:  # no position is in the table: NaN as well
        cos = sin = cos.new_zeros(1, cos.shape[1])
    rows = positions.clamp(0, cos.shape[0] - 1).long()
    # [batch, seq_len, 1, head_dim / 2]: one angle for all heads
    cos = cos[rows].masked_fill(outside[..., None], math.nan).unsqueeze(2)
    sin = sin[rows].masked_fill(outside[..., None], math.nan).unsqueeze(2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale to the nearest value of dtype, ties to even. A scale of 0 divides by 1."""
    largest = _LARGEST_STORED[dtype]
    steps = (_wide(x) / torch.where(scale == 0, 1.0, scale)[..., None]).clamp(-largest, largest)
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
                largest = _wide(x).abs().amax(-1)
                per_token = (largest / _LARGEST_STORED[cache.dtype]).to(scale)
                _write(scale, slots, per_token)
                scale = per_token
            x = _quantized(x, scale, cache.dtype)
        _write(cache, slots, x)
    return q, k


def _attend(
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
    """Softmax attention under a boolean mask; a query that sees no key and has no sink gives 0 and
    lse −inf."""
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    group_size = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)  # [batch, num_q_heads, seq_len_q, head_dim]
    k = k.transpose(1, 2).repeat_interleave(group_size, dim=1)
    v = v.transpose(1, 2).repeat_interleave(group_size, dim=1)
    scores = _wide(q @ k.transpose(-1, -2)) * softmax_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)  # [batch, num_q_heads, seq_len_q]
    if sinks is not None:
        lse = torch.logaddexp(lse, _wide(sinks)[:, None].to(lse.dtype))
    blind = lse == -math.inf
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse


def _in_range(key_ranges: Tensor | None, key: Tensor) -> Tensor | None:
    """`[batch, 1, seq_len_q, seq_len_kv]`: whether a key lies in a query's range."""
    if key_ranges is None:
        return None
    first, end = key_ranges[:, None, :, :1], key_ranges[:, None, :, 1:]
    return (key >= first) & (key < end)


def _nonzero(key_mask: Tensor | None) -> Tensor | None:
    """`[batch, 1, 1, seq_len_kv]`: whether a key is shown at all."""
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

    With p = i + seq_len_kv − seq_len_q, the key that query i stands on (so that the last query
    stands on the last key), the score of query i and key j of head h is

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
            side. Causal attention sees no key to the right whatever the window.
        softcap: positive.
        sinks: `[num_q_heads]`: the score of one more key per head, whose value is 0.
        alibi_slopes: `[num_q_heads]` or `[batch, num_q_heads]`, a constant.
        key_ranges: `[batch, seq_len_q, 2]`: (first, end) of the keys that each query may see,
            first ≤ j < end, beside all else. An empty range sees no key.
        key_mask: `[batch, seq_len_kv]`: a key with 0 is hidden from every query.
        return_lse: also return lse.
    Returns:
        out `[batch, seq_len_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log
        lse `[batch, num_q_heads, seq_len_q]` in float32. A query that sees no key gives 0, and
        −inf or its sink.
    Reference: Dao et al. 2022, arXiv:2205.14135; Ainslie et al. 2023, arXiv:2305.13245. Windows:
        Beltagy et al. 2020, arXiv:2004.05150. Soft cap: Gemma Team 2024, arXiv:2408.00118. Sinks:
        OpenAI 2025, arXiv:2508.10925. ALiBi: Press et al. 2022, arXiv:2108.12409.
    """
    own_key = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)[None, :]
    left, right = window or (None, None)
    if causal:
        right = 0
    visible = None
    if left is not None or right is not None:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        if left is not None:
            visible &= key >= own_key - left
        if right is not None:
            visible &= key <= own_key + right
    for limit in (_in_range(key_ranges, key), _nonzero(key_mask)):
        if limit is not None:
            visible = limit if visible is None else visible & limit
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes[..., None, None] * (own_key - key).abs()
    out, lse = _attend(q, k, v, visible, softmax_scale, softcap=softcap, bias=bias, sinks=sinks)
    return (out, lse) if return_lse else out


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
    """`flash_attention` of sequences packed one after another; none sees another.

    Sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 and the keys
    cu_seqlens_kv[b] … cu_seqlens_kv[b + 1] − 1. Either may be empty. Rows after the last sequence
    belong to none: they see no key and no query sees them.

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
    bounds_q = [min(x, q.shape[0]) for x in cu_seqlens_q.tolist()]
    bounds_kv = [min(x, k.shape[0]) for x in cu_seqlens_kv.tolist()]
    # The rows after the last sequence, as one more sequence without keys.
    bounds_q, bounds_kv = [*bounds_q, q.shape[0]], [*bounds_kv, bounds_kv[-1]]
    outs, lses = [], []
    for b in range(len(bounds_q) - 1):
        queries, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_kv[b : b + 2])
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[min(b, slopes.shape[0] - 1)]
        out, lse = flash_attention(
            q[None, queries],
            k[None, keys],
            v[None, keys],
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


def _dequantized(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
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
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last 1…16 tokens of each sequence over its key/value cache.

    Sequence b holds `seq_lens[b]` tokens, its new ones included; new token i sees the keys
    j < seq_lens[b] − (seq_len_q − 1 − i). What lies in the cache beyond a length, NaN included,
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
            A length above the capacity counts as the capacity.
        block_table: int32 `[batch, max_pages]`: the page of each page_size tokens of a sequence.
        k_scale, v_scale: of a quantised cache, float32, `[num_kv_heads]` or, one per token,
            `[*cache.shape[:2], num_kv_heads]`.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        key_ranges, key_mask: as in `flash_attention`, with capacity for seq_len_kv: they name
            positions in a sequence, wherever its pages lie.
        return_lse: also return lse, as `flash_attention` does.
    Returns:
        out `[batch, seq_len_q, num_q_heads, head_dim]`, and with `return_lse` the natural-log lse
        `[batch, num_q_heads, seq_len_q]`, −inf where a query sees no key.
    Raises:
        NotImplementedError: another number of new tokens.
    Reference: pages: Kwon et al. 2023, arXiv:2309.06180.
    """
    seq_len_q = q.shape[1]
    if not 1 <= seq_len_q <= 16:
        raise NotImplementedError(f"q: expected a seq_len_q of 1 to 16; got {seq_len_q}")
    k, v = _dequantized(k_cache, k_scale, q.dtype), _dequantized(v_cache, v_scale, q.dtype)
    exists = None
    if block_table is not None:
        num_pages, page_size = k.shape[:2]
        if num_pages == 0:
            out, lse = torch.zeros_like(q), _wide(q[..., 0]).transpose(1, 2)
            return (out, torch.full_like(lse, -math.inf)) if return_lse else out
        here = (block_table >= 0) & (block_table < num_pages)
        pages = torch.where(here, block_table, 0)
        k, v = _gathered(k, pages), _gathered(v, pages)
        exists = here.repeat_interleave(page_size, dim=1)  # [batch, capacity]
    capacity = k.shape[1]
    seq_lens = seq_lens.clamp(0, capacity)[:, None]
    keys = torch.arange(capacity, device=q.device)
    last_key = seq_lens - seq_len_q + torch.arange(seq_len_q, device=q.device)  # [batch, seq_len_q]
    visible = (keys <= last_key[:, :, None])[:, None]
    for limit in (_in_range(key_ranges, keys), _nonzero(key_mask), _nonzero(exists)):
        if limit is not None:
            visible = visible & limit
    absent = keys >= seq_lens if exists is None else (keys >= seq_lens) | ~exists
    k, v = (x.masked_fill(absent[:, :, None, None], 0.0) for x in (k, v))
    out, lse = _attend(q, k, v, visible, softmax_scale)
    return (out, lse) if return_lse else out
