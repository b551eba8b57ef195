"""The model on PyTorch's fused functions against the same model on the eager ops."""

import pytest
import torch
from budget import assert_network
from small_llama import (
    gradients,
    lively,
    loss_alone,
    packed,
    prefill_and_decode,
    random_documents,
    random_tokens,
    right_padded,
    small_config,
    twin,
)
from torch import Tensor

from gqa_kernels import get_backend
from llama2 import Generator, Llama2, PagedKVCache, Request, checkpoint, serve
from llama2.checkpoint import SHIPPED

TORCH = get_backend("torch")
PROMPTS = [[1, *range(20, 20 + length)] for length in (16, 3, 40, 3, 9)]


@pytest.fixture(scope="module")
def shipped(device) -> dict[str, Llama2]:
    settings = {"dtype": torch.float32, "device": device}
    return {
        name: checkpoint.load(SHIPPED, get_backend(name), **settings) for name in ("eager", "torch")
    }


@pytest.mark.parametrize("cache_dtype", (None, torch.int8), ids=str)
def test_generated_tokens_are_eagers(cache_dtype, shipped):
    """A ragged batch with rows that stop early."""
    eager, ours = (
        Generator(model, cache_dtype=cache_dtype).generate(
            PROMPTS, max_new_tokens=24, stop_ids=range(500, 620)
        )
        for model in shipped.values()
    )
    assert eager == ours and len({len(tokens) for tokens in ours}) > 1


@pytest.mark.parametrize("cache_dtype", (torch.float32, torch.int8), ids=str)
def test_served_tokens_are_eagers(cache_dtype, shipped, device):
    """With shared prompts, more requests than rows, and too few pages for all."""

    def served(model: Llama2) -> list[list[int]]:
        size = {"num_pages": 16, "page_size": 8, "max_batch": 3}
        cache = PagedKVCache(model.cache_config, **size, dtype=cache_dtype, device=device)
        requests = [Request(prompt, 6 + 5 * i) for i, prompt in enumerate(PROMPTS)]
        results = sorted(serve(model, requests, cache=cache), key=lambda result: result.index)
        return [result.tokens for result in results]

    assert served(shipped["eager"]) == served(shipped["torch"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@torch.no_grad()
def test_logits_within_budget(dtype, device):
    eager = lively(small_config(), device).to(dtype)
    tokens = random_tokens(device, 2, 45)

    assert_network(
        prefill_and_decode(twin(eager, TORCH), tokens),
        eager,
        lambda eager: prefill_and_decode(eager, tokens),
        lambda eager: prefill_and_decode(twin(eager, dtype=torch.float64), tokens),
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", ("packed", "padded"))
def test_gradients_within_budget(form, dtype, device):
    eager = lively(small_config(), device).to(dtype)
    documents = random_documents(device)
    if form == "packed":
        batch = dict(zip(("tokens", "cu_seqlens"), packed(documents, after=3), strict=True))
    else:
        batch = dict(zip(("tokens", "num_valid"), right_padded(documents), strict=True))
    torch_model = twin(eager, TORCH)
    ours = gradients(torch_model, torch_model.loss(**batch))

    def alone(model: Llama2) -> dict[str, Tensor]:
        return gradients(model, loss_alone(model, documents))

    assert_network(ours, eager, alone, lambda eager: alone(twin(eager, dtype=torch.float64)))


def test_equal_rows_have_the_same_bits_in_any_batch(device):
    """This holds for the ops but not for the matrix products around them, and for `swiglu` only if
    the width is a multiple of 32, as in real models."""
    q, k = torch.randn(4, 30, 4, 16, device=device), torch.randn(4, 30, 2, 16, device=device)
    x, weight = torch.randn(7, 96, device=device), torch.rand(96, device=device)
    together = TORCH.flash_attention(q, k, k, causal=True)
    alone = [TORCH.flash_attention(q[i, None], k[i, None], k[i, None], causal=True) for i in (0, 3)]
    assert torch.equal(together[[0, 3]], torch.cat(alone))
    assert torch.equal(TORCH.rms_norm(x, weight)[3:4], TORCH.rms_norm(x[3:4], weight))
    assert torch.equal(TORCH.swiglu(x, 2 * x)[3:4], TORCH.swiglu(x[3:4], 2 * x[3:4]))
