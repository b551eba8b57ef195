"""What is peculiar to rms_norm and add_rms_norm."""

import pytest
import torch
from budget import assert_call

from gqa_kernels import reference
from gqa_kernels.ops import norm
from gqa_kernels.ops.norm import add_rms_norm, rms_norm


def test_rounds_before_the_weight(draw):
    """Llama casts to the input's dtype first; a product in float32 has a quarter other bits."""
    x, weight = draw(64, 512, dtype=torch.bfloat16), draw(512, dtype=torch.bfloat16)
    y = rms_norm(x, weight)
    late = torch.nn.functional.rms_norm(x.float(), (512,), weight.float(), 1e-5).bfloat16()
    assert (y != reference.rms_norm(x, weight)).float().mean() < 0.005
    assert (y != late).float().mean() > 0.1


def test_the_sum_is_rounded_before_its_norm(draw):
    """y is the norm of the h that is returned, to the bit, not of an unrounded sum."""
    x, residual = draw(8, 512, dtype=torch.bfloat16), draw(8, 512, dtype=torch.bfloat16)
    weight = draw(512, dtype=torch.bfloat16)
    y, h = add_rms_norm(x, residual, weight)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(h, weight))


@pytest.mark.parametrize("op", ("rms_norm", "add_rms_norm"))
def test_weight_of_another_dtype(op, draw):
    inputs = {"x": draw(4, 96, dtype=torch.bfloat16), "weight": draw(96)}
    if op == "add_rms_norm":
        inputs["residual"] = draw(4, 96, dtype=torch.bfloat16)
    kernel, eager = getattr(norm, op), getattr(reference, op)
    y = kernel(**inputs)
    assert (y[0] if op == "add_rms_norm" else y).dtype == torch.float32
    assert_call(kernel, eager, inputs, tuple(inputs))


@pytest.mark.parametrize("shape", ((0, 64), (2, 0, 64)))
def test_no_rows(shape, draw):
    x, weight = draw(*shape).requires_grad_(), draw(64).requires_grad_()
    y, h = add_rms_norm(x, x, weight)
    assert y.shape == h.shape == shape
    (y.sum() + h.sum()).backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_any_leading_dimensions(draw):
    x, weight = draw(2, 3, 4, 96), draw(96)
    assert torch.equal(rms_norm(x, weight).view(24, 96), rms_norm(x.view(24, 96), weight))
    assert torch.equal(rms_norm(x[0, 0, 0], weight), rms_norm(x, weight)[0, 0, 0])


def test_a_row_does_not_depend_on_the_batch(draw):
    x, weight, cotangent = draw(20, 320), draw(320), draw(20, 320)

    def forward_and_dx(rows):
        leaf = x[rows].clone().requires_grad_()
        y = rms_norm(leaf, weight)
        (dx,) = torch.autograd.grad(y, leaf, cotangent[rows])
        return y, dx

    for a, b in zip(forward_and_dx(slice(7, 8)), forward_and_dx(slice(0, 20)), strict=True):
        assert torch.equal(a[0], b[7])


def test_nan_stays_in_its_row(draw):
    x, weight = draw(3, 64), draw(64)
    x[1, 5] = float("nan")
    assert rms_norm(x, weight).isnan().all(dim=1).tolist() == [False, True, False]


def test_a_frozen_weight_costs_no_launch(draw, monkeypatch):
    launched = []
    monkeypatch.setattr(norm, "_launch_sum_partials", lambda *_, **__: launched.append(1))
    x, weight = draw(4, 64).requires_grad_(), draw(64)
    rms_norm(x, weight).sum().backward()
    assert x.grad is not None and not launched
    rms_norm(x, weight.requires_grad_()).sum().backward()
    assert launched


@pytest.mark.parametrize("used", (0, 1))
def test_one_output_unused(used, draw):
    inputs = [draw(4, 64).requires_grad_() for _ in range(2)] + [draw(64).requires_grad_()]
    wanted = [t.detach().clone().requires_grad_() for t in inputs]
    add_rms_norm(*inputs)[used].square().sum().backward()
    reference.add_rms_norm(*wanted)[used].square().sum().backward()
    for ours, theirs in zip(inputs, wanted, strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_of_x_and_residual_do_not_share_memory(draw):
    x, residual = draw(2, 64).requires_grad_(), draw(2, 64).requires_grad_()
    y, h = add_rms_norm(x, residual, draw(64))
    (y.sum() + h.sum()).backward()
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


def test_eps(draw):
    x = torch.zeros_like(draw(2, 64))
    assert torch.equal(rms_norm(x, draw(64), eps=1e-5), x)
    small = draw(2, 64) * 1e-3
    assert not torch.allclose(rms_norm(small, draw(64), 1e-5), rms_norm(small, draw(64), 1e-6))


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    (
        ((2, 64), (63,), ValueError, r"weight: expected shape \[64\]; got \[63\]"),
        ((2, 64), (2, 64), ValueError, r"weight: expected shape \[64\]; got \[2, 64\]"),
        ((2, 16385), (16385,), NotImplementedError, "x: expected a last dimension of 1 to 16384"),
        ((2, 0), (0,), NotImplementedError, "x: expected a last dimension of 1 to 16384"),
        ((), (1,), NotImplementedError, "x: expected a last dimension"),
    ),
)
def test_wrong_shapes(x, weight, error, message, device):
    with pytest.raises(error, match=message):
        rms_norm(torch.zeros(x, device=device), torch.zeros(weight, device=device))


def test_wrong_arguments(draw):
    x, weight = draw(2, 64), draw(64)
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor; got list"):
        rms_norm([1.0], weight)
    with pytest.raises(TypeError, match="weight: expected dtype float32"):
        rms_norm(x, weight.long())
    with pytest.raises(ValueError, match=r"residual: expected shape \[2, 64\]; got \[1, 64\]"):
        add_rms_norm(x, x[:1], weight)
    with pytest.raises(TypeError, match="residual: expected x's dtype"):
        add_rms_norm(x, x.half(), weight)
    with pytest.raises(ValueError, match="weight: expected x's device"):
        rms_norm(x, weight.to("meta"))
