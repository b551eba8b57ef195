"""The model on the Triton kernels against the same model on the eager ops.

Where there is no GPU the kernels run in Triton's interpreter.
"""

from types import SimpleNamespace

import pytest
import torch
from small_llama import EAGER, assert_within_budget, lively, random_tokens, small_config, twin
from torch import Tensor

from gqa_kernels import get_backend
from llama2 import KVCache, Llama2
from llama2.generate import generate

TRITON = get_backend("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_triton_logits_within_budget_of_eager(dtype, device):
    eager = lively(small_config(), device).to(dtype)
    triton = twin(eager, TRITON)
    oracle = twin(eager, dtype=torch.float64)
    tokens = random_tokens(device, 2, 26)

    def prefill_and_decode(model: Llama2) -> Tensor:
        cache_dtype = model.lm_head.weight.dtype
        cache = KVCache(model.config, 2, 26, dtype=cache_dtype, device=device)
        # The rows begin with 9 and 5 valid tokens; then come a step of 16 and a step of 1.
        num_valid = torch.tensor([9, 5], device=device)
        prefill = model(tokens[:, :9], cache, num_valid)[:, :5]
        steps = [model(part, cache) for part in (tokens[:, 9:25], tokens[:, 25:])]
        return torch.cat([prefill, *steps], dim=1)

    assert_within_budget(
        prefill_and_decode(triton), prefill_and_decode(eager), prefill_and_decode(oracle)
    )


@torch.no_grad()
def test_triton_greedy_tokens_are_eagers(device):
    eager = lively(small_config(), device)
    triton = twin(eager, TRITON)
    prompts = [random_tokens(device, length).tolist() for length in (9, 4)]
    assert generate(triton, prompts, max_new_tokens=6) == generate(eager, prompts, max_new_tokens=6)


@torch.no_grad()
def test_triton_bfloat16_greedy_tokens_are_the_likeliest_within_budget(device):
    """Logits within a budget of the exact ones pick a token within twice that of the best."""
    eager = lively(small_config(), device).bfloat16()
    triton = twin(eager, TRITON)
    prompts = [random_tokens(device, length).tolist() for length in (9, 4)]
    for prompt, new in zip(prompts, generate(triton, prompts, max_new_tokens=6), strict=True):
        tokens = torch.tensor([prompt + new[:-1]], device=device)
        exact = twin(eager, dtype=torch.float64)(tokens)[0, len(prompt) - 1 :]
        error = (eager(tokens)[0, len(prompt) - 1 :].double() - exact).abs().max()
        budget = 2 * error + torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
        chosen = exact.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
        assert (exact.amax(1) - chosen).max() <= 2 * budget


def test_triton_gradients_within_budget_of_eager(device):
    """Of every op but attention, whose gradient the backend leaves to eager."""
    ops = SimpleNamespace(**{name: getattr(TRITON, name) for name in TRITON.__all__})
    ops.flash_attention = EAGER.flash_attention
    eager = lively(small_config(), device)
    tokens = random_tokens(device, 2, 18)

    def gradients(model: Llama2) -> list[Tensor]:
        model.loss(tokens).backward()
        return [parameter.grad for parameter in model.parameters()]

    models = twin(eager, ops), eager, twin(eager, dtype=torch.float64)
    for ours, theirs, oracle in zip(*map(gradients, models), strict=True):
        assert_within_budget(ours, theirs, oracle)


def test_triton_refuses_the_gradient_of_attention(device):
    model = lively(small_config(), device, TRITON)
    with pytest.raises(NotImplementedError, match=r'flash_attention: .* get_backend\("eager"\)'):
        model.loss(random_tokens(device, 1, 9)).backward()
