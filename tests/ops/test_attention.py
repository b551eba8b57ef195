"""What is peculiar to flash_attention."""

import pytest
import torch
from budget import assert_call, assert_calls

from gqa_kernels import reference
from gqa_kernels.ops.attention import flash_attention, flash_attention_varlen
from gqa_kernels.runtime import configs, layout, target


def assert_within_budget(q, k, v, **kwargs):
    inputs = {"q": q, "k": k, "v": v, "return_lse": True, **kwargs}
    assert_call(flash_attention, reference.flash_attention, inputs)


def border_lengths():
    """Pairs of lengths on both sides of the tile borders of the running target's configuration."""
    config = configs.attention_config(configs.ATTENTION_FORWARD, target.current().arch, 4, 16)
    m, n = config.block_m, config.block_n
    queries = (1, 3, m - 1, m, m + 1, 2 * m + 1)
    keys = (1, n - 1, n, n + 1, m + n + 1, 2 * m)
    return [(a, b) for a in queries for b in keys]


@pytest.fixture(params=(True, False), ids=("ahead", "in order"))
def order(request, monkeypatch):
    """Each tile's product before the softmax of the tile before it, or after."""
    rows = (row._replace(ahead=request.param) for row in configs.ATTENTION_FORWARD)
    monkeypatch.setattr(configs, "ATTENTION_FORWARD", tuple(rows))


@pytest.mark.parametrize("causal", (False, True))
def test_lengths_that_cross_tile_borders(causal, order, draw):
    """One budget for all lengths: a single short row says little about eager's error."""
    calls = []
    for seq_len_q, seq_len_kv in border_lengths():
        call = {
            "q": draw(1, seq_len_q, 1, 16),
            "k": draw(1, seq_len_kv, 1, 16),
            "v": draw(1, seq_len_kv, 1, 16),
            "causal": causal,
            "return_lse": True,
        }
        calls.append(call)
    assert_calls(flash_attention, reference.flash_attention, calls)


@pytest.mark.parametrize(
    "scores", ({"window": (20, 3)}, {"softcap": 2.0, "causal": True}, {"key_mask": True}), ids=str
)
def test_either_order_of_a_step(scores, order, draw, generator):
    """Masks, caps, biases and the residue that gradients need."""
    q, k, v = (draw(2, n, 2, 16, dtype=torch.bfloat16) for n in (45, 70, 70))
    if "key_mask" in scores:
        scores = {"key_mask": (torch.rand(2, 70, generator=generator) < 0.6).to(q.device)}
    slopes = torch.rand(2, generator=generator).to(q.device)
    inputs = {"q": q, "k": k, "v": v, "alibi_slopes": slopes, "sinks": draw(2), **scores}
    assert_call(flash_attention, reference.flash_attention, inputs, ("q", "k", "v"))


@pytest.mark.parametrize("group_size", (1, 2, 3, 5, 6, 7, 8, 12))
def test_group_sizes(group_size, draw):
    q, k, v = draw(2, 9, 2 * group_size, 16), draw(2, 21, 2, 16), draw(2, 21, 2, 16)
    assert_within_budget(q, k, v, causal=True)


@pytest.mark.parametrize("head_dim", (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256))
def test_head_dims(head_dim, draw):
    shapes = (1, 20, 2, head_dim), (1, 35, 1, head_dim), (1, 35, 1, head_dim)
    assert_within_budget(*(draw(*shape, dtype=torch.bfloat16) for shape in shapes), causal=True)


def test_queries_that_see_no_key_give_zero(draw):
    q, k, v = draw(1, 50, 2, 16), draw(1, 20, 1, 16), draw(1, 20, 1, 16)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(out[:, :30], torch.zeros_like(out[:, :30]))
    assert (lse[..., :30] == -torch.inf).all()
    assert lse[..., 30:].isfinite().all()


@pytest.mark.parametrize("shape", ((2, 3, 0), (2, 0, 3), (0, 3, 3)))
def test_empty(shape, draw):
    batch, seq_len_q, seq_len_kv = shape
    q, k = draw(batch, seq_len_q, 4, 16), draw(batch, seq_len_kv, 2, 16)
    out, lse = flash_attention(q, k, k, causal=True, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((batch, 4, seq_len_q), -torch.inf, device=q.device))


@pytest.mark.parametrize("fits", (True, False))
def test_views_of_a_fused_projection(fits, draw, monkeypatch):
    """Both ways of loading K and V: by descriptor and by pointer."""
    monkeypatch.setattr(layout, "fits_tma", lambda x: fits)
    qkv = draw(2, 40, 8, 64, dtype=torch.bfloat16)
    before = qkv.clone()
    assert_within_budget(*qkv.split((4, 2, 2), dim=2), causal=True)
    assert torch.equal(qkv, before)


def test_both_loads_give_the_same_bits(draw, monkeypatch):
    q, k, v = draw(1, 50, 2, 80), draw(1, 70, 1, 80), draw(1, 70, 1, 80)
    by_descriptor = flash_attention(q, k, v, causal=True)
    monkeypatch.setattr(layout, "fits_tma", lambda x: False)
    assert torch.equal(by_descriptor, flash_attention(q, k, v, causal=True))


def test_unaligned_views_are_not_given_to_the_copy_engine(draw):
    whole = draw(1, 8, 2, 64, dtype=torch.bfloat16)
    assert layout.fits_tma(whole)
    assert not layout.fits_tma(whole[..., 4:44])  # begins 8 bytes off
    assert not layout.fits_tma(draw(1, 8, 2, 63, dtype=torch.bfloat16))  # rows of 126 bytes
    assert_within_budget(*(whole[..., 4:44] for _ in range(3)))


@pytest.mark.parametrize("fits", (True, False))
def test_nan_beyond_the_keys_never_matters(fits, draw, monkeypatch):
    monkeypatch.setattr(layout, "fits_tma", lambda x: fits)
    q, storage = draw(1, 10, 2, 16), draw(1, 64, 2, 16)
    storage[:, 21:] = float("nan")
    k = v = storage[:, :21]
    assert_within_budget(q, k, v, causal=True)


def test_nan_stays_with_its_query(draw):
    q, k, v = draw(1, 5, 2, 16), draw(1, 9, 1, 16), draw(1, 9, 1, 16)
    q[0, 2, 1, 3] = float("nan")
    bad = flash_attention(q, k, v).isnan().all(dim=-1)[0]
    assert bad.nonzero().tolist() == [[2, 1]]


def test_a_sequence_does_not_depend_on_the_batch(draw):
    q, k, v = draw(3, 40, 4, 32), draw(3, 50, 2, 32), draw(3, 50, 2, 32)
    together = flash_attention(q, k, v, causal=True)
    alone = flash_attention(q[1:2], k[1:2], v[1:2], causal=True)
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("softmax_scale", (1e-3, 0.3, 4.0))
def test_softmax_scale(softmax_scale, draw):
    q, k, v = draw(1, 20, 2, 32), draw(1, 40, 2, 32), draw(1, 40, 2, 32)
    assert_within_budget(q, k, v, softmax_scale=softmax_scale)


def test_large_scores_do_not_overflow(draw):
    q, k, v = 60 * draw(1, 20, 1, 64), 60 * draw(1, 40, 1, 64), draw(1, 40, 1, 64)
    assert_within_budget(q, k, v, causal=True)
    assert_within_budget(-q.abs(), k.abs(), v)  # every score far below zero


def test_offsets_beyond_32_bits(device):
    """Strides of 31 bits whose multiples need more; only the pages that are touched exist."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    q = storage.as_strided((3, 2, 1, 32), (apart, 32, 32, 1))
    q.copy_(torch.randn(3, 2, 1, 32))
    out = flash_attention(q, q, q, causal=True)
    assert torch.equal(out, flash_attention(*[q.contiguous()] * 3, causal=True))


def test_the_output_can_be_written_to(draw):
    q = draw(1, 4, 2, 16).requires_grad_()
    flash_attention(q, q, q).mul_(2)
    bounds = torch.tensor([0, 4], device=q.device)
    flash_attention_varlen(q[0], q[0], q[0], bounds, bounds, return_lse=True)[0].mul_(2)


def test_wrong_scores(draw):
    q = draw(1, 4, 6, 16)
    for softcap in (0.0, -1.0, float("nan"), 1e-38):
        with pytest.raises(ValueError, match="softcap: expected None or a positive finite float32"):
            flash_attention(q, q, q, softcap=softcap, softmax_scale=10.0)
    with pytest.raises(ValueError, match="softmax_scale: expected a float; got a larger integer"):
        flash_attention(q, q, q, softmax_scale=10**400)
    with pytest.raises(TypeError, match=r"alibi_slopes: expected a torch\.Tensor; got list"):
        flash_attention(q, q, q, alibi_slopes=[0.5] * 6)
    with pytest.raises(ValueError, match=r"sinks: expected shape \[6\]; got \[1\]"):
        flash_attention(q, q, q, sinks=torch.zeros(1, device=q.device))
    for window, error in (((-1, 0), ValueError), (5, TypeError), ((1.0, 2), TypeError)):
        with pytest.raises(error, match="window: expected"):
            flash_attention(q, q, q, window=window)


def test_wrong_arguments(draw):
    q, k = draw(1, 4, 6, 16), draw(1, 5, 2, 16)
    with pytest.raises(ValueError, match="multiple of k's 4; got 6"):
        flash_attention(q, draw(1, 5, 4, 16), draw(1, 5, 4, 16))
    with pytest.raises(ValueError, match=r"v: expected shape \[1, 5, 2, 16\]; got \[1, 4, 2, 16\]"):
        flash_attention(q, k, k[:, :4])
    with pytest.raises(ValueError, match=r"k: expected shape \[1, seq_len_kv, num_kv_heads, 16\]"):
        flash_attention(q, k[..., :8], k[..., :8])
    with pytest.raises(TypeError, match="k: expected q's dtype"):
        flash_attention(q, k.half(), k.half())
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 256; got 12"):
        flash_attention(q[..., :12], k[..., :12], k[..., :12])
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 256; got 264"):
        flash_attention(draw(1, 1, 1, 264), draw(1, 1, 1, 264), draw(1, 1, 1, 264))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="softmax_scale: expected a positive finite float32"):
            flash_attention(q, k, k, softmax_scale=scale)
