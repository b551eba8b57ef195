"""flash-attn's attention with a key/value cache, against its meaning spelt out in float64."""

import inspect
import math

import pytest
import torch
from budget import assert_results
from combinations import long
from torch.utils.flop_counter import FlopCounterMode

from gqa_kernels.accuracy import widen
from gqa_kernels.flash_attn import flash_attn_with_kvcache

BATCH, HEADS, HEADS_K, DIM, ROOM = 3, 6, 2, 16, 24
NAN = float("nan")
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
    """(out, lse, appended rows) of sequences `rows[b] = (keys, values)`, one query at a time.

    A rotated key is rounded to `stored`, the dtype of the cache; all else is in that of q.
    """
    dtype = q.dtype
    outs, lses, appended = [], [], []
    window = tuple(min(side, 10**6) for side in window)  # as far as any entry is
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, (keys, values) in enumerate(rows):
        before = len(keys) if seqlens is None else int(seqlens[b])
        keys, values, query = keys[:before].to(dtype), values[:before].to(dtype), q[b].to(dtype)
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
        group = q.shape[2] // keys.shape[1]
        out, lse = torch.zeros_like(query), torch.full(query.shape[1::-1], -math.inf, dtype=dtype)
        for i in range(len(query)):
            p = len(keys) - len(query) + i
            j = torch.arange(len(keys))
            seen = j >= (0 if leftpad is None else leftpad[b])
            if causal:
                seen &= j <= p
            if window[0] >= 0:
                seen &= j >= p - window[0]
            if window[1] >= 0:
                seen &= j <= p + window[1]
            for h in range(q.shape[2]):
                if seen.any():
                    scores = keys[seen, h // group] @ query[i, h] * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if slopes is not None:
                        slope = slopes.expand(BATCH, -1)[b, h]
                        scores = scores - slope.to(dtype) * (p - j[seen]).abs()
                    lse[h, i] = scores.logsumexp(0)
                    out[i, h] = scores.softmax(0) @ values[seen, h // group]
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), appended


def table_of(num_positions, half, device):
    angle = torch.arange(num_positions)[:, None] * 0.7 ** torch.arange(half)
    return angle.cos().to(device), angle.sin().to(device)


def laid_out(kind, rows, lengths, device):
    """(k_cache, v_cache, arguments) that hold `rows`, with NaN wherever nobody is to look."""
    dtype = rows[0][0].dtype
    shape = {"contiguous": (BATCH, ROOM), "indexed": (5, ROOM), "paged": (20, 4)}[kind]
    caches = [torch.full((*shape, HEADS_K, DIM), NAN, dtype=dtype) for _ in range(2)]
    if kind == "paged":
        order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        where = order[: BATCH * ROOM // 4].view(BATCH, -1)
        arguments = {"block_table": where.int().to(device)}
    else:
        where = {"contiguous": torch.arange(BATCH), "indexed": torch.tensor([3, 0, 4])}[kind]
        arguments = {} if kind == "contiguous" else {"cache_batch_idx": where.int().to(device)}
    for b, row in enumerate(rows):
        for cache, x in zip(caches, row, strict=True):
            for t in range(int(lengths[b])):
                cache[place(kind, where, b, t)] = x[t]
    return *(cache.to(device) for cache in caches), arguments, where


def place(kind, where, b, t):
    return (where[b, t // 4], t % 4) if kind == "paged" else (where[b], t)


def check(kind, draw, device, dtype=torch.float32, *, seqlen_q=1, seqlen_new=0, lengths=(0, 4, 17),
          rotary_dim=0, **options):  # fmt: skip
    """The result, by the budget of the same maths in low precision, and every entry of the cache
    afterwards."""
    rows = [(draw(ROOM, HEADS_K, DIM, dtype=dtype), draw(ROOM, HEADS_K, DIM, dtype=dtype))
            for _ in range(BATCH)]  # fmt: skip
    rows = [(k.cpu(), v.cpu()) for k, v in rows]
    k_cache, v_cache, arguments, where = laid_out(kind, rows, lengths, device)
    q = draw(BATCH, seqlen_q, HEADS, DIM, dtype=dtype)
    given = {"q": q.cpu(), "rows": rows, "seqlens": lengths}
    names = {"causal": "causal", "window_size": "window", "rotary_interleaved": "interleaved",
             "cache_leftpad": "leftpad", "softmax_scale": "scale", "softcap": "softcap",
             "alibi_slopes": "slopes"}  # fmt: skip
    given |= {names[name]: value for name, value in options.items()}
    if seqlen_new:
        new = [draw(BATCH, seqlen_new, HEADS_K, DIM, dtype=dtype) for _ in range(2)]
        arguments |= {"k": new[0], "v": new[1]}
        given |= {"k": new[0].cpu(), "v": new[1].cpu()}
    if rotary_dim:
        rotary = table_of(ROOM + 8, rotary_dim // 2, device)
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
        out, lse, _ = meaning(dtype, **given)
        return {"out": out, "lse": lse.to(torch.promote_types(lse.dtype, torch.float32))}

    actual = {"out": out.cpu(), "lse": lse.cpu()}
    assert_results(actual, results, given)
    exact = meaning(dtype, **widen(given))
    written = set()
    for b in range(BATCH if seqlen_new else 0):
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


KINDS = pytest.mark.parametrize("kind", ("contiguous", "indexed", "paged"))


@pytest.mark.covering(2)
@KINDS
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), ((1, 0), (1, 1), (5, 0), (5, 5), (2, 3)))
def test_attends_and_appends(kind, causal, seqlen_q, seqlen_new, draw, device):
    sizes = {"seqlen_q": seqlen_q, "seqlen_new": seqlen_new}
    check(kind, draw, device, causal=causal, **sizes)


@pytest.mark.covering(2)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    ("kind", "seqlen_q", "seqlen_new"),
    (("contiguous", 4, 4), ("indexed", 1, 1), ("paged", 4, 4), ("paged", 2, 3)),
)
def test_rotates(kind, causal, interleaved, seqlen_q, seqlen_new, draw, device):
    sizes = {"seqlen_q": seqlen_q, "seqlen_new": seqlen_new, "rotary_dim": DIM}
    check(kind, draw, device, causal=causal, rotary_interleaved=interleaved, **sizes)


def test_rotates_a_part_of_a_head(draw, device):
    check("paged", draw, device, seqlen_q=3, seqlen_new=3, rotary_dim=8, causal=True)


@pytest.mark.parametrize(
    ("kind", "window"),
    (
        ("contiguous", (3, -1)),
        ("indexed", (2, 0)),
        ("paged", (0, 1)),
        ("contiguous", (-1, 2)),
        ("indexed", (2**63 - 1, 2**63 - 1)),
        ("paged", (3, -1)),
    ),
)
def test_windows(kind, window, draw, device):
    check(kind, draw, device, seqlen_q=4, seqlen_new=4, causal=True, window_size=window)
    check(kind, draw, device, window_size=window)


@pytest.mark.parametrize("window", ((3, -1), (0, 1), (2**63 - 1, 2**63 - 1)))
def test_windows_of_queries_that_are_not_causal(window, draw, device):
    sizes = {"seqlen_q": 3, "seqlen_new": 3, "rotary_dim": DIM, "cache_leftpad": [0, 2, 5]}
    check("paged", draw, device, window_size=window, **sizes)


@pytest.mark.covering(1)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("per_row", (False, True))
def test_caps_and_biases(causal, per_row, draw, device):
    slopes = draw(*(BATCH, HEADS) if per_row else (HEADS,)).abs().cpu()
    for options in ({"softcap": 1.5}, {"alibi_slopes": slopes}):
        check("indexed", draw, device, seqlen_q=4, seqlen_new=4, causal=causal, **options)
    both = {"softcap": 1.5, "alibi_slopes": slopes, "window_size": (6, 1)}
    check("paged", draw, device, torch.bfloat16, seqlen_q=3, causal=causal, **both)


@pytest.mark.covering(1)
@KINDS
@pytest.mark.parametrize("causal", (False, True))
def test_left_padding(kind, causal, draw, device):
    sizes = {"seqlen_q": 3, "seqlen_new": 3, "rotary_dim": DIM}
    check(kind, draw, device, causal=causal, cache_leftpad=[0, 5, 9], **sizes)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_sixteen_bits(dtype, draw, device):
    check("paged", draw, device, dtype, seqlen_q=2, seqlen_new=2, causal=True, softmax_scale=0.3)


def test_lengths_as_a_number_or_none(draw, device):
    q, k, v = draw(2, 1, 4, 16), draw(2, 9, 2, 16), draw(2, 9, 2, 16)
    full = flash_attn_with_kvcache(q, k, v)
    assert torch.equal(full, flash_attn_with_kvcache(q, k, v, cache_seqlens=9))
    seqlens = torch.tensor([4, 4], dtype=torch.int32, device=device)
    four = flash_attn_with_kvcache(q, k, v, cache_seqlens=4)
    assert torch.equal(four, flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens))
    assert not torch.equal(four, full)
    assert torch.equal(four, flash_attn_with_kvcache(q, k, v, cache_seqlens=4, num_splits=7))


def test_many_queries_that_are_not_causal(draw, device):
    check("paged", draw, device, seqlen_q=20)


@pytest.mark.parametrize(
    ("kind", "options"),
    (
        long("contiguous", {"causal": True}),
        ("indexed", {"causal": True, "softcap": 1.5, "window_size": (6, -1)}),
        long("paged", {"window_size": (2, 3)}),
        ("paged", {"alibi_slopes": torch.linspace(0.1, 0.6, HEADS), "softmax_scale": 0.4}),
    ),
    ids=("causal", "cap", "window", "slopes"),
)
def test_many_queries_that_see_different_entries(kind, options, draw, device):
    """More than `decode_attention` takes, also before the first entry."""
    sizes = {"seqlen_q": 18, "seqlen_new": 17, "lengths": (0, 1, 7), "rotary_dim": DIM}
    check(kind, draw, device, torch.bfloat16, **sizes, **options)


def test_many_queries_compiled(draw, device):
    q, k, v = draw(2, 18, 6, 16), draw(2, 18, 2, 16), draw(2, 18, 2, 16)
    seqlens = torch.tensor([2, 6], dtype=torch.int32, device=device)
    cache, results = draw(2, 24, 2, 16), []
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    for call in (flash_attn_with_kvcache, compiled):
        caches = cache.clone(), cache.flip(0)
        with torch.no_grad():
            options = {"cache_seqlens": seqlens, "causal": True, "return_softmax_lse": True}
            results.append(call(q, *caches, k, v, **options))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@KINDS
def test_what_finds_no_room_is_not_written(kind, draw, device):
    rows = [(torch.ones(ROOM, HEADS_K, DIM),) * 2] * BATCH
    k_cache, v_cache, arguments, where = laid_out(kind, rows, [ROOM] * BATCH, device)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    new = draw(BATCH, 2, HEADS_K, DIM)
    seqlens = torch.tensor([ROOM - 1, ROOM, ROOM + 7], dtype=torch.int32, device=device)
    q = draw(BATCH, 1, HEADS, DIM)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens, **arguments)
    at = place(kind, where, 0, ROOM - 1)
    assert v_cache[at].equal(new[0, 0])
    for before, cache in ((k_before, k_cache), (v_before, v_cache)):
        before[at] = cache[at]
        assert before.nan_to_num(7.0).equal(cache.nan_to_num(7.0))
    assert out.isfinite().all()


def test_a_row_that_there_is_not_is_empty(draw, device):
    q, k, v = draw(3, 1, 4, 16), draw(2, 8, 2, 16), draw(2, 8, 2, 16)
    index = torch.tensor([1, 2, -1], dtype=torch.int32, device=device)
    before = k.clone()
    new = draw(3, 1, 2, 16)
    out, lse = flash_attn_with_kvcache(
        q, k, v, new, new, cache_seqlens=3, cache_batch_idx=index, return_softmax_lse=True
    )
    assert (out[1:] == 0).all() and (lse[1:] == -math.inf).all() and (out[0] != 0).any()
    before[1, 3] = k[1, 3]
    assert before.equal(k)


def test_strided_tensors(draw, device):
    """Views of a fused projection; caches of one layer among many, features apart in the middle."""
    packed = draw(2, 3, 6 + 2 + 2, 16)
    q, k, v = packed.split((6, 2, 2), dim=2)
    caches = draw(2, 12, 2, 2, 16)[:, :, 1], draw(4, 2, 12, 2, 16)[3]
    plain = [cache.clone() for cache in caches]
    options = {"cache_seqlens": 5, "causal": True}
    out = flash_attn_with_kvcache(q, *caches, k, v, **options)
    wanted = flash_attn_with_kvcache(q.clone(), *plain, k.clone(), v.clone(), **options)
    assert torch.equal(out, wanted)
    assert all(cache.equal(one) for cache, one in zip(caches, plain, strict=True))


def test_compiled_and_eager_have_the_same_bits(draw, device):
    q, k, v = draw(2, 3, 6, 16), draw(2, 3, 2, 16), draw(2, 3, 2, 16)
    cos, sin = table_of(20, 8, device)
    seqlens = torch.tensor([2, 6], dtype=torch.int32, device=device)
    table = torch.tensor([[3, 0, 1], [5, 2, 4]], dtype=torch.int32, device=device)
    results = []
    cache = draw(6, 4, 2, 16)
    for call in (
        flash_attn_with_kvcache,
        torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True),
    ):
        k_cache, v_cache = cache.clone(), cache.flip(0)
        with torch.no_grad():
            out, lse = call(
                q, k_cache, v_cache, k, v, cos, sin, seqlens, block_table=table, causal=True,
                window_size=(4, 0), return_softmax_lse=True,
            )  # fmt: skip
        results.append((out, lse, k_cache, v_cache))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not results[0][2].equal(cache)


BAD = {
    "softcap": ({"softcap": -1.0}, ValueError, r"softcap: expected .* got -1\.0"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \[4\]"),
    "many queries and leftpad": (
        {"q": (2, 17, 4, 16), "causal": True, "cache_leftpad": torch.zeros(2).int()},
        NotImplementedError, "cache_leftpad: expected None with more than 16 queries",
    ),
    "many queries, slopes": (
        {"q": (2, 17, 4, 16), "alibi_slopes": torch.ones(3)}, ValueError,
        r"alibi_slopes: expected shape \[4\]",
    ),
    "sides": ({"window_size": 3}, TypeError, "window_size: expected"),
    "cache": ({"k_cache": (3, 8, 2, 16)}, ValueError, r"k_cache: expected shape \[2, "),
    "heads": ({"q": (2, 1, 3, 16)}, ValueError, "q: expected a number of heads"),
    "v_cache": ({"v_cache": (2, 7, 2, 16)}, ValueError, "v_cache: expected shape"),
    "v_cache, indexed": (
        {"v_cache": (2, 4, 2, 16), "cache_batch_idx": torch.zeros(2).int()}, ValueError,
        r"v_cache: expected shape \[2, 8, 2, 16\]",
    ),
    "heads, not causal": ({"q": (2, 3, 3, 16)}, ValueError, "q: expected a number of heads"),
    "no query": ({"q": (2, 0, 4, 16)}, ValueError, "q: expected at least one query"),
    "no v": ({"v": None}, ValueError, "v: expected a tensor if k is one"),
    "no lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens: expected .* got None"),
    "lengths": ({"cache_seqlens": 3.0}, TypeError, "cache_seqlens: expected a whole number"),
    "k": ({"k": (2, 1, 4, 16)}, ValueError, r"k: expected shape \[2, seqlen_new, 2, 16\]"),
    "k's dtype": ({"k": torch.zeros(2, 1, 2, 16).half()}, TypeError, "k: expected q's dtype"),
    "only cos": ({"rotary_cos": (9, 8)}, ValueError, "rotary_sin: expected a tensor with rotary"),
    "rotary without k": (
        {"k": None, "v": None, "rotary_cos": (9, 8), "rotary_sin": (9, 8)}, ValueError,
        "k: expected a tensor with rotary_cos; got None",
    ),
    "wide rotary": (
        {"rotary_cos": (9, 9), "rotary_sin": (9, 9)}, ValueError,
        "rotary_cos: expected a rotary_dim of at most headdim, 16; got 18",
    ),
    "halves": (
        {"rotary_cos": (9, 4), "rotary_sin": (9, 4), "rotary_interleaved": False},
        NotImplementedError, "rotary_cos: expected a rotary_dim of headdim, 16, without",
    ),
    "index and pages": (
        {"cache_batch_idx": torch.zeros(2).int(), "block_table": torch.zeros(2, 1).int()},
        NotImplementedError, "cache_batch_idx: expected None with a block_table",
    ),
    "index": (
        {"cache_batch_idx": torch.zeros(2)}, TypeError, "cache_batch_idx: expected dtype",
    ),
    "leftpad": ({"cache_leftpad": torch.zeros(3).int()}, ValueError, "cache_leftpad: expected"),
    "table": ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table: expected dtype"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "softmax_scale: expected a positive"),
    "causal": ({"causal": 2}, TypeError, "causal: expected a bool"),
    "num_splits": ({"num_splits": 1.5}, TypeError, "num_splits: expected a whole number"),
    "gradient": (
        {"q": torch.zeros(2, 1, 4, 16, requires_grad=True)}, NotImplementedError, "q: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(name, draw, device):
    changes, error, message = BAD[name]
    shapes = {"q": (2, 1, 4, 16), "k_cache": (2, 8, 2, 16), "v_cache": (2, 8, 2, 16),
              "k": (2, 1, 2, 16), "v": (2, 1, 2, 16)}  # fmt: skip
    arguments = {name: draw(*shape) for name, shape in shapes.items()} | {"cache_seqlens": 3}
    for key, value in changes.items():
        is_shape = isinstance(value, tuple) and key != "window_size"
        arguments[key] = draw(*value) if is_shape else value
        if isinstance(value, torch.Tensor):
            arguments[key] = value.to(device).detach().requires_grad_(value.requires_grad)
    before = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    with pytest.raises(error, match=f"^{message}"):
        flash_attn_with_kvcache(**arguments)
    assert before[0].equal(arguments["k_cache"]) and before[1].equal(arguments["v_cache"])


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_arguments_under_a_mode(name, draw, device):
    with FlopCounterMode(display=False):
        test_bad_arguments_are_named_and_nothing_is_written(name, draw, device)


def test_lengths_beyond_the_cache_count_as_its_end(draw, device):
    q, k, v = draw(2, 1, 4, 16), draw(2, 8, 2, 16), draw(2, 8, 2, 16)
    for window in ((-1, -1), (2, 0)):
        full = flash_attn_with_kvcache(q, k, v, cache_seqlens=8, window_size=window)
        for length in (100, 2**62):
            beyond = torch.tensor([length, 8], device=device)
            for seqlens in (length, beyond):
                out = flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens, window_size=window)
                assert torch.equal(out, full)


def test_entries_that_share_memory_are_not_written_to(draw, device):
    cache = draw(1, 8, 2, 16)
    new = draw(2, 1, 2, 16)
    shared = cache.expand(2, -1, -1, -1)
    before = cache.clone()
    message = r"^k_cache: expected entries that share no memory; got strides \(0, "
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(draw(2, 1, 4, 16), shared, shared, new, new, cache_seqlens=3)
    assert cache.equal(before)


def test_an_index_into_caches_that_are_no_pages(draw, device):
    wide, other = draw(2, 9, 2, 16)[:, :8], draw(2, 8, 2, 16)
    index = torch.tensor([1, 0], dtype=torch.int32, device=device)
    message = r"^k_cache: expected sequences one after another in memory"
    with pytest.raises(NotImplementedError, match=message):
        flash_attn_with_kvcache(draw(2, 1, 4, 16), wide, other, cache_batch_idx=index)


def test_every_argument_is_told_of():
    for name in inspect.signature(flash_attn_with_kvcache).parameters:
        assert name in flash_attn_with_kvcache.__doc__
