"""Decode attention with windows, soft caps, sinks and ALiBi; the op table has their budgets."""

import pytest
import torch
from budget import assert_call

from gqa_kernels import decode_attention, flash_attention, reference
from gqa_kernels.runtime.configs import DECODE_CHUNK as CHUNK

LONG = 2 * CHUNK + 40
WINDOWS = ((0, None), (37, None), (CHUNK, None), (LONG, None), (2**63 - 1, None))


def lengths(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.fixture
def inputs(draw, device):
    """Two sequences of several chunks, of 3 query heads to a key/value head."""
    return {
        "q": draw(2, 2, 6, 16),
        "k_cache": draw(2, LONG, 2, 16),
        "v_cache": draw(2, LONG, 2, 16),
        "seq_lens": lengths(LONG, LONG - 29, device=device),
    }


def every_option(draw):
    return {"softcap": 1.5, "sinks": draw(6), "alibi_slopes": draw(2, 6).abs()}


@pytest.mark.covering(1)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, causal, inputs, draw):
    window = (window[0], None if causal else 1)
    options = {"window": window, "causal": causal, "return_lse": True}
    assert_call(decode_attention, reference.decode_attention, inputs | options)
    options |= every_option(draw)
    assert_call(decode_attention, reference.decode_attention, inputs | options)


@pytest.mark.parametrize("length", (0, 1, 2, 41))
def test_short_sequences(length, inputs, draw, device):
    """Sequences with fewer keys than new tokens, or none: a query may see its sink alone."""
    inputs["seq_lens"] = lengths(length, 1, device=device)
    options = every_option(draw) | {"window": (3, None), "return_lse": True}
    assert_call(decode_attention, reference.decode_attention, inputs | options)


def test_it_is_flash_attention_over_a_full_cache(inputs, draw):
    """The contract of `reference.decode_attention` follows that of `flash_attention`."""
    options = every_option(draw) | {"window": (70, None), "return_lse": True}
    inputs |= {"seq_lens": None}
    q, k, v = (inputs[name].double() for name in ("q", "k_cache", "v_cache"))
    expected = reference.flash_attention(q, k, v, causal=True, **options)
    actual = reference.decode_attention(q, k, v, None, **options)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for causal in (True, False):
        options |= {"causal": causal, "window": (70, 1)}
        ours = decode_attention(*(inputs[name] for name in inputs), **options)
        theirs = flash_attention(*(inputs[name] for name in ("q", "k_cache", "v_cache")), **options)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_keys_before_the_window_are_not_read(inputs):
    """A whole chunk before the window may hold NaN, which a weight of 0 would not hide."""
    first_seen = LONG - 29 - 2 - 60
    clean = decode_attention(**inputs, window=(60, None))
    for name in ("k_cache", "v_cache"):
        inputs[name][:, : first_seen // 128 * 128] = float("nan")
    assert torch.equal(clean, decode_attention(**inputs, window=(60, None)))


@pytest.mark.parametrize("window", (None, (70, None)))
def test_bits_do_not_depend_on_the_batch_the_pages_or_the_other_new_tokens(window, inputs, draw):
    options = every_option(draw) | {"window": window}
    slopes = options.pop("alibi_slopes")
    together = decode_attention(**inputs, **options, alibi_slopes=slopes)
    page_size = 8
    pages = {
        name: inputs[name].flatten(0, 1).unflatten(0, (-1, page_size)).contiguous()
        for name in ("k_cache", "v_cache")
    }
    table = torch.arange(len(pages["k_cache"]), device=slopes.device, dtype=torch.int32).view(2, -1)
    paged = decode_attention(**inputs | pages, **options, alibi_slopes=slopes, block_table=table)
    assert torch.equal(paged, together)
    for b in range(2):
        alone = {name: x[b : b + 1] for name, x in inputs.items()}
        out = decode_attention(**alone, **options, alibi_slopes=slopes[b])
        assert torch.equal(out, together[b : b + 1])
        for i in range(2):
            one = alone | {"q": alone["q"][:, i : i + 1], "seq_lens": alone["seq_lens"] - 1 + i}
            out = decode_attention(**one, **options, alibi_slopes=slopes[b])
            assert torch.equal(out, together[b : b + 1, i : i + 1])


@pytest.mark.parametrize("sinks", (None, "finite", "none"))
def test_no_capacity(sinks, draw, device):
    q, empty = draw(2, 1, 4, 16), draw(2, 0, 2, 16)
    if sinks is not None:
        sinks = draw(4) if sinks == "finite" else torch.full((4,), -torch.inf, device=device)
    out, lse = decode_attention(q, empty, empty, None, sinks=sinks, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    expected = torch.full((4,), -torch.inf, device=device) if sinks is None else sinks
    assert torch.equal(lse, expected[:, None].expand(2, 4, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"window": (-1, None)}, ValueError, "window: expected"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a positive"),
        ({"softcap": "5"}, TypeError, "softcap: expected a number"),
        ({"causal": 1}, TypeError, "causal: expected"),
        ({"sinks": torch.ones(5)}, ValueError, r"sinks: expected shape \[6\]; got \[5\]"),
        ({"alibi_slopes": torch.ones(3, 6)}, ValueError, r"alibi_slopes: expected shape \[2, 6\]"),
        ({"alibi_slopes": torch.ones(6).half()}, TypeError, "alibi_slopes: expected dtype float32"),
    ),
)
def test_wrong_arguments(options, error, message, inputs, device):
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    with pytest.raises(error, match=f"^{message}"):
        decode_attention(**inputs, **options)
