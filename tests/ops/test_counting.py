"""What PyTorch's own instruments see of the ops: flops and names."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from gqa_kernels import flash_attention, flash_attention_varlen, rms_norm


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flop_counters_see_attention(draw, device):
    q, k = draw(2, 9, 4, 16).requires_grad_(), draw(2, 11, 2, 16)
    forward = 4 * 2 * 4 * 9 * 11 * 16
    assert flops(lambda: flash_attention(q, k, k)) == forward
    out = flash_attention(q, k, k)
    assert flops(lambda: flash_attention(q, k, k).sum().backward()) == forward * 7 // 2
    assert out.grad_fn is not None
    bounds = torch.tensor([0, 4, 9], device=device)
    packed = flops(lambda: flash_attention_varlen(q[0], k[0], k[0], bounds, bounds))
    assert packed == 4 * 4 * (4 * 4 + 5 * 5) * 16


def test_an_eager_profile_names_the_ops(draw):
    x, weight = draw(3, 16), draw(16)
    with torch.profiler.profile() as profile:
        rms_norm(x, weight)
        rms_norm(x, weight.requires_grad_())
    assert [event.name for event in profile.events()].count("gqa_kernels::rms_norm") == 2
