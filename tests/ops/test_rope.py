"""What is peculiar to apply_rope."""

import pytest
import torch

from gqa_kernels.ops.rope import apply_rope


def table(max_seq_len, head_dim, device):
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(max_seq_len, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def to_half_split(x):
    """Features (0, 1, 2, 3, …) of interleaved pairs in half-split order (0, 2, …, 1, 3, …)."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def test_the_two_layouts_are_one_rotation(draw, device):
    q, k, angles = draw(2, 5, 6, 32), draw(2, 5, 2, 32), table(5, 32, device)
    interleaved = apply_rope(q, k, *angles, interleaved=True)
    half_split = apply_rope(to_half_split(q), to_half_split(k), *angles)
    for a, b in zip(interleaved, half_split, strict=True):
        assert torch.equal(to_half_split(a), b)


def test_scores_depend_on_distances_only(draw, device):
    q, k = draw(1, 1, 1, 64), draw(1, 1, 1, 64)
    angles = table(64, 64, device)

    def score(query, key):
        positions = torch.tensor([[query]], device=device), torch.tensor([[key]], device=device)
        return (
            apply_rope(q, k, *angles, positions[0])[0] * apply_rope(q, k, *angles, positions[1])[1]
        ).sum()

    torch.testing.assert_close(score(7, 3), score(57, 53), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_positions(dtype, draw, device):
    q, k, angles = draw(2, 6, 2, 32), draw(2, 6, 1, 32), table(10, 32, device)
    wide = torch.arange(24, device=device, dtype=dtype).view(2, 12) % 10
    positions = wide[:, ::2]  # strided
    outputs = apply_rope(q, k, *angles, positions)
    for b in range(2):
        for t in range(6):
            row = positions[b, t].item()
            single = apply_rope(
                q[b : b + 1, t : t + 1], k[b : b + 1, t : t + 1], *(a[row:] for a in angles)
            )
            for whole, one in zip(outputs, single, strict=True):
                assert torch.equal(whole[b, t], one[0, 0])


def test_positions_outside_the_table_give_nan(draw, device):
    q, k, angles = draw(1, 4, 2, 32), draw(1, 4, 1, 32), table(8, 32, device)
    positions = torch.tensor([[-1, 7, 8, 2**62 + 1]], device=device)
    for rotated in apply_rope(q, k, *angles, positions):
        assert rotated[0].isnan().all(dim=(1, 2)).tolist() == [True, False, True, True]
        assert not rotated[0, 1].isnan().any()


def test_inverse_is_the_gradient(draw, device):
    """A rotation's transpose undoes it."""
    q, k, angles = draw(2, 3, 4, 32).requires_grad_(), draw(2, 3, 2, 32), table(3, 32, device)
    rotated = apply_rope(q, k, *angles)[0]
    (back,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(back, q.detach())


def test_views_of_a_fused_projection(draw, device):
    qkv = draw(2, 5, 8, 32)
    q, k, _ = qkv.split((4, 2, 2), dim=2)
    before = qkv.clone()
    rotated = apply_rope(q, k, *table(5, 32, device))
    wanted = apply_rope(q.contiguous(), k.contiguous(), *table(5, 32, device))
    assert all(torch.equal(a, b) for a, b in zip(rotated, wanted, strict=True))
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_no_tokens(shape, draw, device):
    q, k = draw(*shape, 4, 32).requires_grad_(), draw(*shape, 2, 32)
    rotated = apply_rope(q, k, *table(4, 32, device))
    assert [x.shape for x in rotated] == [q.shape, k.shape]
    rotated[0].sum().backward()


def test_wrong_arguments(draw, device):
    q, k, (cos, sin) = draw(1, 4, 2, 32), draw(1, 4, 1, 32), table(4, 32, device)
    with pytest.raises(ValueError, match=r"k: expected shape \[1, 4, num_kv_heads, 32\]"):
        apply_rope(q, k[:, :3], cos, sin)
    with pytest.raises(ValueError, match=r"cos: expected shape \[max_seq_len, 16\]"):
        apply_rope(q, k, cos[:, :8], sin)
    with pytest.raises(ValueError, match=r"sin: expected shape \[4, 16\]; got \[3, 16\]"):
        apply_rope(q, k, cos, sin[:3])
    with pytest.raises(TypeError, match="cos: expected dtype float32"):
        apply_rope(q, k, cos.half(), sin)
    with pytest.raises(TypeError, match="positions: expected dtype int32, int64"):
        apply_rope(q, k, cos, sin, torch.zeros(1, 4, device=device))
    with pytest.raises(ValueError, match="q: expected seq_len up to cos's 3 rows; got 4"):
        apply_rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match="q: expected an even head_dim; got 31"):
        apply_rope(q[..., :31], k[..., :31], cos, sin)
    with pytest.raises(NotImplementedError, match="sin: expected a constant"):
        apply_rope(q, k, cos, sin.clone().requires_grad_())
