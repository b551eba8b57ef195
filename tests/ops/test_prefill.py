"""What is peculiar to prefill_attention."""

import math

import pytest
import torch
from new_tokens import (
    NOWHERE,
    assert_within_budget,
    every_option,
    in_pages,
    ints,
    maker,
    one_by_one,
)

from gqa_kernels import decode_attention, flash_attention_varlen, prefill_attention, reference
from gqa_kernels.spec.cache import _spoil, quantized


@pytest.fixture
def make(draw, device):
    return maker(draw, device)


# --- The contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_rows_of_several_lengths(dtype, make):
    """Blocks of one row and of many, sequences without new tokens or keys, rows of no sequence."""
    inputs = make((1, 0, 5, 70, 0, 3), (90, 7, 0, 33, 0, 15), rest=3)
    inputs |= {name: inputs[name].to(dtype) for name in ("cu_seqlens_q", "seq_lens")}
    assert_within_budget(inputs)
    out, lse = prefill_attention(**inputs, return_lse=True)
    assert torch.equal(out, prefill_attention(**inputs))
    assert (out[-3:] == 0).all() and (lse[:, -3:] == -torch.inf).all()
    assert lse.shape == (4, len(out)) and lse.dtype == torch.float32


@pytest.mark.parametrize("group_size", (1, 3, 7, 40))
def test_groups(group_size, make):
    """Also more query heads to a key/value head than a tile has rows."""
    assert_within_budget(make((9, 1, 20), (12, 30, 0), heads=(2 * group_size, 2)))


def test_many_sequences(make):
    """Programs find their sequence among many, most of them shorter than a block."""
    new = [(5 * b) % 7 for b in range(30)]
    assert_within_budget(make(new, [(11 * b) % 20 for b in range(30)], heads=(3, 1), head_dim=8))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("options", ("none", "window", "all"))
def test_it_is_the_other_forms_of_attention(options, causal, make, draw):
    """The contracts of `flash_attention_varlen` and, up to 16 new tokens, `decode_attention`."""
    given = {"causal": causal, "return_lse": True}
    given |= {"none": {}, "window": {"window": (5, 2)}, "all": every_option(draw, 4, 2)}[options]
    inputs = make((40, 7), (0, 0))
    lengths = inputs["seq_lens"].tolist()
    k, v = (
        torch.cat([x[:n] for x, n in zip(inputs[name], lengths, strict=True)])
        for name in ("k_cache", "v_cache")
    )
    bounds = inputs["cu_seqlens_q"]

    def wide(tensors):
        return {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}

    expected = reference.flash_attention_varlen(
        inputs["q"].double(), k.double(), v.double(), bounds, bounds, **given
    )
    actual = reference.prefill_attention(**wide(inputs), **given)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    expected = flash_attention_varlen(inputs["q"], k, v, bounds, bounds, **given)
    torch.testing.assert_close(prefill_attention(**inputs, **given), expected, rtol=1e-5, atol=1e-5)

    inputs = make((6, 6), (30, 9))
    rows = {"q": inputs["q"].view(2, 6, 4, 16)}
    decoded = {name: x for name, x in inputs.items() if name != "cu_seqlens_q"} | rows
    out, lse = reference.decode_attention(**wide(decoded), **given)
    expected = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    actual = reference.prefill_attention(**wide(inputs), **given)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    out, lse = decode_attention(**decoded, **given)
    expected = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    torch.testing.assert_close(prefill_attention(**inputs, **given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", ((0, None), (7, None), (33, 2), (2**63 - 1, 2**40)))
@pytest.mark.parametrize("causal", (True, False))
def test_windows(window, causal, make, draw):
    inputs = make((37, 2), (20, 50)) | every_option(draw, 4, 2)
    assert_within_budget(inputs | {"window": window, "causal": causal})


def test_fewer_keys_than_new_tokens(make, device):
    """The first new tokens see nothing, or their sink alone."""
    inputs = make((40, 5), (0, 10))
    inputs["seq_lens"] = ints(3, 4, device=device)
    out, lse = prefill_attention(**inputs, return_lse=True)
    assert (out[:37] == 0).all() and (lse[:, :37] == -torch.inf).all()
    assert_within_budget(inputs)
    sinks = torch.linspace(-1, 1, 4, device=device)
    _, lse = prefill_attention(**inputs, sinks=sinks, return_lse=True)
    assert torch.equal(lse[:, :37], sinks[:, None].expand(-1, 37))
    assert_within_budget(inputs | {"sinks": sinks})


@pytest.mark.parametrize("length", (65, 2**31, 2**32 + 3))
def test_bounds_and_lengths_beyond_the_tensors(length, make, device):
    inputs = make((5, 9), (59, 20))
    whole = prefill_attention(**inputs | {"seq_lens": ints(64, 29, device=device)})
    beyond = inputs | {
        "seq_lens": ints(length, 29, device=device, dtype=torch.int64),
        "cu_seqlens_q": ints(0, 5, length, device=device, dtype=torch.int64),
    }
    assert torch.equal(prefill_attention(**beyond), whole)
    assert_within_budget(beyond)


def test_without_lengths_every_sequence_fills_the_cache(make, device):
    inputs = make((3, 6), (61, 58))
    assert torch.equal(
        prefill_attention(**inputs | {"seq_lens": None}), prefill_attention(**inputs)
    )
    assert_within_budget(inputs | {"seq_lens": None})


# --- Pages and 8 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", (1, 4, 16, 64))
def test_pages_have_the_bits_of_a_contiguous_cache(page_size, make, generator):
    """And NaN in every slot that belongs to no key."""
    inputs = make((1, 45, 0, 8), (63, 15, 5, 0), dtype=torch.bfloat16)
    paged = in_pages(inputs, page_size, generator)
    assert torch.equal(prefill_attention(**paged), prefill_attention(**inputs))
    assert_within_budget(paged)


@pytest.mark.parametrize("page_size", (8, 32))
def test_a_missing_page_hides_its_keys(page_size, make, generator):
    inputs = make((20, 40), (44, 20))
    paged = in_pages(inputs, page_size, generator)
    num_pages = len(paged["k_cache"])
    for row, column, entry in ((0, 0, -1), (1, 1, num_pages), (0, 1, -(2**31))):
        paged["block_table"][row, column] = entry
    assert_within_budget(paged)
    paged["block_table"].fill_(NOWHERE)
    assert (prefill_attention(**paged) == 0).all()


def test_a_strided_table_and_shared_pages(make, generator, device):
    inputs = make((9, 3), (30, 29))
    inputs["k_cache"][1, :16], inputs["v_cache"][1, :16] = (
        inputs[name][0, :16].clone() for name in ("k_cache", "v_cache")
    )
    paged = in_pages(inputs, 16, generator)
    wide = torch.full((2, 10), NOWHERE, dtype=torch.int32, device=device)
    wide[:, 1:9:2] = paged["block_table"]
    wide[1, 1] = wide[0, 1]
    paged["block_table"] = wide[:, 1:9:2]
    assert torch.equal(prefill_attention(**paged), prefill_attention(**inputs))


@pytest.mark.parametrize("per_token", (False, True), ids=("per_head", "per_token"))
@pytest.mark.parametrize("cache_dtype", (torch.int8, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_quantised(dtype, cache_dtype, per_token, make, generator):
    """Extreme values beyond the lengths; small scales, which a weight of float16 must not meet."""
    inputs = make((1, 20), (60, 11), dtype=dtype)
    for side in "kv":
        x = inputs[f"{side}_cache"].nan_to_num() * 2.0**-14
        stored, scale = quantized(x, cache_dtype, per_token=per_token)
        for row, length in zip(stored, inputs["seq_lens"].tolist(), strict=True):
            _spoil(row[length:])
        inputs |= {f"{side}_cache": stored, f"{side}_scale": scale}
    assert_within_budget(inputs)
    paged = in_pages(inputs, 8, generator)
    assert torch.equal(prefill_attention(**paged), prefill_attention(**inputs))


# --- Bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ("none", "window", "all"))
def test_bits_depend_on_the_row_alone(options, make, draw, generator):
    """Not on the other sequences, the capacity, the paging and the other new tokens."""
    inputs = make((21, 1, 4), (30, 63, 0))
    given = {"none": {}, "window": {"window": (9, None)}, "all": every_option(draw, 4, 3)}[options]
    given |= {"alibi_slopes": given["alibi_slopes"][0]} if options == "all" else {}
    together = prefill_attention(**inputs, **given)
    assert torch.equal(one_by_one(inputs | given), together)
    bounds = inputs["cu_seqlens_q"].tolist()
    for b in range(3):
        rows = slice(bounds[b], bounds[b + 1])
        alone = {name: inputs[name][b : b + 1] for name in ("k_cache", "v_cache", "seq_lens")}
        alone |= {
            "q": inputs["q"][rows],
            "cu_seqlens_q": inputs["cu_seqlens_q"][b : b + 2] - bounds[b],
        }
        wider = {x: torch.cat((alone[x], alone[x] * math.nan), 1) for x in ("k_cache", "v_cache")}
        for held in (alone, alone | wider, in_pages(alone | wider, 4, generator)):
            assert torch.equal(prefill_attention(**held, **given), together[rows])


def test_keys_before_the_window_are_not_read(make):
    """They may hold NaN, which a weight of 0 would not hide."""
    inputs = make((8,), (152,))
    clean = prefill_attention(**inputs, window=(60, None))
    for name in ("k_cache", "v_cache"):
        inputs[name][:, :64] = math.nan
    assert torch.equal(clean, prefill_attention(**inputs, window=(60, None)))


def test_keys_after_the_last_of_a_block_are_not_read(make):
    """The first block of a chunk reads the tiles up to that of its last row's key."""
    inputs = make((100,), (0,), heads=(2, 1))
    clean = prefill_attention(**inputs)
    inputs["v_cache"][:, 64:] = math.nan
    assert torch.equal(clean[:16], prefill_attention(**inputs)[:16])


# --- Layouts -------------------------------------------------------------------------------------


def test_caches_of_many_layers_and_strided_arguments(draw, device):
    caches = draw(2, 3, 50, 2, 16)  # [layers, batch, max_seq_len, num_kv_heads, head_dim]
    q = draw(14, 4, 32)[::2, :, ::2]
    bounds = ints(0, 9, 2, 9, 2, 9, 7, 9, device=device)[::2]
    seq_lens = ints(50, 9, 30, 9, 5, 9, device=device)[::2]
    out = prefill_attention(q, caches[1], caches[0], bounds, seq_lens)
    copies = (x.clone(memory_format=torch.contiguous_format) for x in (q, caches[1], caches[0]))
    assert torch.equal(out, prefill_attention(*copies, bounds.clone(), seq_lens.clone()))


@pytest.mark.parametrize("paged", (False, True))
def test_offsets_beyond_32_bits(paged, draw, device):
    """Strides of 31 bits whose multiples need more; only the pages that are touched exist."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 512, dtype=torch.float16, device=device)
    cache = storage.as_strided((3, 4, 1, 32), (apart, 32, 32, 1))
    cache.copy_(draw(3, 4, 1, 32))
    q = draw(5, 2, 32, dtype=torch.float16)
    options = {"block_table": ints([2, 0], device=device)} if paged else {}
    bounds = ints(0, 5, device=device) if paged else ints(0, 2, 4, 5, device=device)
    seq_lens = ints(7, device=device) if paged else ints(2, 3, 4, device=device)
    out = prefill_attention(q, cache, cache, bounds, seq_lens, **options)
    small = cache.clone()
    assert torch.equal(out, prefill_attention(q, small, small, bounds, seq_lens, **options))


@pytest.mark.parametrize("sinks", (None, "finite", "none"))
def test_nothing_to_see(sinks, draw, device):
    """No capacity, no pages, no sequence and no rows."""
    q, cache = draw(5, 4, 16), draw(2, 0, 2, 16)
    if sinks is not None:
        sinks = draw(4) if sinks == "finite" else torch.full((4,), -torch.inf, device=device)
    least = torch.full((4,), -torch.inf, device=device) if sinks is None else sinks
    bounds, seq_lens = ints(0, 2, 5, device=device), ints(3, 4, device=device)
    for num_pages, max_pages in ((0, 0), (0, 2), (2, 0)):
        table = torch.zeros(2, max_pages, dtype=torch.int32, device=device)
        pages = draw(num_pages, 8, 2, 16)
        call = {"k_cache": pages, "v_cache": pages, "block_table": table}
        call = call if max_pages or num_pages else {"k_cache": cache, "v_cache": cache}
        call |= {"cu_seqlens_q": bounds, "seq_lens": seq_lens, "sinks": sinks, "return_lse": True}
        for op in (prefill_attention, reference.prefill_attention):
            out, lse = op(q, **call)
            assert torch.equal(out, torch.zeros_like(q))
            assert torch.equal(lse, least[:, None].expand(4, 5))
    none, empty = ints(0, device=device), ints(device=device)
    full = draw(0, 8, 2, 16)
    for op in (prefill_attention, reference.prefill_attention):
        out, lse = op(q, full, full, none, empty, sinks=sinks, return_lse=True)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, least[:, None].expand(4, 5))
        two = draw(2, 8, 2, 16)
        out = op(q[:0], two, two, ints(0, 0, 0, device=device), seq_lens)
        assert out.shape == (0, 4, 16)


# --- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    (
        ({"q": (1, 5, 4, 16)}, ValueError, r"q: expected shape \[total_q, num_q_heads, head_dim\]"),
        (
            {"q": (5, 3, 16)},
            ValueError,
            "q: expected a number of heads that is a multiple of k's 2",
        ),
        (
            {"q": (5, 4, 12)},
            ValueError,
            r"k_cache: expected shape \[2, max_seq_len, num_kv_heads, 12",
        ),
        ({"k_cache": (3, 64, 2, 16)}, ValueError, r"k_cache: expected shape \[2, max_seq_len"),
        ({"v_cache": (2, 63, 2, 16)}, ValueError, r"v_cache: expected shape \[2, 64, 2, 16\]"),
        ({"seq_lens": (3,)}, TypeError, "seq_lens: expected dtype int32, int64"),
        (
            {"seq_lens": torch.ones(3).int()},
            ValueError,
            r"seq_lens: expected shape \[2\]; got \[3\]",
        ),
        ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: expected a torch.Tensor; got NoneType"),
        ({"cu_seqlens_q": (3,)}, TypeError, "cu_seqlens_q: expected dtype int32, int64"),
        (
            {"cu_seqlens_q": torch.ones(0).int()},
            ValueError,
            r"cu_seqlens_q: expected shape \[batch",
        ),
        (
            {"block_table": torch.ones(1, 2).int()},
            ValueError,
            r"block_table: expected shape \[2, max",
        ),
        ({"k_scale": (2,)}, ValueError, "k_scale: expected None for caches of q's dtype"),
        ({"window": (-1, None)}, ValueError, "window: expected distances"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a positive"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale: expected a positive"),
        ({"causal": 1}, TypeError, "causal: expected a bool"),
        ({"return_lse": None}, TypeError, "return_lse: expected a bool"),
        ({"sinks": (5,)}, ValueError, r"sinks: expected shape \[4\]; got \[5\]"),
        ({"alibi_slopes": (3, 4)}, ValueError, r"alibi_slopes: expected shape \[2, 4\]"),
    ),
)
def test_wrong_arguments(wrong, error, message, make, draw, device):
    for name, x in wrong.items():
        if isinstance(x, torch.Tensor) or (isinstance(x, tuple) and name != "window"):
            wrong = {name: x.to(device) if isinstance(x, torch.Tensor) else draw(*x)}
    with pytest.raises(error, match=f"^{message}"):
        prefill_attention(**make((2, 3), (9, 0)) | wrong)


def test_it_has_no_gradient(make):
    inputs = make((2,), (9,))
    inputs["k_cache"].requires_grad_()
    with pytest.raises(NotImplementedError, match="q: expected inputs without a gradient"):
        prefill_attention(**inputs)
    with torch.no_grad():
        assert not prefill_attention(**inputs).requires_grad
