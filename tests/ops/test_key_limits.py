"""key_ranges and key_mask: which keys each query may see, said by tensors."""

import pytest
import torch
from budget import assert_call

from gqa_kernels import decode_attention, flash_attention, reference

WRT = ("q", "k", "v")


def random_ranges(batch, seq_len_q, seq_len_kv, generator):
    """Empty, whole and reversed ones among them, and bounds beyond the keys."""
    ranges = torch.randint(-5, seq_len_kv + 6, (batch, seq_len_q, 2), generator=generator)
    ranges[:, ::3] = ranges[:, ::3].sort(-1).values
    ranges[:, 1] = torch.tensor([-(2**31), 2**31 - 1])
    return ranges


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("limits", ({"causal": True}, {"window": (30, 2)}, {}), ids=str)
def test_any_ranges_beside_other_limits(limits, dtype, draw, device, generator):
    q, k, v = draw(2, 70, 4, 16), draw(2, 83, 2, 16), draw(2, 83, 2, 16)
    ranges = random_ranges(2, 70, 83, generator).to(device, dtype)
    mask = (torch.rand(2, 83, generator=generator) < 0.7).to(device)
    inputs = {"q": q, "k": k, "v": v, "return_lse": True, **limits}
    both = {"key_ranges": ranges, "key_mask": mask}
    assert_call(flash_attention, reference.flash_attention, inputs | both, WRT)


def test_ranges_stand_in_for_a_causal_mask(draw, device):
    """The same keys said in another way, tile after tile; the bits may differ, not the result."""
    q, k = draw(1, 90, 2, 16), draw(1, 100, 2, 16)
    own_keys = torch.arange(90, device=device) + 10
    ranges = torch.stack((torch.zeros_like(own_keys), own_keys + 1), -1)[None]
    assert_call(
        lambda q, k: flash_attention(q, k, k, key_ranges=ranges),
        lambda q, k: reference.flash_attention(q, k, k, causal=True),
        {"q": q, "k": k},
    )


@pytest.mark.parametrize("limits", ({"causal": True}, {"window": (70, 9)}, {}), ids=str)
def test_documents_longer_than_tiles(limits, draw, device):
    """Some blocks of keys lie in one document, whose queries all see them; one lies in two."""
    lengths = torch.tensor([80, 100, 20], device=device)
    end = lengths.cumsum(0)
    ranges = torch.stack((end - lengths, end), -1).repeat_interleave(lengths, 0)[None]
    q, k, v = draw(1, 200, 2, 16), draw(1, 200, 1, 16), draw(1, 200, 1, 16)
    inputs = {"q": q, "k": k, "v": v, "key_ranges": ranges, **limits}
    assert_call(flash_attention, reference.flash_attention, inputs, WRT)


def test_hidden_keys_get_no_gradient_and_blind_queries_nothing(draw, device):
    q, k, v = (draw(2, 40, 2, 16).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    mask[0, :7] = False
    mask[1] = False
    out, lse = flash_attention(q, k, v, key_mask=mask, causal=True, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), (q, k, v))
    assert (out[0, :7] == 0).all() and (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    for grad in (dk, dv):
        assert (grad[0, :7] == 0).all() and (grad[1] == 0).all() and (grad[0, 7:] != 0).any()
    assert (dq[1] == 0).all() and dq.isfinite().all()


def test_keys_beyond_every_range_are_not_read(draw, device):
    """A static cache: what lies behind its end, NaN included, is in tiles that nobody visits."""
    q, k = draw(1, 4, 2, 16), draw(1, 256, 2, 16)
    k[:, 128:] = torch.nan
    ranges = torch.tensor([0, 128], device=device).expand(1, 4, 2)
    assert_call(
        lambda q, k: flash_attention(q, k, k, key_ranges=ranges),
        lambda q, k: reference.flash_attention(q, k[:, :128], k[:, :128]),
        {"q": q, "k": k},
    )


@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.uint8, torch.int32, torch.int64), ids=str)
def test_masks_of_every_dtype_and_stride(mask_dtype, draw, device, generator):
    q, k = draw(2, 20, 2, 16), draw(2, 50, 2, 16)
    mask = (torch.rand(2, 50, generator=generator) < 0.5).to(device, mask_dtype)
    expected = flash_attention(q, k, k, key_mask=mask.bool())
    strided = mask.repeat_interleave(3, 1)[:, ::3]
    assert torch.equal(flash_attention(q, k, k, key_mask=strided), expected)
    inputs = {"q": q, "k": k, "v": k, "key_mask": mask}
    assert_call(flash_attention, reference.flash_attention, inputs)


@pytest.mark.parametrize("seq_len_q", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_decode(seq_len_q, dtype, draw, device, generator):
    q, k, v = draw(2, seq_len_q, 6, 16), draw(2, 600, 2, 16), draw(2, 600, 2, 16)
    seq_lens = torch.tensor([590, 300], device=device)
    first = torch.tensor([[40], [270]], device=device).expand(2, seq_len_q)
    ranges = torch.stack((first, torch.full_like(first, 1000)), -1)
    mask = (torch.rand(2, 600, generator=generator) < 0.6).to(device)
    inputs = dict(zip(["q", "k_cache", "v_cache"], (x.to(dtype) for x in (q, k, v)), strict=True))
    inputs["seq_lens"] = seq_lens
    for limits in ({"key_ranges": ranges}, {"key_mask": mask}):
        inputs |= limits
        assert_call(decode_attention, reference.decode_attention, inputs)
    blind = decode_attention(**inputs | {"key_mask": torch.zeros_like(mask)})
    assert (blind == 0).all()


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    (
        ({"key_ranges": torch.zeros(2, 5, 2)}, TypeError, "key_ranges: expected dtype int32"),
        (
            {"key_ranges": torch.zeros(2, 4, 2).int()},
            ValueError,
            r"key_ranges: expected shape \[2, 5, 2\]; got \[2, 4, 2\]",
        ),
        ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask: expected dtype bool"),
        (
            {"key_mask": torch.ones(2, 5).bool()},
            ValueError,
            r"key_mask: expected shape \[2, 7\]; got \[2, 5\]",
        ),
    ),
)
def test_bad_limits_are_named(limits, error, message, draw, device):
    limits = {name: value.to(device) for name, value in limits.items()}
    q, k = draw(2, 5, 2, 16), draw(2, 7, 2, 16)
    with pytest.raises(error, match=message):
        flash_attention(q, k, k, **limits)
    with pytest.raises(error, match=message):
        decode_attention(q, k, k, torch.full((2,), 7, device=device), **limits)
