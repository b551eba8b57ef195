"""Generation with captured steps: the tokens of steps as they are, whatever ends when.

On the CPU a recording stands in for a CUDA graph (`recorded_graph.py`).
"""

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import recorded_graph
import torch
from small_llama import lively, small_config

from gqa_kernels import get_backend
from llama2 import generate, serving
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.decoding import decode_batch, graphs
from llama2.generate import Generator, rounded_batch
from llama2.requests import Request
from llama2.serving import serve

PROMPTS = [[1, 5, 9], [2], [3, 1, 4, 1, 5, 9, 2, 6], [7, 7], [8]]
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5}


@dataclass
class Graphs:
    """Counts, and on the CPU makes, what is captured."""

    num_recorded: int = 0
    replays: list = field(default_factory=list)


@pytest.fixture
def captures(device, monkeypatch) -> Graphs:
    made = Graphs()
    real = graphs.record if device.type == "cuda" else recorded_graph.record

    def record(call):
        made.num_recorded += 1
        replay = real(call)
        return lambda: (made.replays.append(made.num_recorded), replay())

    monkeypatch.setattr(graphs, "record", record)
    if device.type != "cuda":
        for module in (graphs, generate):
            monkeypatch.setattr(module, "on_gpu", lambda _: True)
    return made


@pytest.fixture
def model(device):
    return lively(small_config(), device)


def test_kernels_are_captured_too(device, captures):
    model = lively(small_config(), device, get_backend("triton"))
    plain = Generator(model, capture=False).generate(PROMPTS[:2], max_new_tokens=4)
    assert Generator(model).generate(PROMPTS[:2], max_new_tokens=4) == plain
    assert captures.num_recorded == 1 and len(captures.replays) == 2
    cache = PagedKVCache(
        model.cache_config, num_pages=4, page_size=4, max_batch=2,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    requests = [Request(prompt, 4) for prompt in PROMPTS[:2]]
    results = {result.index: result.tokens for result in serve(model, requests, cache=cache)}
    assert [results[0], results[1]] == plain
    assert captures.num_recorded == 3


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_step_as_it_is(model, settings, captures):
    settings = {"max_new_tokens": 12, **settings}
    plain = Generator(model, capture=False).generate(PROMPTS, **settings)
    assert captures.num_recorded == 0
    assert Generator(model).generate(PROMPTS, **settings) == plain
    assert captures.num_recorded == 1 and len(captures.replays) == 10


def test_sequences_end_apart(model, captures):
    whole = Generator(model, capture=False).generate(PROMPTS, max_new_tokens=16)
    stops = {whole[0][2], whole[1][5], whole[2][9]}
    cut = [
        row[: min((row.index(stop) for stop in stops if stop in row), default=15) + 1]
        for row in whole
    ]
    assert len(set(map(len, cut))) > 2, "the sequences must end apart"
    assert Generator(model).generate(PROMPTS, max_new_tokens=16, stop_ids=stops) == cut
    assert captures.replays


def test_a_batch_size_is_captured_once_per_kind_of_sampling(model, captures):
    generator = Generator(model)
    stops = [tokens[2] for tokens in generator.generate(PROMPTS, max_new_tokens=6)]

    def both(prompts, **settings):
        got = generator.generate(prompts, max_new_tokens=6, **settings)
        plain = Generator(model, capture=False)
        assert got == plain.generate(prompts, max_new_tokens=6, **settings)
        return captures.num_recorded

    assert both(PROMPTS) == 1  # 5 prompts in 8 rows; the cache grows no more
    assert both(PROMPTS[:1]) == 2
    assert both(PROMPTS, stop_ids=stops) == 2
    assert both(PROMPTS) == 2  # the stop tokens are forgotten
    assert both([[1] * 40] * 7) == 2
    assert both(PROMPTS, **SAMPLED) == 3
    assert both(PROMPTS, temperature=0.1, top_p=0.5, seed=1) == 3
    assert both(PROMPTS[:1]) == 3


def test_a_larger_cache_and_moved_parameters_begin_anew(model, captures):
    generator, plain = Generator(model), Generator(model, capture=False)
    for prompts in (PROMPTS[:2], PROMPTS, [[1] * 30] * 9):
        count = captures.num_recorded
        got = generator.generate(prompts, max_new_tokens=5)
        assert got == plain.generate(prompts, max_new_tokens=5)
        assert captures.num_recorded == count + 1
    with torch.no_grad():  # where they are: the same graph computes with them
        model.lm_head.weight.neg_()
    got = generator.generate([[1] * 30] * 9, max_new_tokens=5)
    assert got == plain.generate([[1] * 30] * 9, max_new_tokens=5)
    assert captures.num_recorded == 3
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    got = generator.generate([[1] * 30] * 9, max_new_tokens=5)
    assert got == plain.generate([[1] * 30] * 9, max_new_tokens=5)
    assert captures.num_recorded == 4


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_ahead_changes_no_token(model, ahead, monkeypatch, captures):
    expected = Generator(model, capture=False).generate(PROMPTS, max_new_tokens=9)
    begin = decode_batch.DecodeBatch.__init__

    def ahead_by(batch, *args, **kwargs):
        begin(batch, *args, **kwargs)
        batch._ahead = ahead

    monkeypatch.setattr(decode_batch.DecodeBatch, "__init__", ahead_by)
    for count in (1, 2, 3, 9):
        got = Generator(model).generate(PROMPTS, max_new_tokens=count)
        assert got == [tokens[:count] for tokens in expected]


def test_a_stopped_row_reads_and_writes_nothing(model, monkeypatch):
    whole = generate.generate(model, PROMPTS, max_new_tokens=8)
    seen = []
    attention = model.layers[0].self_attn
    decode = attention.decode_attention
    attention.decode_attention = lambda q, k, v, seq_lens, **others: (
        seen.append(seq_lens.tolist()) or decode(q, k, v, seq_lens, **others)
    )
    appended = []
    append = attention.rope_append_kv
    attention.rope_append_kv = lambda *args, **others: (
        appended.append(args[8][:, -1].tolist()) or append(*args, **others)
    )
    stop = whole[0][3]
    ends = [row.index(stop) if stop in row else 99 for row in whole]
    generate.generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    for step, (lengths, slots) in enumerate(zip(seen, appended[1:], strict=True)):
        for row, end in enumerate(ends):
            runs = step < end
            assert lengths[row] == (len(PROMPTS[row]) + step + 1 if runs else 0)
            assert (slots[row] >= 0) == runs
    assert 0 in seen[-1] and max(seen[-1]) > 0


def test_logits_that_are_not_finite_are_reported_by_a_replay(model, captures):
    generator = Generator(model)
    tokens = generator.generate([[1, 2]], max_new_tokens=6)[0]
    late = next(token for token in tokens[3:] if token not in [*tokens[:3], 1, 2])
    step = tokens.index(late) + 1
    with torch.no_grad():
        model.embed_tokens.weight[late] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"prompts\[0\] at new token {step}"):
        generator.generate([[1, 2]], max_new_tokens=9)


def test_a_generator_grows_as_it_is_asked_to(model):
    generator = Generator(model)
    for prompts, count in ((PROMPTS[:2], 3), ([[1] * 40], 3), (PROMPTS, 30), (PROMPTS[:1], 4)):
        got = generator.generate(prompts, max_new_tokens=count)
        assert got == generate.generate(model, prompts, max_new_tokens=count)


def test_what_grows_frees_what_it_had(model, captures):
    """At once: two caches may be more than there is memory for."""
    generator, held = Generator(model), []
    gc.disable()
    try:
        for length in (3, 40):
            generator.generate([[1] * length] * length, max_new_tokens=4)
            assert all(batch() is None for batch in held)
            held += map(weakref.ref, generator._batches.values())
    finally:
        gc.enable()


def test_hooks_are_not_passed_over(model, captures):
    calls = []
    model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    Generator(model).generate(PROMPTS, max_new_tokens=5)
    assert len(calls) == 5 and captures.num_recorded == 0
    with pytest.raises(ValueError, match=r"^capture: .* without forward hooks; got 'layers\.1'"):
        Generator(model, capture=True)


def test_no_capture_without_a_gpu(model, device):
    if device.type == "cuda":
        model = model.to("cpu")
    with pytest.raises(ValueError, match=r"^capture: expected a model on a GPU; got one on cpu"):
        Generator(model, capture=True)


def test_one_call_at_a_time_has_the_cache(model):
    generator = Generator(model)
    first = generator.stream(PROMPTS, max_new_tokens=5)
    assert next(first)[0] == 0
    whole = generator.generate(PROMPTS[:1], max_new_tokens=5)
    with pytest.raises(RuntimeError, match=r"^stream: expected the latest call"):
        next(first)
    assert whole == generate.generate(model, PROMPTS[:1], max_new_tokens=5)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("max_batch", "budget"), [(1, 512), (3, 512), (5, 512), (3, 2)])
def test_continuous_batching_gives_the_same_tokens(
    model, max_batch, budget, ahead, device, captures, monkeypatch
):
    monkeypatch.setattr(serving, "on_gpu", lambda _: ahead)
    cache = PagedKVCache(
        model.cache_config, num_pages=12, page_size=4, max_batch=max_batch,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    requests = [
        Request(prompt, 3 + 2 * index, **(SAMPLED if index % 2 else {}))
        for index, prompt in enumerate(PROMPTS)
    ]
    results = {}
    for result in serve(model, requests, cache=cache, prefill_budget=budget):
        results[result.index] = result.tokens
    assert captures.num_recorded == 3  # decoding, and drawing in both kinds
    for index, request in enumerate(requests):
        settings = SAMPLED if index % 2 else {}
        alone = generate.generate(
            model, [request.prompt], max_new_tokens=request.max_new_tokens, **settings
        )
        assert results[index] == alone[0]


@pytest.mark.parametrize(
    ("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (33, 40)]
)
def test_rounded_batch(batch, rows):
    assert rounded_batch(batch) == rows
