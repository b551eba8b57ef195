"""The specification against PyTorch's own functions, in float64."""

import pytest
import torch
import torch.nn.functional as F

from gqa_kernels import get_backend, reference


@pytest.fixture
def draw(generator):
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def test_rms_norm(draw):
    x, weight = draw(3, 5, 32), draw(32)
    wanted = F.rms_norm(x, (32,), weight, eps=1e-3)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), wanted)
    y, h = reference.add_rms_norm(x, 2 * x, weight, 1e-3)
    torch.testing.assert_close(h, 3 * x)
    torch.testing.assert_close(y, F.rms_norm(h, (32,), weight, eps=1e-3))


def test_rms_norm_rounds_in_llamas_order(draw):
    x, weight = draw(64, 32).bfloat16(), draw(32).bfloat16()
    normalized = F.rms_norm(x.float(), (32,), eps=1e-5).bfloat16()
    assert torch.equal(reference.rms_norm(x, weight), normalized * weight)


def test_swiglu(draw):
    gate, up = draw(3, 7), draw(3, 7)
    torch.testing.assert_close(reference.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)


def test_rope_is_multiplication_by_a_complex_number(draw):
    x = draw(2, 3, 4, 8)
    angle = draw(5, 4)
    positions = torch.tensor([[0, 4, 2], [1, 1, 3]])
    cos, sin = angle.cos(), angle.sin()
    rotated, _ = reference.apply_rope(x, x, cos, sin, positions, interleaved=True)
    number = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    factor = torch.polar(torch.ones_like(angle), angle)[positions][:, :, None]
    torch.testing.assert_close(rotated, torch.view_as_real(number * factor).flatten(-2))


def test_rope_halves(draw):
    x, angle = draw(1, 3, 2, 8), draw(3, 4)
    rotated, _ = reference.apply_rope(x, x, angle.cos(), angle.sin())
    turned = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)  # as transformers writes it
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1)[None, :, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(rotated, x * cos + turned * sin)


@pytest.mark.parametrize("heads", ((4, 4), (6, 2), (5, 1)))
@pytest.mark.parametrize("causal", (False, True))
def test_flash_attention(heads, causal, draw):
    q, k, v = draw(2, 7, heads[0], 8), draw(2, 7, heads[1], 8), draw(2, 7, heads[1], 8)
    wanted = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.7, enable_gqa=True
    )
    out, lse = reference.flash_attention(q, k, v, causal=causal, softmax_scale=0.7, return_lse=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2))
    key = k[0, :, 0]
    visible = torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool()
    scores = (0.7 * q[0, :, 0] @ key.T).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(lse[0, 0], scores.logsumexp(-1))


@pytest.mark.parametrize("lengths", ((3, 7), (7, 3)))
def test_causal_is_bottom_right(lengths, draw):
    """The last query sees every key, the one before it all but the last."""
    q, k = draw(1, lengths[0], 1, 8), draw(1, lengths[1], 1, 8)
    out = reference.flash_attention(q, k, k, causal=True)
    for i in range(lengths[0]):
        seen = lengths[1] - (lengths[0] - 1 - i)
        if seen <= 0:
            assert torch.equal(out[:, i], torch.zeros_like(out[:, i]))
        else:
            alone = reference.flash_attention(q[:, i : i + 1], k[:, :seen], k[:, :seen])
            torch.testing.assert_close(out[:, i : i + 1], alone)


def test_decode_attention(draw):
    q, k, v = draw(3, 2, 4, 8), draw(3, 9, 2, 8), draw(3, 9, 2, 8)
    lengths = (9, 5, 2)
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = float("nan")
    out = reference.decode_attention(q, k, v, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        wanted = reference.flash_attention(q[one], k[one, :length], v[one, :length], causal=True)
        torch.testing.assert_close(out[one], wanted)


@pytest.mark.parametrize("far", (2**63 - 1, 10**30))
@pytest.mark.parametrize("lengths", ((3, 7), (7, 3)))
def test_a_window_beyond_all_keys_hides_none(lengths, far, draw):
    """Keys at such a distance have numbers that no int64 holds, on either side."""
    q, k = draw(2, lengths[0], 2, 8), draw(2, lengths[1], 1, 8)
    bounds = torch.arange(3) * lengths[0]
    for window in ((far, None), (None, far), (far, far)):
        for op, rows, options in (
            (reference.flash_attention, (q, k, k), {}),
            (reference.decode_attention, (q, k, k, None), {"causal": False}),
            (reference.prefill_attention, (q.flatten(0, 1), k, k, bounds, None), {"causal": False}),
        ):
            assert torch.equal(op(*rows, **options, window=window), op(*rows, **options))


@pytest.mark.parametrize("bounds", ((1, 3, 6), (0, 4, 2), (0, -1, 6), (2, 2, 2)))
@pytest.mark.parametrize("backend", ("eager", "torch"))
def test_bounds_that_are_none_are_refused(backend, bounds, draw):
    """Rows before the first bound would be missing from the result."""
    ops, bounds = get_backend(backend), torch.tensor(bounds)
    q, cache = draw(6, 2, 8).float(), draw(2, 9, 1, 8).float()
    right = torch.tensor([0, 2, 6])
    message = "expected bounds from 0 that never decrease; got "
    with pytest.raises(ValueError, match=f"^cu_seqlens_q: {message}"):
        ops.prefill_attention(q, cache, cache, bounds, None)
    with pytest.raises(ValueError, match=f"^cu_seqlens_q: {message}"):
        ops.flash_attention_varlen(q, q, q, bounds, right)
    with pytest.raises(ValueError, match=f"^cu_seqlens_kv: {message}"):
        ops.flash_attention_varlen(q, q, q, right, bounds)
