"""flash-attn 2.8's `flash_attn_with_kvcache` on `rope_append_kv`, `decode_attention` and, for more
queries than that takes, `prefill_attention`.

Lengths and slots, which depend on values, are computed on the device. `append.py` writes the new
tokens; `pages.py` lays a table over caches that the kernels cannot address as they are.
Source: github.com/Dao-AILab/flash-attention v2.8.3, `flash_attn/flash_attn_interface.py`.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gqa_kernels.flash_attn.append import append
from gqa_kernels.flash_attn.pages import addressed
from gqa_kernels.ops.cache import decode, prefill
from gqa_kernels.runtime import checks, layout, library


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to a key/value cache and returns attention over the cache.

    Token i of k and v becomes entry cache_seqlens + i of its sequence: k_cache and v_cache are
    modified in place. Query i is aligned with entry p = i + seqlen_k − seqlen_q, where seqlen_k
    counts the new entries too.

    Args:
        q: float32, float16 or bfloat16 (batch, seqlen_q, nheads, headdim), seqlen_q ≥ 1, headdim up
            to 256.
        k_cache, v_cache: the same dtype, (batch_cache, seqlen_cache, nheads_k, headdim), or with a
            block_table (num_pages, page_size, nheads_k, headdim); contiguous features.
        k, v: (batch, seqlen_new, nheads_k, headdim), or None: nothing is appended.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2): k is rotated by the angles of its
            entries; q by those of entries cache_seqlens + i if attention is causal or has a window,
            otherwise by the angle of entry cache_seqlens.
        cache_seqlens: int, or int32 (batch,): number of entries before the call; None:
            seqlen_cache.
        cache_batch_idx: int32 (batch,): index in a contiguous cache of each row's sequence.
        cache_leftpad: int32 (batch,): the first entry that queries may see.
        block_table: int32 (batch, max_pages).
        softmax_scale: positive; None means 1 / sqrt(headdim).
        causal: query i sees entries j ≤ p.
        window_size: (left, right): query i sees entries p − left to p + right; a negative number,
            −1, does not limit a side.
        softcap: scores become softcap · tanh(score / softcap); 0.0: they stay as they are.
        alibi_slopes: float32 (nheads,) or (batch, nheads): scores become score − slope · |p − j|.
        rotary_interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2). Features from
            rotary_dim on are not rotated.
        num_splits: no effect. The split of a sequence depends on its length alone, so its result
            has the same bits in any batch.
        return_softmax_lse: return (out, softmax_lse).
    Returns:
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse), softmax_lse float32 (batch,
        nheads, seqlen_q). For a query that sees no entry, out is 0 and softmax_lse is −inf.

    Slow, but without a copy of the cache:
        a headdim that is no multiple of 8: the kernels read features one by one, and PyTorch writes
            the new tokens. (flash-attn pads and copies both caches in every call, and copies them
            back.)
        a cache_leftpad with more than 16 queries that are causal, have a window or alibi_slopes:
            the kernel finds each entry by a table, int32 (batch, seqlen_cache), which the call
            makes.
        a page_size that is no power of two, for the same reason: pages are read in parts, whose
            size is the largest power of two that divides page_size.
    In the last two cases and with a cache_batch_idx, the call copies both caches if their sequences
    or pages are no whole number of entries apart in memory, or not the same number in both.

    Differences to flash-attn: float32 is accepted, and so are pages of any size, any even
    rotary_dim and a block_table with a cache_leftpad; an entry beyond the cache is not written; an
    index outside the cache in cache_batch_idx or block_table stands for an empty sequence or page;
    where k is not rotated, an infinite feature makes its pair NaN.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device. Nothing has been
            written.
        NotImplementedError: a headdim above 256; a cache_batch_idx with a block_table, which
            flash-attn refuses too; an input that requires a gradient.
        RuntimeError: tensors that are not on a GPU that Triton drives.
    """
    left, right = checks.window_size(window_size)
    softcap = checks.number("softcap", softcap) or None
    checks.whole("num_splits", num_splits)
    causal = checks.switch("causal", causal)
    return_softmax_lse = checks.switch("return_softmax_lse", return_softmax_lse)
    rotary_interleaved = checks.switch("rotary_interleaved", rotary_interleaved)
    new, rotary = (k, v), (rotary_cos, rotary_sin)
    tensors = (q, k_cache, v_cache, *new, *rotary, cache_batch_idx, cache_leftpad, block_table)
    if not is_compiling():  # before anything is written; checks are not traced
        if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
            cache_seqlens = checks.whole("cache_seqlens", cache_seqlens)
        _check(*tensors, cache_seqlens)
        checks.softcap(softcap, checks.softmax_scale(softmax_scale, q.shape[3]))
        checks.head_terms(None, alibi_slopes, q.shape[0], q.shape[2], like=("q", q))
        if library.needs_graph(q, k_cache, v_cache, k, v):
            decode.refuse_gradient()
    causal = causal or q.shape[1] == 1  # the mask hides nothing from a single query
    # Queries that see the same keys with the same scores are packed into one.
    packs = not causal and left is right is alibi_slopes is None
    many = not packs and q.shape[1] > decode.MAX_NEW_TOKENS

    # Rows of a cache hold pages, or all entries of a sequence.
    rows = block_table if cache_batch_idx is None else cache_batch_idx[:, None]
    capacity = layout.cache_capacity(k_cache, rows)
    seq_lens = before = _lengths(cache_seqlens, capacity, q)
    if k is not None:
        # Whether each query is rotated by its own entry.
        turns = causal or left is not None or right is not None
        q = append(q, k, v, k_cache, v_cache, *rotary, before, rows, turns, rotary_interleaved)
        seq_lens = (before + k.shape[1]).clamp(max=capacity)

    first = None if cache_leftpad is None else cache_leftpad.long().clamp(0, capacity)
    ranges = moved = None
    if first is not None:
        if many:  # `prefill_attention` takes no ranges: the sequences begin later instead
            moved, seq_lens = first, (seq_lens - first).clamp(min=0)
        else:
            ranges = _key_ranges(first, 1 if packs else q.shape[1], capacity)
    size = k_cache.shape[1]
    if cache_batch_idx is not None or moved is not None or (rows is not None and size & (size - 1)):
        if rows is None:
            rows = torch.arange(q.shape[0], device=q.device)[:, None]
        k_cache, v_cache, block_table = addressed(k_cache, v_cache, rows, first=moved)
    options = {
        "block_table": block_table,
        "causal": causal,
        "softmax_scale": softmax_scale,
        "window": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": return_softmax_lse,
    }
    if many:
        packed = prefill.prefill_attention(
            q.flatten(0, 1), k_cache, v_cache, _bounds(q), seq_lens, **options
        )
        out, lse = packed if return_softmax_lse else (packed, None)
        out = out.view(q.shape)
        if lse is None:
            return out
        return out, lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    nheads_k = k_cache.shape[2]
    result = decode.decode_attention(
        _pack(q, nheads_k) if packs else q, k_cache, v_cache, seq_lens, key_ranges=ranges, **options
    )
    if not packs:
        return result
    if not return_softmax_lse:
        return _unpack(result, q.shape[1], nheads_k)
    out, lse = result
    return _unpack(out, q.shape[1], nheads_k), _unpack_lse(lse, q.shape[1], nheads_k)


def _bounds(q: Tensor) -> Tensor:
    """The bounds of the sequences of (batch, seqlen_q, …) one after another, int32 (batch + 1,)."""
    batch, seqlen_q = q.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: int | Tensor | None,
) -> None:
    """Checks the tensors, and cache_seqlens."""
    like = ("q", q)
    checks.tensor("q", q, shape=("batch", "seqlen_q", "nheads", "headdim"))
    batch, _, _, headdim = q.shape
    if cache_batch_idx is not None and block_table is not None:
        raise NotImplementedError("cache_batch_idx: expected None with a block_table; got a tensor")
    rows = "num_pages" if block_table is not None else "batch_cache"
    if cache_batch_idx is None and block_table is None:
        rows = batch
    checks.tensor("k_cache", k_cache, shape=(rows, "seqlen_cache", "nheads_k", headdim), like=like)
    checks.tensor("v_cache", v_cache, shape=k_cache.shape, like=like)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.same_dtype(name, cache, *like)
        if cache.stride(-1) != 1:
            raise ValueError(f"{name}: expected contiguous features; got strides {cache.stride()}")
    checks.attention_heads(q.shape[2], k_cache.shape[2], headdim, multiple=1)
    if block_table is not None:
        ints = {"dtypes": (torch.int32,), "like": like}
        checks.tensor("block_table", block_table, shape=(batch, "max_pages"), **ints)
        if k_cache.shape[1] == 0:
            raise ValueError("k_cache: expected a page_size of at least 1; got 0")
    if q.shape[1] == 0:
        raise ValueError("q: expected at least one query; got none")
    for name, x in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if x is not None:
            checks.tensor(name, x, dtypes=checks.INTS, shape=(batch,), like=like)
    if isinstance(cache_seqlens, Tensor):
        checks.tensor("cache_seqlens", cache_seqlens, dtypes=checks.INTS, shape=(batch,), like=like)
    if (k is None) != (v is None):
        raise ValueError("v: expected a tensor if k is one, and None otherwise; got the opposite")
    if k is None:
        if rotary_cos is not None or rotary_sin is not None:
            raise ValueError("k: expected a tensor with rotary_cos; got None")
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected a number or a tensor with k; got None")
    shape = (batch, "seqlen_new", k_cache.shape[2], headdim)
    checks.tensor("k", k, shape=shape, like=like)
    checks.tensor("v", v, shape=k.shape, like=like)
    for name, x in (("k", k), ("v", v)):
        checks.same_dtype(name, x, *like)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_sin: expected a tensor with rotary_cos; got one of them")
    if rotary_cos is not None:
        checks.tensor("rotary_cos", rotary_cos, shape=("seqlen_ro", "rotary_dim / 2"), like=like)
        checks.tensor("rotary_sin", rotary_sin, shape=rotary_cos.shape, like=like)
        rotary_dim = 2 * rotary_cos.shape[1]
        if rotary_dim > headdim:
            raise ValueError(
                f"rotary_cos: expected a rotary_dim of at most headdim, {headdim}; got {rotary_dim}"
            )


def _lengths(cache_seqlens: int | Tensor | None, capacity: int, q: Tensor) -> Tensor:
    """The number of entries before the call, int64 (batch,)."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens.long().clamp(max=capacity)
    length = capacity if cache_seqlens is None else min(cache_seqlens, capacity)
    return torch.full((q.shape[0],), length, dtype=torch.int64, device=q.device)


def _key_ranges(first: Tensor, seqlen_q: int, capacity: int) -> Tensor:
    """(first, end) of the entries that each query may see, int32 (batch, seqlen_q, 2)."""
    first = first[:, None].expand(-1, seqlen_q)
    return torch.stack([first, torch.full_like(first, capacity)], -1).int()


def _pack(q: Tensor, nheads_k: int) -> Tensor:
    """Returns all queries of a row as heads of one query, since they read the same entries."""
    return q.unflatten(2, (nheads_k, -1)).transpose(1, 2).flatten(1, 3)[:, None]


def _unpack(out: Tensor, seqlen_q: int, nheads_k: int) -> Tensor:
    return out.squeeze(1).unflatten(1, (nheads_k, seqlen_q, -1)).transpose(1, 2).flatten(2, 3)


def _unpack_lse(lse: Tensor, seqlen_q: int, nheads_k: int) -> Tensor:
    return lse.squeeze(2).unflatten(1, (nheads_k, seqlen_q, -1)).transpose(2, 3).flatten(1, 2)
