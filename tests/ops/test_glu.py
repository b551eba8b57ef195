"""What is peculiar to swiglu."""

import pytest
import torch
from budget import assert_call

from gqa_kernels import reference
from gqa_kernels.ops.glu import swiglu


def test_halves_of_a_packed_projection(device, generator):
    packed = torch.randn(3, 5, 2 * 192, generator=generator).to(device, torch.bfloat16)
    gate, up = packed.chunk(2, dim=-1)
    assert_call(swiglu, reference.swiglu, {"gate": gate, "up": up}, ("gate", "up"))


def test_extremes(device):
    """σ saturates: no overflow where exp(−gate) does."""
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]], device=device)
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(swiglu(gate, up), reference.swiglu(gate, up), rtol=1e-6, atol=1e-37)
    leaf = gate.clone().requires_grad_()
    swiglu(leaf, up).sum().backward()
    wanted = gate.double().requires_grad_()
    reference.swiglu(wanted, up.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-6, atol=1e-37)


def test_no_rows(device):
    gate = torch.zeros(0, 64, device=device, requires_grad=True)
    swiglu(gate, gate).sum().backward()
    assert gate.grad.shape == (0, 64)


def test_wrong_arguments(device):
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match=r"up: expected shape \[2, 64\]; got \[64\]"):
        swiglu(x, x[0])
    with pytest.raises(TypeError, match="up: expected gate's dtype"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match="gate: expected a last dimension of 1 or more"):
        swiglu(x[:, :0], x[:, :0])
