"""Quantised caches in the model: the very maths of a cache that holds what they stand for."""

from types import SimpleNamespace

import pytest
import torch
from small_llama import EAGER, lively, random_tokens, small_config, twin

from gqa_kernels import get_backend
from llama2 import cli
from llama2.cache.kv_cache import CACHE_DTYPES, KVCache
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.generate import Generator
from llama2.requests import Request
from llama2.serving import _Server, serve

CONFIG = small_config()
DTYPES = [dtype for dtype in CACHE_DTYPES.values() if dtype is not None]
PROMPTS = [[1, 5, 9], [2], [3, 1, 4, 1, 5, 9, 2, 6]]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def model(device):
    return lively(CONFIG, device)


def rounding(dtype) -> SimpleNamespace:
    """The eager ops, but for an append that rounds as a cache of `dtype` does and stores the values
    themselves, so that a cache of the model's dtype holds what a quantised one stands for."""

    def rope_append_kv(q, k, v, k_cache, v_cache, *others, k_scale, v_scale, **options):
        assert k_scale is None and v_scale is None
        low = [torch.zeros(cache.shape, device=q.device).to(dtype) for cache in (k_cache, v_cache)]
        scales = [torch.zeros(cache.shape[:3], device=q.device) for cache in low]
        names = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        q, k = EAGER.rope_append_kv(q, k, v, *low, *others, **names, **options)
        for cache, codes, scale in zip((k_cache, v_cache), low, scales, strict=True):
            written = (scale != 0)[..., None]
            cache.copy_(torch.where(written, codes.float() * scale[..., None], cache))
        return q, k

    return SimpleNamespace(**vars(EAGER) | {"rope_append_kv": rope_append_kv})


def poison(cache) -> None:
    """NaN wherever nothing has been written."""
    for stored in cache.stored:
        if stored is not None and stored.dtype != torch.int8:
            stored.fill_(float("nan"))


@torch.no_grad()
def test_a_contiguous_cache_is_one_of_rounded_values(dtype, model, device):
    oracle, logits = twin(model, rounding(dtype)), {}
    for name, one, kind in (("stored", model, dtype), ("rounded", oracle, torch.float32)):
        cache = KVCache(CONFIG, 2, 50, dtype=kind, device=device)
        poison(cache)
        torch.manual_seed(0)
        tokens = random_tokens(device, 2, 9)
        valid = torch.tensor([9, 4], device=device)
        logits[name] = [one(tokens, cache, valid)[1, :4]]
        for count in (1, 5, 16, 17):
            logits[name].append(one(random_tokens(device, 2, count), cache))
    for stored, rounded in zip(*logits.values(), strict=True):
        assert stored.equal(rounded)
    # What is tested is not that nothing rounds.
    exact = KVCache(CONFIG, 2, 40, dtype=torch.float32, device=device)
    torch.manual_seed(0)
    assert model(random_tokens(device, 2, 9), exact, valid)[1, :4].equal(logits["stored"][0])
    assert not model(random_tokens(device, 2, 1), exact).equal(logits["stored"][1])


@torch.no_grad()
def test_a_paged_cache_is_one_of_rounded_values(dtype, model, device):
    """Growth by more and by fewer tokens than a decode step takes, forks and shared pages."""
    oracle, logits = twin(model, rounding(dtype)), {}
    for name, one, kind in (("stored", model, dtype), ("rounded", oracle, torch.float32)):
        cache = PagedKVCache(
            CONFIG, num_pages=30, page_size=4, max_batch=3, dtype=kind, device=device
        )
        poison(cache)
        logits[name] = []

        def run(batch, name=name, one=one):
            logits[name].append(one(batch.tokens, batch))

        first = cache.admit(PROMPTS[2])
        run(cache.prefill(first))
        cache.extend(first, range(20, 40))
        run(cache.prefill(first))  # more tokens after others than decode_attention takes
        cache.extend(first, [7, 8])
        run(cache.decode([first]))
        second = cache.fork(first)
        cache.extend(second, [9])  # copies the page that both have
        cache.extend(first, [10])
        run(cache.decode([first, second]))
        third = cache.admit([*PROMPTS[2], 50, 51])  # finds two pages of the first
        run(cache.prefill(third))
        assert cache._sequences[third].pages[:2] == cache._sequences[first].pages[:2]
    for stored, rounded in zip(*logits.values(), strict=True):
        written = ~rounded.isnan()  # rows of nobody read nothing that was written
        assert stored[written].equal(rounded[written]) and written[:, -1].any()


@torch.no_grad()
def test_scales_are_of_a_head_of_a_token(dtype, model, device):
    tokens = random_tokens(device, 2, 5)
    cache, exact = (
        KVCache(CONFIG, 2, 6, dtype=kind, device=device) for kind in (dtype, torch.float32)
    )
    for one in (cache, exact):
        model(tokens, one)
    largest = 127 if dtype == torch.int8 else 448
    for codes, scale, values in zip(
        cache.stored[:2], cache.stored[2:], exact.stored[:2], strict=True
    ):
        assert scale.shape == (2, 2, 6, CONFIG.num_kv_heads) and scale.dtype == torch.float32
        assert scale.equal(values.abs().amax(-1) / largest)
        assert (scale[:, :, 5] == 0).all() and (codes.float()[:, :, 5] == 0).all()


def test_tokens_of_all_ways_to_generate(dtype, model, device):
    generator = Generator(model, cache_dtype=dtype)
    alone = [generator.generate([prompt], max_new_tokens=9)[0] for prompt in PROMPTS]
    assert generator.generate(PROMPTS, max_new_tokens=9) == alone
    cache = PagedKVCache(CONFIG, num_pages=20, page_size=4, max_batch=2, dtype=dtype, device=device)
    requests = [Request(prompt, 9) for prompt in PROMPTS]
    served = {result.index: result.tokens for result in serve(model, requests, cache=cache)}
    assert [served[index] for index in range(3)] == alone
    on_triton = Generator(twin(model, get_backend("triton")), cache_dtype=dtype)
    assert on_triton.generate(PROMPTS[:1], max_new_tokens=4) == [alone[0][:4]]


@pytest.mark.parametrize(("num_pages", "budget"), [(30, None), (7, None), (30, 3)])
def test_served_tokens_are_those_of_rounded_values(
    num_pages, budget, dtype, model, device, monkeypatch
):
    """With prompts that share pages, and with few pages: what is preempted comes back. In chunks of
    prompts, too."""
    preempted, preempt = [], _Server._preempt
    monkeypatch.setattr(
        _Server, "_preempt", lambda server: preempted.append(server) or preempt(server)
    )
    beginning = random_tokens(device, 9).tolist()
    requests = [Request([*beginning[: 9 - i], 10 + i], 14 - 3 * i) for i in range(4)]
    tokens = {}
    for name, one, kind in (
        ("stored", model, dtype),
        ("rounded", twin(model, rounding(dtype)), torch.float32),
    ):
        cache = PagedKVCache(
            CONFIG, num_pages=num_pages, page_size=4, max_batch=3, dtype=kind, device=device
        )
        poison(cache)
        served = serve(one, requests, cache=cache, prefill_budget=budget)
        tokens[name] = {result.index: result.tokens for result in served}
        assert bool(preempted) == (num_pages == 7)
        preempted.clear()
    assert tokens["stored"] == tokens["rounded"]


def test_the_option(dtype, monkeypatch, capsys, tmp_path):
    name = next(name for name, kind in CACHE_DTYPES.items() if kind is dtype)
    made = []
    zeros = KVCache.__init__
    monkeypatch.setattr(
        KVCache, "__init__", lambda *args, **k: made.append(k["dtype"]) or zeros(*args, **k)
    )
    paged = PagedKVCache.__init__
    monkeypatch.setattr(
        PagedKVCache, "__init__", lambda *args, **k: made.append(k["dtype"]) or paged(*args, **k)
    )
    options = ("--kv-cache-dtype", name, "--max-new-tokens", "3", "--device", "cpu")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def"}\n', encoding="utf-8")
    files = ("--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"))
    for command in (("generate", "--prompt", "def"), ("serve-offline", *files)):
        assert cli.main([command[0], *options, "--backend", "eager", *command[1:]]) == 0
    assert made == [dtype, dtype]
    assert capsys.readouterr().out.startswith("def")


def test_another_dtype_is_refused(dtype, model):
    other = torch.float8_e5m2 if dtype == torch.float8_e4m3fn else torch.float16
    expected = r"torch\.float32, float8_e4m3fn or int8; got torch\.float"
    with pytest.raises(TypeError, match=f"^cache: expected the model's dtype {expected}"):
        Generator(model, cache_dtype=other).generate(PROMPTS, max_new_tokens=3)
