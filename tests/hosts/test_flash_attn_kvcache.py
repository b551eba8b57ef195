"""flash-attn's attention with a key/value cache, against its meaning spelt out in float64."""

import inspect
import math

import pytest
import torch
from cached_attention import BATCH, DIM, HEADS, HEADS_K, ROOM, check, laid_out, place, table_of
from combinations import long
from torch.utils.flop_counter import FlopCounterMode

from gqa_kernels.flash_attn import flash_attn_with_kvcache

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


@pytest.mark.parametrize("interleaved", (False, True))
def test_rotates_a_part_of_a_head(interleaved, draw, device):
    options = {"causal": True, "rotary_interleaved": interleaved}
    check("paged", draw, device, seqlen_q=3, seqlen_new=3, rotary_dim=8, **options)
    check("contiguous", draw, device, seqlen_q=1, seqlen_new=2, rotary_dim=10, **options)


@pytest.mark.parametrize(
    ("kind", "dim", "options"),
    (
        ("contiguous", 59, {"seqlen_q": 3, "rotary_dim": 48, "rotary_interleaved": False}),
        ("indexed", 20, {"seqlen_q": 1, "rotary_dim": 16, "window_size": (5, 0)}),
        ("paged", 6, {"seqlen_q": 2, "rotary_dim": 6, "causal": True}),
        ("sixes", 1, {"seqlen_q": 18, "causal": True, "cache_leftpad": [0, 1, 9]}),
    ),
    ids=("59", "20", "6", "1"),
)
def test_head_dims_that_are_no_multiple_of_8(kind, dim, options, draw, device):
    check(kind, draw, device, torch.bfloat16, seqlen_new=3, dim=dim, **options)


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


@pytest.mark.parametrize(
    ("kind", "options"),
    (
        ("contiguous", {"causal": True, "rotary_dim": 8, "seqlen_new": 17}),
        ("indexed", {"window_size": (4, 2), "softcap": 1.5, "rotary_interleaved": False}),
        ("paged", {"alibi_slopes": torch.linspace(0.1, 0.6, HEADS)}),
    ),
    ids=("causal", "window", "slopes"),
)
def test_left_padding_of_many_queries(kind, options, draw, device):
    """More than `decode_attention` takes; of no entry, of some, and of more than there are."""
    options = {"lengths": (0, 4, 7), "cache_leftpad": [0, 3, 30]} | options
    check(kind, draw, device, torch.bfloat16, seqlen_q=18, **options)


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


def test_pages_of_no_power_of_two(draw, device):
    check("sixes", draw, device, seqlen_q=2, seqlen_new=2, causal=True)
    check("sixes", draw, device, torch.bfloat16, seqlen_q=18, seqlen_new=3, window_size=(5, -1))


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


@pytest.mark.parametrize("dim", (16, 20))
def test_many_queries_compiled(dim, draw, device):
    q, k, v = draw(2, 18, 6, dim), draw(2, 18, 2, dim), draw(2, 18, 2, dim)
    seqlens = torch.tensor([2, 6], dtype=torch.int32, device=device)
    cache, results = draw(2, 24, 2, dim), []
    compiled = torch.compile(flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
    for call in (flash_attn_with_kvcache, compiled):
        caches = cache.clone(), cache.flip(0)
        with torch.no_grad():
            options = {"cache_seqlens": seqlens, "causal": True, "return_softmax_lse": True}
            if dim == 20:
                options |= {"cache_leftpad": seqlens - 1, "rotary_interleaved": False}
                cos, sin = table_of(24, 8, device)
                options |= {"rotary_cos": cos, "rotary_sin": sin}
            results.append((*call(q, *caches, k, v, **options), *caches))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.covering(1)
@KINDS
@pytest.mark.parametrize("dim", (DIM, 7))
def test_what_finds_no_room_is_not_written(kind, dim, draw, device):
    rows = [(torch.ones(ROOM, HEADS_K, dim),) * 2] * BATCH
    k_cache, v_cache, arguments, where = laid_out(kind, rows, [ROOM] * BATCH, device)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    new = draw(BATCH, 2, HEADS_K, dim)
    seqlens = torch.tensor([ROOM - 1, ROOM, ROOM + 7], dtype=torch.int32, device=device)
    q = draw(BATCH, 1, HEADS, dim)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=seqlens, **arguments)
    at = place(kind, where, 0, ROOM - 1)
    assert v_cache[at].equal(new[0, 0])
    for before, cache in ((k_before, k_cache), (v_before, v_cache)):
        before[at] = cache[at]
        assert before.nan_to_num(7.0).equal(cache.nan_to_num(7.0))
    assert out.isfinite().all()


@pytest.mark.parametrize("dim", (16, 7))
def test_a_row_that_there_is_not_is_empty(dim, draw, device):
    q, k, v = draw(3, 1, 4, dim), draw(2, 8, 2, dim), draw(2, 8, 2, dim)
    index = torch.tensor([1, 2, -1], dtype=torch.int32, device=device)
    before = k.clone()
    new = draw(3, 1, 2, dim)
    out, lse = flash_attn_with_kvcache(
        q, k, v, new, new, cache_seqlens=3, cache_batch_idx=index, return_softmax_lse=True
    )
    assert (out[1:] == 0).all() and (lse[1:] == -math.inf).all() and (out[0] != 0).any()
    assert k[1, 3].equal(new[0, 0])
    before[1, 3] = k[1, 3]
    assert before.equal(k)
    flash_attn_with_kvcache(
        q[1:], k, v, new[1:], new[1:], cache_seqlens=3, cache_batch_idx=index[1:]
    )
    assert before.equal(k)  # no token has an entry


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
    "wide heads": (
        {name: (2, 8, 4 if name == "q" else 2, 257) for name in ("q", "k_cache", "v_cache")},
        NotImplementedError, "q: expected a head_dim of 1 up to 256; got 257",
    ),
    "features apart": (
        {"v_cache": torch.zeros(2, 8, 16, 2).mT}, ValueError,
        "v_cache: expected contiguous features; got strides",
    ),
    "empty pages": (
        {"k_cache": (2, 0, 2, 16), "v_cache": (2, 0, 2, 16),
         "block_table": torch.zeros(2, 1).int()}, ValueError,
        "k_cache: expected a page_size of at least 1; got 0",
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


@pytest.mark.parametrize("dim", (16, 7))
def test_entries_that_share_memory_are_not_written_to(dim, draw, device):
    cache = draw(1, 8, 2, dim)
    new = draw(2, 1, 2, dim)
    shared = cache.expand(2, -1, -1, -1)
    before = cache.clone()
    message = r"^k_cache: expected entries that share no memory; got strides \(0, "
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(draw(2, 1, 4, dim), shared, shared, new, new, cache_seqlens=3)
    assert cache.equal(before)
    q, index = draw(2, 1, 4, dim), torch.tensor([1, -1], dtype=torch.int32, device=device)
    out = flash_attn_with_kvcache(q, shared, shared, cache_batch_idx=index)
    plain = [shared.clone() for _ in "kv"]
    assert torch.equal(out, flash_attn_with_kvcache(q, *plain, cache_batch_idx=index))
    assert (out[1] == 0).all() and (out[0] != 0).any()


def laid_apart(layout, draw):
    """(k_cache, v_cache) `[4, 12, 2, 16]` in some layout of memory."""
    if layout == "in one tensor":
        return draw(4, 2, 12, 2, 16).unbind(1)
    if layout == "heads first":
        return draw(4, 2, 12, 16).transpose(1, 2), draw(4, 2, 12, 16).transpose(1, 2)
    if layout == "sequences in the middle":
        return draw(12, 4, 2, 16).transpose(0, 1), draw(12, 4, 2, 16).transpose(0, 1)
    if layout == "gaps":
        return draw(4, 14, 2, 16)[:, :12], draw(4, 14, 2, 16)[:, :12]
    return draw(4, 13, 2, 16)[:, :12], draw(4, 12, 2, 16)  # "unlike": no pages for both


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "layout", ("in one tensor", "heads first", "sequences in the middle", "gaps", "unlike")
)
@pytest.mark.parametrize("pages", (False, True))
def test_layouts_of_caches(layout, pages, draw, device):
    """Rows of 12 entries are no pages of a power of two."""
    caches = laid_apart(layout, draw)
    plain = [cache.contiguous() for cache in caches]
    rows = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32, device=device)
    options = {"block_table": rows} if pages else {"cache_batch_idx": rows[:, 0]}
    new = draw(2, 2, 2, 16)
    lengths = torch.tensor([7, 9], dtype=torch.int32, device=device)
    options |= {"cache_seqlens": lengths, "causal": True}
    for q, leftpad in ((draw(2, 1, 4, 16), None), (draw(2, 18, 4, 16), lengths - 5)):
        results = [
            flash_attn_with_kvcache(q, *some, new, new, cache_leftpad=leftpad, **options)
            for some in (caches, plain)
        ]
        assert torch.equal(*results)
    assert all(cache.equal(one) for cache, one in zip(caches, plain, strict=True))
    assert plain[1][3, 7].equal(new[0, 0])


def test_every_argument_is_told_of():
    for name in inspect.signature(flash_attn_with_kvcache).parameters:
        assert name in flash_attn_with_kvcache.__doc__
