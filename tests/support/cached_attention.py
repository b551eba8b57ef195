"""Attention over a key/value cache, spelt out; and caches in which all else is NaN.

meaning(…)    out, lse and the new entries, in the dtype of q
check(…)      `flash_attn_with_kvcache` against it: its results by the error budget, and every
              entry of the cache afterwards
"""

import math

import torch
from budget import assert_results

from gqa_kernels.accuracy import widen
from gqa_kernels.flash_attn import flash_attn_with_kvcache

BATCH, HEADS, HEADS_K, DIM, ROOM = 3, 6, 2, 16, 24
PAGES = {"paged": 4, "sixes": 6}  # the entries of a page; a number stands for itself
EXACT = torch.float64


def turned(x, cos, sin, positions, interleaved):
    """x `[seqlen, heads, dim]` rotated by the angles of its positions."""
    half = cos.shape[1]
    cos, sin = (table[positions].to(x.dtype)[:, None] for table in (cos, sin))
    out = x.clone()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def meaning(
    stored, q, rows, k=None, v=None, rotary=None, seqlens=None, leftpad=None, causal=False,
    window=(-1, -1), interleaved=True, scale=None, softcap=0.0, slopes=None,
):  # fmt: skip
    """(outs, lses, appended rows) of queries `q[b]` and sequences `rows[b] = (keys, values)`.

    A rotated key is rounded to `stored`, the dtype of the cache; all else is in that of q.
    """
    dtype = q[0].dtype
    outs, lses, appended = [], [], []
    window = tuple(min(side, 10**6) for side in window)  # as far as any entry is
    for b, (keys, values) in enumerate(rows):
        before = len(keys) if seqlens is None else int(seqlens[b])
        keys, values, query = keys[:before].to(dtype), values[:before].to(dtype), q[b]
        if k is not None:
            new = k[b].to(dtype)
            if rotary is not None:
                places = torch.arange(len(new)) + before
                new = turned(new, *rotary, places, interleaved).to(stored).to(dtype)
                local = causal or window != (-1, -1)
                at = torch.arange(len(query)) * local + before
                query = turned(query, *rotary, at, interleaved).to(stored).to(dtype)
            appended.append((new, v[b]))
            keys, values = torch.cat([keys, new]), torch.cat([values, v[b].to(dtype)])
        out, lse = attention(
            query, keys, values, 0 if leftpad is None else leftpad[b], causal, window, scale,
            softcap, None if slopes is None else slopes.expand(len(rows), -1)[b].to(dtype),
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return outs, lses, appended


def attention(query, keys, values, first, causal, window, scale, softcap, slopes):
    """(out `[n, heads, dim]`, lse `[heads, n]`) of one sequence."""
    group = query.shape[1] // keys.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    j, p = torch.arange(len(keys)), torch.arange(len(query))[:, None] + len(keys) - len(query)
    seen = (j >= first).expand(len(query), -1)
    if causal:
        seen = seen & (j <= p)
    if window[0] >= 0:
        seen = seen & (j >= p - window[0])
    if window[1] >= 0:
        seen = seen & (j <= p + window[1])
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    scores = query.transpose(0, 1) @ keys.mT * scale  # [heads, n, number of keys]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (p - j).abs()
    blind = ~seen.any(-1)
    weights = scores.masked_fill(~seen & ~blind[:, None], -math.inf).softmax(-1)
    out = (weights @ values).transpose(0, 1).masked_fill(blind[:, None, None], 0.0)
    return out, scores.masked_fill(~seen, -math.inf).logsumexp(-1)


def table_of(num_positions, half, device):
    angle = torch.arange(num_positions)[:, None] * 0.7 ** torch.arange(half)
    return angle.cos().to(device), angle.sin().to(device)


def laid_out(kind, rows, lengths, device):
    """(k_cache, v_cache, arguments, where) that hold `rows`, with NaN everywhere else."""
    (room, *features), dtype, batch = rows[0][0].shape, rows[0][0].dtype, len(rows)
    size = PAGES.get(kind, kind)
    if isinstance(size, int):
        pages_each = -(-room // size)
        order = torch.randperm(batch * pages_each + 2, generator=torch.Generator().manual_seed(1))
        where = order[:-2].view(batch, -1)
        shape, name = (batch * pages_each + 2, size), "block_table"
    elif kind == "indexed":
        where = torch.tensor([3, 0, 4])[:batch]
        shape, name = (5, room), "cache_batch_idx"
    else:
        where, shape, name = torch.arange(batch), (batch, room), None
    arguments = {} if name is None else {name: where.int().to(device)}
    caches = [torch.full((*shape, *features), math.nan, dtype=dtype) for _ in range(2)]
    for b, row in enumerate(rows):
        for cache, x in zip(caches, row, strict=True):
            for t in range(int(lengths[b])):
                cache[place(kind, where, b, t)] = x[t]
    return *(cache.to(device) for cache in caches), arguments, where


def place(kind, where, b, t):
    if where.dim() == 1:
        return where[b], t
    size = PAGES.get(kind, kind)
    return where[b, t // size], t % size


def check(kind, draw, device, dtype=torch.float32, *, seqlen_q=1, seqlen_new=0, lengths=(0, 4, 17),
          rotary_dim=0, dim=DIM, heads=(HEADS, HEADS_K), room=ROOM, **options):  # fmt: skip
    batch, (heads_q, heads_k) = len(lengths), heads
    rows = [tuple(draw(room, heads_k, dim, dtype=dtype).cpu() for _ in "kv") for _ in lengths]
    k_cache, v_cache, arguments, where = laid_out(kind, rows, lengths, device)
    q = draw(batch, seqlen_q, heads_q, dim, dtype=dtype)
    given = {"q": q.cpu(), "rows": rows, "seqlens": lengths}
    names = {"causal": "causal", "window_size": "window", "rotary_interleaved": "interleaved",
             "cache_leftpad": "leftpad", "softmax_scale": "scale", "softcap": "softcap",
             "alibi_slopes": "slopes"}  # fmt: skip
    given |= {names[name]: value for name, value in options.items() if name in names}
    if seqlen_new:
        new = [draw(batch, seqlen_new, heads_k, dim, dtype=dtype) for _ in range(2)]
        arguments |= {"k": new[0], "v": new[1]}
        given |= {"k": new[0].cpu(), "v": new[1].cpu()}
    if rotary_dim:
        rotary = table_of(room + 8, rotary_dim // 2, device)
        arguments |= {"rotary_cos": rotary[0].to(dtype), "rotary_sin": rotary[1].to(dtype)}
        given["rotary"] = tuple(x.to(dtype).cpu() for x in rotary)
    for name, value in options.items():
        if name == "cache_leftpad":
            value = torch.tensor(value, dtype=torch.int32, device=device)
        arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    before = k_cache.clone(), v_cache.clone()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, return_softmax_lse=True,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device), **arguments,
    )  # fmt: skip

    def results(given):
        outs, lses, _ = meaning(dtype, **given)
        lse = torch.stack(lses)
        return {
            "out": torch.stack(outs),
            "lse": lse.to(torch.promote_types(lse.dtype, torch.float32)),
        }

    actual = {"out": out.cpu(), "lse": lse.cpu()}
    assert_results(actual, results, given)
    exact = meaning(dtype, **widen(given))
    written = set()
    for b in range(batch if seqlen_new else 0):
        for t in range(seqlen_new):
            at = place(kind, where, b, int(lengths[b]) + t)
            written.add(tuple(map(int, at)))
            k_new, v_new = exact[2][b]
            torch.testing.assert_close(
                k_cache[at].cpu().to(EXACT), k_new[t], rtol=torch.finfo(dtype).eps, atol=1e-6
            )
            assert v_cache[at].cpu().equal(v_new[t])
    for old, cache in zip(before, (k_cache, v_cache), strict=True):
        for at in written:
            old[at] = cache[at]
        assert old.nan_to_num(7.0).equal(cache.nan_to_num(7.0))
    return out, lse
