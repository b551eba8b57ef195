"""Speculative decoding: the tokens of decoding without it, in fewer steps.

Models compute in float64, so that another order of sums changes no token.
"""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import recorded_graph
import torch
from small_llama import EAGER, lively, small_config, twin

from gqa_kernels import get_backend
from llama2 import DraftModel, Generator, KVCache, PromptLookup, generate
from llama2.decoding import graphs
from llama2.decoding.drafters import LookupDrafter, Rows
from llama2.generate import stream

PROMPTS = [[1, 5, 9, 1, 5], [2], [3, 1, 4, 1, 5, 9, 2, 6, 3, 1]]
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
TORCH = get_backend("torch")


@pytest.fixture
def model(device):
    return twin(lively(small_config(), device), TORCH, torch.float64)


def noisy(model, noise: float):
    """A draft model that agrees with the model on some tokens."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * weight.std() * torch.randn_like(weight)
    return draft


def opposed(model):
    """A draft model whose likeliest token is the model's unlikeliest."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight.neg_()
    return draft


def drafting(name: str, model) -> PromptLookup | DraftModel:
    """Drafters that are right, sometimes right, and never."""
    if name == "lookup":
        return PromptLookup(num_tokens=5, max_ngram=2)
    return {
        "same": lambda: DraftModel(model, 3),
        "noisy": lambda: DraftModel(noisy(model, 0.15), 4),
        "wrong": lambda: DraftModel(opposed(model), 1),
    }[name]()


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["lookup", "same", "noisy", "wrong"])
def test_tokens_are_those_without(name, settings, model):
    settings = {"max_new_tokens": 25, **settings}
    expected = Generator(model).generate(PROMPTS, **settings)
    generator = Generator(model, speculation=drafting(name, model))
    assert generator.generate(PROMPTS, **settings) == expected
    gained = generator.statistics.tokens_per_step
    assert generator.statistics.num_new_tokens == len(PROMPTS) * 24
    if name == "same":
        assert generator.statistics.num_steps == len(PROMPTS) * math.ceil(24 / 4)
    elif name == "wrong" and not settings.get("temperature"):
        assert gained == 1
    elif name == "noisy":
        assert 1 < gained < 4, "rows must accept different numbers of tokens"
    # The same buffers again, for fewer rows, of which the first ones were longer before.
    assert generator.generate(PROMPTS[1:2] + PROMPTS[:1], **settings | {"max_new_tokens": 6}) == [
        tokens[:6] for tokens in Generator(model).generate(PROMPTS[1:2] + PROMPTS[:1], **settings)
    ]


def test_the_functions_take_it_too(model):
    settings = {"max_new_tokens": 9, "speculation": DraftModel(model)}
    expected = generate.generate(model, PROMPTS, max_new_tokens=9)
    assert generate.generate(model, PROMPTS, **settings) == expected
    found = [[] for _ in PROMPTS]
    for index, token in stream(model, PROMPTS, **settings):
        found[index].append(token)
    assert found == expected


def looked_up(tokens: list[int], num_tokens: int, max_ngram: int) -> list[int]:
    """The specification of `PromptLookup`, one sequence at a time."""

    def num_equal(place: int) -> int:
        for k in range(min(max_ngram, len(tokens))):
            if place - k < 0 or tokens[place - k] != tokens[-1 - k]:
                return k
        return max_ngram

    place = max(range(len(tokens) - 1), key=lambda place: (num_equal(place), place))
    continued = list(tokens)
    for i in range(num_tokens):
        continued.append(continued[place + 1 + i])
    return continued[len(tokens) :]


@pytest.mark.parametrize("max_ngram", [1, 3, 10**30])
def test_lookup_takes_the_latest_of_the_longest(max_ngram, device):
    lengths = torch.tensor([2, 3, 9, 20, 21], dtype=torch.int32, device=device)
    tokens = torch.randint(3, (5, 24), device=device)
    running = torch.tensor([True] * 5, device=device)
    rows = Rows(tokens, lengths - 1, running, *[torch.zeros(5, device=device)] * 3)
    drafts = LookupDrafter(7, max_ngram).draft(rows, greedy=True)
    for row, length in enumerate(lengths.tolist()):
        assert drafts[row].tolist() == looked_up(tokens[row, :length].tolist(), 7, max_ngram)


def test_lookup_gains_where_a_text_repeats_itself(model):
    """A model without attention of any weight continues a token by the same successor always."""
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
    generator = Generator(model, speculation=PromptLookup(15))
    new = generator.generate([[1]], max_new_tokens=110)[0]
    period = next(n for n in range(1, 50) if new[-n:] == new[-2 * n : -n])
    assert generator.statistics.num_steps <= 110 - period


def test_sequences_end_apart_and_within_accepted_tokens(model):
    whole = Generator(model).generate(PROMPTS, max_new_tokens=30)
    stops = {whole[0][2], whole[1][8], whole[2][17]}
    expected = Generator(model).generate(PROMPTS, max_new_tokens=30, stop_ids=stops)
    assert len(set(map(len, expected))) > 1, "the sequences must end apart"
    for speculation in (DraftModel(model, 4), drafting("noisy", model), PromptLookup()):
        generator = Generator(model, speculation=speculation)
        assert generator.generate(PROMPTS, max_new_tokens=30, stop_ids=stops) == expected
        # A step counts for the rows that take part in it.
        assert generator.statistics.num_new_tokens == sum(map(len, expected)) - len(PROMPTS)


def test_the_whole_context_can_be_used(device):
    """Guesses lie beyond the rotary table, where positions give NaN, and beyond the sequence."""
    model = twin(lively(small_config(), device), EAGER, torch.float64)
    prompts = [[1] * 100, [2, 3]]
    expected = Generator(model).generate(prompts, max_new_tokens=28)
    for speculation in (PromptLookup(15), DraftModel(noisy(model, 0.15), 15)):
        generator = Generator(model, speculation=speculation)
        assert generator.generate(prompts, max_new_tokens=28) == expected


def test_a_stopped_row_reads_and_writes_nothing(model):
    attention, seen = model.layers[0].self_attn, []
    append, decode = attention.rope_append_kv, attention.decode_attention
    attention.rope_append_kv = lambda *args, **others: (
        seen.append([args[8].amax(1).tolist()]) or append(*args, **others)
    )
    attention.decode_attention = lambda q, k, v, seq_lens, **others: (
        seen[-1].append(seq_lens.tolist()) or decode(q, k, v, seq_lens, **others)
    )
    stops = Generator(model).generate(PROMPTS, max_new_tokens=1)[1]
    seen.clear()
    generator = Generator(model, speculation=PromptLookup(3))
    new = generator.generate(PROMPTS, max_new_tokens=4, stop_ids=stops)
    assert len(new[1]) == 1 and len(new[0]) == 4
    for slots, seq_lens in seen[1:]:
        assert slots[1] == -1 and seq_lens[1] == 0 and max(slots) >= 0 and max(seq_lens) > 0
    (batch,) = generator._batches.values()
    with torch.inference_mode():
        steps = [*batch.run(PROMPTS, torch.zeros(3, 4), 0.0, 1.0, list(stops))]
    assert steps[1][0] and not any(new[1] for new in steps[1:])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_new_tokens(count, model):
    generator = Generator(model, speculation=DraftModel(model, 15))
    expected = Generator(model).generate(PROMPTS, max_new_tokens=count)
    assert generator.generate(PROMPTS, max_new_tokens=count) == expected
    steps = len(PROMPTS) * (count == 2)
    assert (generator.statistics.num_steps, generator.statistics.num_new_tokens) == (steps, steps)
    assert count == 2 or math.isnan(generator.statistics.tokens_per_step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_what_a_cache_held_does_not_matter(dtype, model, monkeypatch):
    """In an 8-bit cache a rejected token's scales are overwritten with its keys and values."""
    zeros = KVCache.__init__

    def poisoned(cache, *args, **settings):
        zeros(cache, *args, **settings)
        for stored in cache.stored:
            if stored is not None and stored.dtype != torch.int8:
                stored.fill_(float("nan"))

    monkeypatch.setattr(KVCache, "__init__", poisoned)
    expected = Generator(model, cache_dtype=dtype).generate(PROMPTS, max_new_tokens=16)
    for name in ("lookup", "noisy"):
        generator = Generator(model, cache_dtype=dtype, speculation=drafting(name, model))
        assert generator.generate(PROMPTS, max_new_tokens=16) == expected


def test_on_the_kernels(device):
    config = replace(small_config(num_q_heads=2, num_kv_heads=1), num_layers=1)
    model = lively(config, device, get_backend("triton"))
    expected = Generator(model).generate(PROMPTS[:2], max_new_tokens=5)
    generator = Generator(model, speculation=DraftModel(noisy(model, 0.1), 2))
    assert generator.generate(PROMPTS[:2], max_new_tokens=5) == expected
    assert generator.statistics.tokens_per_step > 1


@pytest.mark.parametrize("name", ["lookup", "noisy"])
def test_steps_are_captured(name, device, monkeypatch):
    """As `test_captured_generation.py` for decode steps, with one step ahead of the host."""
    model = twin(lively(small_config(), device), EAGER, torch.float64)
    recorded, real = [], graphs.record if device.type == "cuda" else recorded_graph.record
    monkeypatch.setattr(graphs, "record", lambda call: recorded.append(call) or real(call))
    plain, speculation = Generator(model, capture=False), drafting(name, model)
    expected = [plain.generate(PROMPTS, max_new_tokens=8, **x) for x in ({}, SAMPLED)]
    stops = {expected[0][0][4]}
    cut = plain.generate(PROMPTS, max_new_tokens=8, stop_ids=stops)
    if device.type != "cuda":
        for module in (graphs, generate):
            monkeypatch.setattr(module, "on_gpu", lambda _: True)
    generator = Generator(model, speculation=speculation)
    assert generator.generate(PROMPTS, max_new_tokens=8) == expected[0]
    generator._batches[4]._ahead = 1
    assert generator.generate(PROMPTS, max_new_tokens=8, **SAMPLED) == expected[1]
    assert generator.generate(PROMPTS, max_new_tokens=8, stop_ids=stops) == cut
    assert len(recorded) == 2  # greedy and sampled
    with torch.no_grad():  # a moved draft model needs new graphs
        if name == "noisy":
            draft = speculation.model
            draft.lm_head.weight = torch.nn.Parameter(-draft.lm_head.weight)
            assert generator.generate(PROMPTS, max_new_tokens=8) == expected[0]
            assert len(recorded) == 3


@pytest.mark.parametrize("ahead", [0, 1])
def test_no_step_is_enqueued_that_gives_nothing(ahead, model):
    generator = Generator(model, speculation=DraftModel(model, 1))
    calls = []
    model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for count in (2, 6, 7):
        generator.generate(PROMPTS[:1], max_new_tokens=count)
        generator._batches[1]._ahead = ahead
        calls.clear()
        generator.generate(PROMPTS[:1], max_new_tokens=count)
        # Two prefills, and steps of two calls: one that drafts and one that verifies.
        steps = generator.statistics.num_steps
        assert 2 + 2 * steps <= len(calls) <= 2 + 2 * (steps + ahead * (count > 2))


def test_logits_that_are_not_finite_are_reported(model):
    tokens = Generator(model).generate([[1, 2]], max_new_tokens=9)[0]
    late = next(token for token in tokens[3:] if token not in [*tokens[:3], 1, 2])
    step = tokens.index(late) + 1
    draft = copy.deepcopy(model)
    with torch.no_grad():
        model.embed_tokens.weight[late] = float("nan")
    for speculation in (DraftModel(draft, 3), PromptLookup()):
        generator = Generator(model, speculation=speculation)
        with pytest.raises(FloatingPointError, match=rf"prompts\[0\] at new token {step} in"):
            generator.generate([[1, 2]], max_new_tokens=9)


def test_logits_after_a_prompt_that_are_not_finite_end_it(model):
    calls = []

    def broken_once(_, __, logits):
        calls.append(logits)
        return logits * math.nan if len(calls) == 1 else logits

    model.lm_head.register_forward_hook(broken_once)
    with pytest.raises(FloatingPointError, match=r"prompts\[0\] at new token 0 in"):
        Generator(model, speculation=PromptLookup()).generate([[1, 2]], max_new_tokens=9)


def test_a_guess_without_finite_values_ends_nothing(model):
    """It stands in the same tile of keys as tokens before it, which see it with weight 0."""
    expected = Generator(model).generate(PROMPTS, max_new_tokens=12)
    used = {0}.union(*expected, *PROMPTS)  # 0 pads prompts
    unused = min(set(range(97)) - used)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        model.embed_tokens.weight[unused] = float("nan")
        draft.lm_head.weight.zero_()[unused] = 1  # in half of the steps the likeliest token
    generator = Generator(model, speculation=DraftModel(draft, 3))
    assert generator.generate(PROMPTS, max_new_tokens=12) == expected
    assert 0.5 <= generator.statistics.tokens_per_step < 1


def test_a_draft_model_without_finite_logits_gains_nothing(model):
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight.fill_(float("nan"))
    generator = Generator(model, speculation=DraftModel(draft))
    for settings in ({}, SAMPLED):
        expected = Generator(model).generate(PROMPTS, max_new_tokens=6, **settings)
        assert generator.generate(PROMPTS, max_new_tokens=6, **settings) == expected
        assert generator.statistics.tokens_per_step == 1


def test_copies_speculate_too(model):
    generator = Generator(model, speculation=DraftModel(model, 3), vocab_size=90)
    expected = generator.generate(PROMPTS, max_new_tokens=9)
    for other in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert other._draft is other.model is not model
        assert other.generate(PROMPTS, max_new_tokens=9) == expected
        assert other.statistics == generator.statistics and max(map(max, expected)) < 90


def test_a_draft_model_in_another_dtype_has_a_cache_of_its_own(model):
    draft = copy.deepcopy(model).to(torch.float32)
    expected = Generator(model).generate(PROMPTS, max_new_tokens=5)
    generator = Generator(model, cache_dtype=torch.float64, speculation=DraftModel(draft, 4))
    assert generator.generate(PROMPTS, max_new_tokens=5) == expected
    assert generator.statistics.num_steps < 2 * len(PROMPTS)


def test_an_iterator_counts_its_own_steps(model):
    generator = Generator(model, speculation=PromptLookup())
    steps = generator.stream(PROMPTS, max_new_tokens=4)
    next(steps)
    counted = generator.statistics
    assert generator.generate(PROMPTS, max_new_tokens=0) == [[], [], []]
    assert len([*steps]) == 11 and counted.num_new_tokens == 9
    assert generator.statistics.num_steps == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: PromptLookup(0), "num_tokens: expected an int from 1 to 15; got 0"),
        (lambda _: PromptLookup(16), "num_tokens: .*; got 16"),
        (lambda _: PromptLookup(2, max_ngram=0), "max_ngram: expected an int of at least 1; got 0"),
        (lambda model: DraftModel(model, -1), "num_tokens: .*; got -1"),
        (lambda model: DraftModel(model, True), "num_tokens: .*; got True"),
        (lambda _: DraftModel("7B"), "model: expected a Llama2; got a str"),
        (lambda _: 4, "speculation: expected a PromptLookup, a DraftModel or None; got 4"),
        (
            lambda model: DraftModel(lively(replace(small_config(), vocab_size=98), "cpu")),
            "speculation: expected a draft model with the model's vocabulary of 97; .* 98",
        ),
        (
            lambda model: DraftModel(copy.deepcopy(model).to("meta")),
            r"speculation: expected a draft model on (cpu|cuda:0), like the model; got one on meta",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a function's has its address
)
def test_wrong_arguments_are_named(make, message, model):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        Generator(model, speculation=make(model))


def test_a_draft_model_with_a_shorter_context(model):
    draft = copy.deepcopy(model)
    draft.config = replace(small_config(), max_seq_len=20)
    generator = Generator(model, speculation=DraftModel(draft, 5))
    assert generator.max_seq_len == 20
    expected = Generator(model).generate(PROMPTS, max_new_tokens=10)
    assert generator.generate(PROMPTS, max_new_tokens=10) == expected
    message = "speculation: expected a draft model with a max_seq_len of at least 21, .*; got 20"
    with pytest.raises(ValueError, match=f"^{message}"):
        generator.stream(PROMPTS, max_new_tokens=11)
