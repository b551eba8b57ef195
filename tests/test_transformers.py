"""Transformers' models with attn_implementation="gqa_kernels", in the ways that models are run."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from small_llama import assert_within_budget
from tiny_transformers import double, make, rows

from gqa_kernels.integrations import transformers as ours

NAME = ours.ATTENTION_NAME
PADDINGS = ("none", "left", "right", "packed")
FLOATS = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
ours.register()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def on_kernels(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation(NAME)
    return model


def cached(model, cache):
    if cache is None:
        return {"use_cache": False}
    if cache == "dynamic":
        return {"past_key_values": transformers.DynamicCache(config=model.config)}
    return {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=32)}


@FLOATS
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", ("Llama", "Mistral", "Qwen3", "Gemma2"))
def test_logits_without_a_cache(kind, padding, dtype, device):
    model = make(kind).to(device)
    arguments, real = rows(padding)
    arguments = {name: value.to(device) for name, value in arguments.items()}
    oracle = double(model)(lambda m: m(**arguments, use_cache=False).logits[real])
    model = model.to(dtype)
    eager = model(**arguments, use_cache=False).logits[real]
    result = on_kernels(model)(**arguments, use_cache=False).logits[real]
    assert_within_budget(result, eager, oracle)


@FLOATS
@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("padding", ("none", "left", "right"))
@pytest.mark.parametrize("kind", ("Llama", "Mistral"))
def test_logits_of_a_prefill_and_two_steps(kind, padding, cache, dtype, device):
    """The second step brings three tokens at once."""
    model = make(kind).to(device)

    def run(model):
        arguments, real = rows(padding)
        arguments = {name: value.to(device) for name, value in arguments.items()}
        past = cached(model, cache)
        results = [model(**arguments, **past).logits[real]]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        for count in (1, 3):
            tokens = torch.arange(1, 1 + 3 * count, device=device).view(3, count)
            step = {"input_ids": tokens}
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(3, count)), 1)
                positions = positions[:, -1:] + 1 + torch.arange(count, device=device)
                step |= {"attention_mask": mask, "position_ids": positions}
            results.append(model(**step, **past).logits.flatten(0, 1))
        return torch.cat(results)

    with torch.no_grad():
        oracle = double(model)(run)
        model = model.to(dtype)
        assert_within_budget(run(on_kernels(model)), run(model), oracle)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("padding", ("none", "left", "right"))
@pytest.mark.parametrize("kind", ("Llama", "Mistral", "Gemma2"))
def test_greedy_tokens(kind, padding, cache, device):
    model = make(kind).to(device)
    arguments, _ = rows(padding)
    arguments.pop("position_ids", None)
    arguments = {name: value.to(device) for name, value in arguments.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(**arguments, **options)
    assert torch.equal(on_kernels(model).generate(**arguments, **options), expected)


@pytest.mark.parametrize("checkpointing", (None, True, False), ids=("none", "reentrant", "not"))
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients(padding, checkpointing, device):
    model = make("Llama").to(device).train()
    arguments, real = rows(padding)
    arguments = {name: value.to(device) for name, value in arguments.items()}
    # Nothing real is predicted from padding: what stands there sees no key and means nothing.
    predicted = real & real.roll(1, dims=1)
    labels = arguments["input_ids"].masked_fill(~predicted.to(device), -100)

    def gradient(model):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(**arguments, labels=labels, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    oracle, result = double(model)(gradient), gradient(on_kernels(model))
    assert_within_budget(result, gradient(model), oracle)


def test_packed_rows_with_bounds(device):
    """As data collators hand them over: positions and cu_seq_lens, and no mask."""
    arguments, _ = rows("packed")
    arguments["cu_seq_lens_q"] = arguments["cu_seq_lens_k"] = torch.tensor([0, 3, 6, 9]).int()
    arguments |= {"max_length_q": 3, "max_length_k": 3}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    for kind in ("Llama", "Mistral"):
        model = make(kind, **({"sliding_window": 2} if kind == "Mistral" else {})).to(device)
        oracle = double(model)(lambda m: m(**arguments, use_cache=False).logits)
        eager = model(**arguments, use_cache=False).logits
        result = on_kernels(model)(**arguments, use_cache=False).logits
        assert_within_budget(result, eager, oracle)
        without_positions = {k: v for k, v in arguments.items() if k != "position_ids"}
        out = on_kernels(model)(**without_positions, use_cache=False).logits
        assert not torch.equal(out, result)  # positions turn the keys, the bounds hide them
