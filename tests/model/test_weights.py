"""What outlives a call follows the weights: prefixes in a cache, a Generator's cache and graphs."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from small_llama import EAGER, lively, small_config

from gqa_kernels import get_backend
from llama2 import Generator, Llama2, PagedKVCache, Request, serve
from llama2.decoding.weights import fingerprint
from llama2.generate import generate

PROMPT = list(range(20, 50))
PROMPTS = [[1, 5, 9]]


@pytest.fixture
def model(device):
    return lively(small_config(), device)


def make_cache(model) -> PagedKVCache:
    weight = model.lm_head.weight
    settings = {"dtype": weight.dtype, "device": weight.device}
    return PagedKVCache(model.cache_config, num_pages=30, page_size=4, max_batch=2, **settings)


def served(model, cache) -> list[int]:
    (result,) = serve(model, [Request(PROMPT, 8)], cache=cache)
    return result.tokens


def _another(model):
    return lively(model.config, model.lm_head.weight.device)


@torch.no_grad()
def _written(model):
    model.layers[0].self_attn.k_proj.weight.neg_()
    return model


def _written_through_data(model):
    model.layers[0].self_attn.v_proj.weight.data.neg_()
    return model


def _after_a_fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    model.loss(torch.tensor([PROMPT], device=model.lm_head.weight.device)).backward()
    optimizer.step()
    return model


def _swapped_layers(model):
    model.layers = torch.nn.ModuleList(reversed(model.layers))
    return model


def _other_pairs(model):
    other = Llama2(replace(model.config, rope_interleaved=True), EAGER)
    other.load_state_dict(model.state_dict())
    return other.to(model.lm_head.weight.device)


CHANGES = (
    _another,
    _written,
    _written_through_data,
    _after_a_fused_step,
    _swapped_layers,
    _other_pairs,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_prefixes_of_other_weights_are_not_found(change, model):
    cache = make_cache(model)
    before = served(model, cache)
    changed = change(model)
    expected = served(changed, make_cache(changed))
    assert served(changed, cache) == expected != before


def test_prefixes_of_the_same_weights_are_found(model):
    """Of a copy too: what counts is the values."""
    cache = make_cache(model)
    before = served(model, cache)
    prefilled = []
    for same in (model, copy.deepcopy(model)):
        same.embed_tokens.register_forward_hook(lambda _, inputs, __: prefilled.append(inputs[0]))
        assert served(same, cache) == before
    assert max(x.shape[1] for x in prefilled) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(), (5,), (4, 8), (3, 7), (2, 3, 5)], ids=str)
def test_a_fingerprint_sees_every_change(shape, dtype, device):
    x = torch.randn(shape, device=device).mul(50).to(dtype)
    module = torch.nn.Module()
    module.register_buffer("x", x)
    before = fingerprint(module)
    assert torch.equal(before, fingerprint(copy.deepcopy(module)))
    bits = x.reshape(-1).view(torch.uint8)
    for index in range(len(bits)):
        bits[index] ^= 1
        assert not torch.equal(before, fingerprint(module))
        bits[index] ^= 1
    if x.dim():
        module.x = x.flip(0)
        assert not torch.equal(before, fingerprint(module))


def test_a_generator_follows_layers_that_are_shared(model):
    generator = Generator(model)
    layers = list(model.layers)
    for order in ([0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 1]):
        model.layers = torch.nn.ModuleList(layers[index] for index in order)
        got = generator.generate(PROMPTS, max_new_tokens=8)
        assert got == generate(model, PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_generator_has_caches_of_its_own(how, model):
    settings = {"vocab_size": 50, "cache_dtype": torch.int8, "capture": False}
    generator = Generator(model, **settings)
    running = generator.stream(PROMPTS, max_new_tokens=8)
    first = next(running)
    copied = how(generator)
    expected = Generator(model, **settings).generate(PROMPTS, max_new_tokens=8)
    assert copied.generate(PROMPTS, max_new_tokens=8) == expected
    assert [token for _, token in (first, *running)] == expected[0]


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_autocast_changes_no_token(backend, device):
    model = lively(small_config(), device, get_backend(backend))
    expected = generate(model, PROMPTS, max_new_tokens=4)
    with torch.autocast(device.type, torch.bfloat16):
        assert generate(model, PROMPTS, max_new_tokens=4) == expected
        requests = [Request(PROMPTS[0], 4)]
        (result,) = serve(model, requests, cache=make_cache(model))
        assert result.tokens == expected[0]
        assert torch.is_autocast_enabled(device.type)


def test_a_model_of_several_dtypes_is_left_to_autocast(device):
    model = lively(small_config(), device).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.to(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        assert len(generate(model, PROMPTS, max_new_tokens=4)[0]) == 4


def test_a_config_beyond_the_rotary_table_is_named(model):
    model.config = replace(model.config, max_seq_len=256)
    message = r"config: expected a max_seq_len of at most 128, the length of the rotary table"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1] * 100], max_new_tokens=60)
    with pytest.raises(ValueError, match=message):
        served(model, make_cache(model))
    model.config = replace(model.config, max_seq_len=32)
    assert len(generate(model, PROMPTS, max_new_tokens=29)[0]) == 29


def test_a_rotary_table_without_memory_is_named(model):
    with torch.device("meta"):
        empty = Llama2(model.config, EAGER)
    for name, value in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(empty.get_submodule(owner), attribute, value)
    with pytest.raises(ValueError, match=r"rope: expected its table on .*`model\.rope\.move"):
        generate(empty, PROMPTS, max_new_tokens=4)
    empty.rope.move(model.lm_head.weight.device)
    expected = generate(model, PROMPTS, max_new_tokens=4)
    assert generate(empty, PROMPTS, max_new_tokens=4) == expected
