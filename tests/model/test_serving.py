"""Continuous batching gives every request what it gets alone, whatever runs beside it."""

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_llama import lively, small_config, twin

from gqa_kernels import get_backend
from llama2 import Llama2, serving
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.decoding.paged_decode import PagedDecode
from llama2.generate import generate
from llama2.requests import Request, Result, check_request
from llama2.serving import _Server, serve


@pytest.fixture(autouse=True, params=[False, True], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """Every test with a step ahead too, as on a GPU."""
    monkeypatch.setattr(serving, "on_gpu", lambda _: request.param)
    return request.param


@pytest.fixture
def model(device):
    return lively(small_config(), device)


def make_cache(model: Llama2, **sizes) -> PagedKVCache:
    weight = model.lm_head.weight
    sizes = {"num_pages": 30, "page_size": 4, "max_batch": 4} | sizes
    cache = PagedKVCache(model.cache_config, dtype=weight.dtype, device=weight.device, **sizes)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def random_requests(count: int, **settings) -> list[Request]:
    """Prompts of 1 to 50 tokens, many of which begin alike, and 0 to 24 new ones."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(97) for _ in range(30)] for _ in range(2)]
    return [
        Request(
            [*rng.choice(beginnings)[: rng.randrange(31)], *rng.choices(range(97), k=1 + i % 20)],
            rng.randrange(25),
            **{name: rng.choice(values) for name, values in settings.items()},
        )
        for i in range(count)
    ]


def alone(model: Llama2, request: Request) -> list[int]:
    settings = {name: getattr(request, name) for name in ("temperature", "top_p", "seed")}
    settings |= {"stop_ids": request.stop_ids, "max_new_tokens": request.max_new_tokens}
    return generate(model, [request.prompt], **settings)[0]


def assert_as_alone(model: Llama2, requests: list[Request], results: list[Result]) -> None:
    assert sorted(result.index for result in results) == list(range(len(requests)))
    for result in results:
        assert result.request is requests[result.index]
        assert result.tokens == alone(model, result.request)


def assert_empty(cache: PagedKVCache) -> None:
    assert cache.num_free_rows == cache.max_batch and cache.num_free_pages == cache.num_pages


@pytest.fixture
def preemptions(monkeypatch):
    """The lengths at which requests were preempted, in a list that grows."""
    lengths, preempt = [], _Server._preempt

    def counted(server):
        *older, youngest = [*server.running, *filter(None, [server.prefilling])]
        lengths.append(len(youngest.tokens))
        preempt(server)
        assert server.running == older and server.waiting[0] is youngest
        assert server.prefilling is None

    monkeypatch.setattr(_Server, "_preempt", counted)
    return lengths


@pytest.mark.covering(2)
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    ("sizes", "preempts"),
    [
        ({"num_pages": 300, "page_size": 1, "max_batch": 3}, False),
        ({"num_pages": 100, "page_size": 4, "max_batch": 8}, False),
        ({"num_pages": 8, "page_size": 16, "max_batch": 16}, False),
        ({"num_pages": 20, "page_size": 4, "max_batch": 5}, True),
        ({"num_pages": 20, "page_size": 4, "max_batch": 1}, False),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_generate(sizes, preempts, order, model, preemptions):
    requests = random_requests(20, stop_ids=[(), range(40)])
    random.Random(order).shuffle(requests)
    cache = make_cache(model, **sizes)
    results = list(serve(model, requests, cache=cache))
    assert_as_alone(model, requests, results)
    assert bool(preemptions) == preempts
    assert_empty(cache)
    lengths = {len(result.tokens) < result.request.max_new_tokens for result in results}
    assert lengths == {True, False}, "some must be stopped, some not"


def test_what_was_served_before_is_found_again(model):
    """A second time only the last pages are computed, and the tokens are the same."""
    requests, computed = random_requests(6), []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0]))
    cache = make_cache(model, num_pages=200)
    first = list(serve(model, requests, cache=cache))
    prefilled = sum(x.shape[1] for x in computed if x.shape[0] == 1)
    computed.clear()
    second = list(serve(model, requests, cache=cache))
    again = [x.shape[1] for x in computed if x.shape[0] == 1]
    assert max(again) <= 4 < prefilled / len(requests)
    assert [result.tokens for result in first] == [result.tokens for result in second]


def test_draws_depend_on_the_seed_alone(model, preemptions):
    requests = random_requests(
        12, temperature=[0.0, 0.7, 1.3], top_p=[0.8, 1.0], seed=[0, 5, 2**40], stop_ids=[(), (3,)]
    )
    for sizes in ({"num_pages": 200}, {"num_pages": 20}, {"max_batch": 1}):
        assert_as_alone(
            model, requests, list(serve(model, requests, cache=make_cache(model, **sizes)))
        )
    assert preemptions
    drawn = [
        [result.tokens for result in serve(model, [Request([1], 16, 1.0)], cache=make_cache(model))]
        for _ in range(2)
    ]
    assert drawn[0] != drawn[1], "without a seed there is a new one every time"


def test_requests_join_and_leave_between_steps(model):
    """A long one and six short ones on two rows take as many steps as the long one."""
    steps = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: steps.append(inputs[0].shape))
    requests = [Request([1, 2], 18), *(Request([3 + i], 3) for i in range(6))]
    results = serve(model, requests, cache=make_cache(model, max_batch=2))
    assert [result.index for result in results] == [1, 2, 3, 4, 5, 0, 6]
    assert steps == [(2, 48)] * 18


def test_requests_are_read_as_there_is_room(model):
    read = []

    def requests():
        for index in range(10):
            read.append(index)
            yield Request([index], 4)

    results = serve(model, requests(), cache=make_cache(model), max_batch=2)
    assert read == []
    next(results)
    assert read == [0, 1]
    assert len(list(results)) == 9


def test_a_step_synchronises_once(model, monkeypatch):
    calls, steps = [], []
    for layer in model.layers:
        layer.self_attn.prefill_attention = lambda q, *_, **__: q  # the reference reads bounds
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    for name in ("tolist", "item", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *args, original=original: calls.append(1) or original(*args),
        )
    requests = random_requests(6, temperature=[0.0, 1.0])
    assert len(list(serve(model, requests, cache=make_cache(model)))) == 6
    assert len(calls) == len(steps) > 0


def test_no_requests_and_no_tokens(model, monkeypatch):
    monkeypatch.setattr(Llama2, "hidden_states", None)
    cache = make_cache(model)
    assert list(serve(model, [], cache=cache)) == []
    results = list(serve(model, [Request([1], 0)] * 9, cache=cache))
    assert [(result.index, result.tokens) for result in results] == [(i, []) for i in range(9)]


def test_what_just_fits_alone_is_served(model, preemptions):
    cache = make_cache(model, num_pages=5)
    requests = [Request([i] * 6, 15) for i in range(4)]  # 20 tokens are kept of each
    assert_as_alone(model, requests, list(serve(model, requests, cache=cache)))
    assert preemptions and max(preemptions) <= 20
    with pytest.raises(
        ValueError, match=r"num_pages: expected at least 6 pages of 4 for 6 \+ 16 tokens; got 5"
    ):
        check_request(model, cache, Request([1] * 6, 16))
    whole = Request([1] * 100, 28)
    assert_as_alone(
        model, [whole], list(serve(model, [whole], cache=make_cache(model, num_pages=32)))
    )


def test_the_last_to_be_admitted_gives_way(model, preemptions):
    """It comes back when there is room, and the first is never sent back."""
    cache = make_cache(model, num_pages=9)
    requests = [Request([1] * 7, 24), Request([2] * 11, 10), Request([3] * 3, 10)]
    results = list(serve(model, requests, cache=cache))
    assert_as_alone(model, requests, results)
    assert 0 < len(preemptions) <= 4, "one that gives way must not come back at once"


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_iterator_that_is_left_leaves_an_empty_cache(taken, model):
    cache = make_cache(model)
    results = serve(model, random_requests(12), cache=cache)
    for _ in range(taken):
        next(results)
    results.close()
    assert_empty(cache)
    assert_as_alone(
        model, requests := random_requests(3), list(serve(model, requests, cache=cache))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "expected at least one token"),
        ({"prompt": [97]}, r"expected token ids in \[0, 97\); got 97"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an int of at least 0; got -1"),
        ({"max_new_tokens": 128}, r"expected at most max_seq_len \(128\)"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"stop_ids": [97]}, "stop_ids: expected token ids"),
    ],
    ids=str,
)
def test_an_impossible_request_is_refused_when_it_is_read(changes, message, model):
    cache, good = make_cache(model), Request([1], 3)
    results = serve(model, [good, replace(good, **changes)], cache=cache, max_batch=1)
    assert next(results).index == 0
    with pytest.raises(ValueError, match=message):
        next(results)
    assert_empty(cache)


def test_impossible_calls_are_refused_at_once(model):
    cache = make_cache(model)
    message = "max_batch: expected an int from 1 to the cache's 4; got"
    for max_batch in (0, 5, 1.5, True, "2"):
        with pytest.raises(ValueError, match=message):
            serve(model, [], cache=cache, max_batch=max_batch)
    cache.admit([1])
    with pytest.raises(ValueError, match="cache: expected no sequences in use; got 1"):
        serve(model, [], cache=cache)


def test_logits_that_are_not_finite_are_reported(model):
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    cache = make_cache(model)
    requests = [Request([1, 2], 3), Request([1, 5], 3), Request([1, 2, 3], 4)]
    results = {result.index: result for result in serve(model, requests, cache=cache)}
    assert_empty(cache)
    broken = results.pop(1)
    assert broken.tokens == []
    assert broken.error.startswith(
        "model: expected finite logits; got NaN or infinity at new token 0"
    )
    assert [result.error for result in results.values()] == [None, None]
    assert_as_alone(model, [requests[0]], [results[0]])
    assert results[2].tokens == generate(model, [[1, 2, 3]], max_new_tokens=4)[0]


def test_a_repaired_model_finds_nothing_of_the_broken_one(model):
    cache, request = make_cache(model), Request(list(range(20, 40)), 3)
    with torch.no_grad():
        weight = model.layers[0].mlp.down_proj.weight
        held = weight.clone()
        weight[0, 0] = float("nan")
        (result,) = serve(model, [request], cache=cache)
        assert result.error is not None
        assert_empty(cache)
        weight.copy_(held)
        assert_as_alone(model, [request], list(serve(model, [request], cache=cache)))
        model.lm_head.weight.neg_()
        weight.neg_()
    cache.forget()
    assert cache.pages_to_admit(request.prompt) == 5
    assert_as_alone(model, [request], list(serve(model, [request], cache=cache)))


def test_requests_for_no_token_hold_nobody_up(model):
    read = []

    def source():
        for index in range(3):
            read.append(index)
            yield Request([1], 0)
        raise OSError("the source ends badly")

    results = serve(model, source(), cache=make_cache(model))
    assert [next(results).index for _ in range(3)] == [0, 1, 2] and read == [0, 1, 2]
    with pytest.raises(OSError, match="ends badly"):
        next(results)


def test_a_cache_of_fewer_tokens_than_the_model_takes(model):
    config = replace(model.cache_config, max_seq_len=16)
    cache = PagedKVCache(config, num_pages=9, max_batch=1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"requests\[0\]: max_seq_len: .* 21 tokens; got 16"):
        list(serve(model, [Request([1, 2], 20)], cache=cache))


def test_a_request_is_a_request(model):
    with pytest.raises(TypeError, match="request: expected a Request; got a list"):
        list(serve(model, [[1, 2]], cache=make_cache(model)))


def test_stop_ids_of_any_kind(model):
    stop = alone(model, Request([1, 5], 6))[3]
    request = Request([1, 5], 6, stop_ids=iter([stop]))
    assert_as_alone(model, [request], list(serve(model, [request], cache=make_cache(model))))
    assert request.stop_ids == {stop}


def test_a_function_stops_a_request_and_sees_each_token_once(model):
    """Also one that is preempted in between."""
    prompts = [[1, 5], [7, 7, 9], [2]]
    whole = [alone(model, Request(prompt, 20)) for prompt in prompts]
    seen = [[] for _ in prompts]

    def stopping(number):
        def stop(tokens):
            seen[number].append(list(tokens))
            return len(tokens) == 9 + number

        return stop

    requests = [Request(prompt, 20, stop=stopping(i)) for i, prompt in enumerate(prompts)]
    cache = make_cache(model, num_pages=6, max_batch=3)
    for result in serve(model, requests, cache=cache):
        assert result.tokens == whole[result.index][: 9 + result.index]
    for number, calls in enumerate(seen):
        assert calls == [whole[number][:count] for count in range(1, 10 + number)]
    assert_empty(cache)


def test_a_cache_of_another_number_of_layers(model):
    config = replace(model.cache_config, num_layers=1)
    cache = PagedKVCache(config, num_pages=9, max_batch=1, dtype=torch.float32, device="cpu")
    model = model.to("cpu")
    with pytest.raises(ValueError, match="cache: expected 2 layers; got 1"):
        list(serve(model, [Request([1, 2], 3)], cache=cache))
    assert_empty(cache)


def test_the_caller_stays_outside_of_inference_mode(model):
    inside = []
    model.lm_head.register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for _ in serve(model, random_requests(4), cache=make_cache(model)):
        assert not torch.is_inference_mode_enabled()
    assert set(inside) == {True}


def test_triton_serves_eagers_tokens(model):
    """With prompts that share pages, a long remainder, and preemption."""
    prompt = [*range(24)]
    requests = [Request(prompt[:18], 3), Request([*prompt[:17], 90], 2), Request([*prompt, 5], 2)]
    triton = twin(model, get_backend("triton"))
    results = list(serve(triton, requests, cache=make_cache(model, num_pages=11, max_batch=2)))
    assert_as_alone(model, requests, results)


# --- requests of one prompt -----------------------------------------------------------------------


@pytest.fixture
def prefilled(monkeypatch):
    """How many tokens of prompts went through the model, call by call."""
    lengths = []
    compute = PagedDecode.compute

    def noted(decoder, batch):
        lengths.append(int(np.diff(batch.last, prepend=-1)[-1]))  # the last row is the prompt's
        compute(decoder, batch)

    monkeypatch.setattr(PagedDecode, "compute", noted)
    return lengths


def samples(prompt: list[int], count: int, new: int = 9, **settings) -> list[Request]:
    settings = {"temperature": 1.3, "top_p": 0.9} | settings
    return [Request(prompt, new, seed=seed, **settings) for seed in range(count)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 19])  # in pages of 4
def test_a_prompt_of_many_requests_goes_through_the_model_once(length, model, prefilled):
    requests, cache = samples([*range(20, 20 + length)], 6), make_cache(model, max_batch=6)
    results = list(serve(model, requests, cache=cache))
    assert prefilled == [length]
    assert_empty(cache)
    assert_as_alone(model, requests, results)
    assert len({tuple(result.tokens) for result in results}) == 6


def test_prompts_that_take_turns_are_each_computed_once(model, prefilled):
    prompts = [[*range(10)], [*range(50, 57)]]
    requests = [Request(prompts[seed % 2], 5, 1.0, seed=seed) for seed in range(8)]
    results = list(serve(model, requests, cache=make_cache(model, max_batch=8)))
    assert prefilled == [10, 7]
    assert_as_alone(model, requests, results)


def test_other_prompts_of_the_step_share_full_pages(model, prefilled):
    requests = [Request([*range(9), last], 4) for last in (70, 71)]
    results = list(serve(model, requests, cache=make_cache(model)))
    assert prefilled == [10, 2]
    assert_as_alone(model, requests, results)


def test_later_requests_of_a_prompt_share_full_pages(model, prefilled):
    """Two rows for six requests: one begins when another ends, the last two at once."""
    requests = [
        replace(each, max_new_tokens=new)
        for each, new in zip(samples([*range(14)], 6), (3, 5, 7, 5, 4, 4), strict=True)
    ]
    results = list(serve(model, requests, cache=make_cache(model, max_batch=2)))
    assert prefilled == [14, 2, 2, 2]
    assert_as_alone(model, requests, results)


def test_forks_keep_room_to_grow(model, prefilled, preemptions):
    """Each copies the page that they share in part: as many start as there are pages for that."""
    requests = samples([*range(6)], 5, new=3)  # to 8 tokens: 2 pages, of which the first is shared
    cache = make_cache(model, num_pages=5, max_batch=5)
    results = list(serve(model, requests, cache=cache))
    assert not preemptions
    assert prefilled == [6, 2], "four of them on 1 + 4 pages, then the fifth"
    assert_empty(cache)
    assert_as_alone(model, requests, results)


@pytest.mark.covering(1)
@pytest.mark.parametrize("num_pages", [8, 9, 11, 14])
def test_forks_that_are_preempted_go_on_as_alone(num_pages, model, preemptions):
    """Greedy ones too, which come back with equal tokens."""
    requests = [*samples([*range(9)], 5, new=20), *samples([*range(9)], 3, 20, temperature=0.0)]
    cache = make_cache(model, num_pages=num_pages, max_batch=8)
    results = list(serve(model, requests, cache=cache))
    assert 0 < len(preemptions) < 25, "one that gives way must not come back at once"
    assert_empty(cache)
    assert_as_alone(model, requests, results)


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", range(4))
def test_requests_of_few_prompts_in_any_order(seed, model):
    """Of all lengths, on caches of all sizes; closed at any moment, the cache is empty."""
    rng = random.Random(seed)
    prompts = [rng.choices(range(97), k=rng.randrange(1, 20)) for _ in range(3)]
    prompts.append([*prompts[0], *prompts[1]])
    requests = [
        Request(
            rng.choice(prompts), rng.randrange(20), rng.choice([0.0, 1.0]), seed=rng.randrange(3)
        )
        for _ in range(24)
    ]
    sizes = {"num_pages": rng.randrange(15, 40), "max_batch": rng.randrange(1, 9)}
    cache = make_cache(model, **sizes)
    results = serve(model, requests, cache=cache)
    for _ in range(rng.randrange(24)):
        next(results)
    results.close()
    assert_empty(cache)
    results = list(serve(model, requests, cache=cache))
    assert_empty(cache)
    assert_as_alone(model, requests, results)


def test_forks_of_a_prompt_without_finite_logits_each_say_so(model, prefilled):
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    cache = make_cache(model, max_batch=6)
    good = samples([1, 2, 3], 2)
    results = list(serve(model, [*samples([1, 5], 3), *good], cache=cache))
    assert_empty(cache)
    assert prefilled == [2, 3]
    assert {result.index for result in results if result.error is not None} == {0, 1, 2}
    for result in results:
        if result.error is None:
            assert result.tokens == alone(model, result.request)


# --- prompts in chunks ----------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_change_no_token(seed, model, preemptions):
    """Of prompts of all lengths, some equal and some with equal beginnings, greedy and sampled,
    with stop tokens; on caches with many and with few pages."""
    exact, rng = twin(model, dtype=torch.float64), random.Random(seed)
    prompts = [rng.choices(range(97), k=length) for length in (1, 7, 20, 33)]
    prompts += [[*prompts[2], *prompts[1]], [*prompts[3], *prompts[0]]]
    requests = [
        Request(
            prompts[rng.randrange(6)],
            rng.choice([1, 2, 9, 19]),
            rng.choice([0.0, 1.0]),
            seed=rng.randrange(3),
            stop_ids=rng.choice([(), range(10)]),
        )
        for _ in range(10)
    ]
    requests += [requests[-1]] * 2
    sizes = {"num_pages": [14, 14, 60][seed], "max_batch": 5}
    wanted = [alone(exact, request) for request in requests]
    for budget in (1, 3, 17, None):
        cache = make_cache(exact, **sizes)
        results = serve(exact, requests, cache=cache, prefill_budget=budget)
        for _ in range(rng.randrange(12)):
            next(results)
        results.close()
        assert_empty(cache)
        cache = make_cache(exact, **sizes)
        results = list(serve(exact, requests, cache=cache, prefill_budget=budget))
        assert_empty(cache)
        assert len(results) == len(requests)
        assert all(result.tokens == wanted[result.index] for result in results), budget
    assert bool(preemptions) == (seed < 2)


@pytest.mark.covering(1)
@pytest.mark.parametrize("budget", [1, 3, 16, 20, 0])
def test_no_token_waits_for_more_than_a_budget_of_other_prompts(
    budget, model, prefilled, monkeypatch
):
    """From one drawing, which draws a token for each running request, to the next one."""
    pauses, rows = [], []
    draw = PagedDecode.draw
    last = 0

    def noted(decoder, drawn):
        nonlocal last
        rows.append(len(drawn))
        if decoder.num_drawn[drawn].any():  # a request has waited since its last token
            pauses.append(sum(prefilled) - last)
        last = sum(prefilled)
        return draw(decoder, drawn)

    monkeypatch.setattr(PagedDecode, "draw", noted)
    sizes = ((2, 30), (1, 9), (3, 2), (60, 3), (30, 2), (1, 3), (45, 2), (5, 4))
    requests = [Request([length, *range(1, length)], new) for length, new in sizes]
    cache = make_cache(model, num_pages=100, max_batch=3)
    results = list(serve(model, requests, cache=cache, prefill_budget=budget))
    assert len(results) == len(requests)
    assert sum(rows) == sum(new for _, new in sizes)
    assert sum(prefilled) == sum(length for length, _ in sizes)
    if budget:
        assert max(prefilled) == max(pauses) == budget
    else:
        assert max(prefilled) == 60
        assert max(pauses) >= 60


def test_a_chunk_goes_through_the_model_with_the_tokens_of_running_requests(model, events):
    shapes = []
    model.embed_tokens.register_forward_hook(lambda _, x, __: shapes.append(tuple(x[0].shape)))
    requests = [Request([1, 2], 9), Request([3], 9), Request([5] * 20, 4)]
    cache = make_cache(model, max_batch=3)
    list(serve(model, requests, cache=cache, prefill_budget=6))
    # Two prompts and 3 tokens of the third; its other chunks with two running requests.
    prefills = [(1, 2), (1, 1), (1, 3), (1, 8), (1, 8), (1, 7)]
    assert [shape for shape in shapes if shape[0] == 1] == prefills
    assert len(shapes) == len(prefills) + [name for name, _ in events].count("decode")
    assert [name for name, _ in events].count("draw") == 9


@pytest.mark.covering(1)
@pytest.mark.parametrize("budget", [1, 3, 5, 16])
def test_a_prompt_of_many_requests_is_prefilled_in_chunks_once(budget, model, prefilled):
    requests, cache = samples([*range(20, 39)], 6), make_cache(model, max_batch=6)
    results = list(serve(model, requests, cache=cache, prefill_budget=budget))
    assert prefilled == [budget] * (19 // budget) + [19 % budget] * (19 % budget > 0)
    assert_as_alone(model, requests, results)


def test_a_step_completes_prompts_up_to_its_budget(model, prefilled, events):
    requests = [Request([i] * length, 2) for i, length in enumerate((4, 3, 6, 2))]
    results = list(serve(model, requests, cache=make_cache(model), prefill_budget=10))
    assert prefilled == [4, 3, 3, 3, 2]
    assert [rows for name, rows in events if name == "draw"] == [2, 4, 2]
    assert_as_alone(model, requests, results)


def test_an_incomplete_prompt_gives_way_first(model, preemptions, prefilled):
    """Its full pages are found again when it comes back, unless others needed them."""
    requests = [Request([1] * 4, 24), Request([2] * 20, 3)]
    cache = make_cache(model, num_pages=9)
    results = list(serve(model, requests, cache=cache, prefill_budget=1))
    assert preemptions == [20]
    assert 24 < len(prefilled) < 44
    assert_empty(cache)
    assert_as_alone(model, requests, results)


@pytest.mark.parametrize("budget", [-1, 1.5, "3", True])
def test_a_budget_is_an_int(budget, model):
    with pytest.raises(ValueError, match="prefill_budget: expected an int of at least 0, or None"):
        serve(model, [], cache=make_cache(model), prefill_budget=budget)


def test_triton_computes_eagers_chunks(model):
    request = Request([*range(40)], 2)
    triton = twin(model, get_backend("triton"))
    results = list(serve(triton, [request], cache=make_cache(model), prefill_budget=20))
    assert_as_alone(model, [request], results)


# --- what the host does, and when --------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """ "decode" and the number of its rows, "draw" and "read", as they happen."""
    seen = []
    decode, draw = PagedDecode.decode, PagedDecode.draw

    def noted_decode(decoder, batch):
        seen.append(("decode", len(batch.rows)))
        decode(decoder, batch)

    def noted_draw(decoder, rows):
        seen.append(("draw", len(rows)))
        wait = draw(decoder, rows)
        return lambda: (seen.append(("read", len(rows))), wait())[1]

    monkeypatch.setattr(PagedDecode, "decode", noted_decode)
    monkeypatch.setattr(PagedDecode, "draw", noted_draw)
    return seen


def test_a_step_is_enqueued_before_tokens_are_read(model, ahead, events):
    """Where the device works meanwhile; and none that is known to be one too many."""
    list(serve(model, [Request([1, 2], 4), Request([3], 2)], cache=make_cache(model)))
    step = ["decode", "read", "draw"] if ahead else ["read", "decode", "draw"]
    assert [name for name, _ in events] == ["draw", *3 * step, "read"]
    assert [rows for name, rows in events if name == "decode"] == [2, 1, 1]


def test_a_request_that_is_stopped_costs_a_row_of_a_step(model, ahead, events):
    """That is, where a step is enqueued ahead; and its token is dropped."""
    prompts, stops = [[1, 5], [7, 7, 9], [2]], []
    for prompt in prompts:
        tokens = alone(model, Request(prompt, 20))
        stops.append(next(i for i, token in enumerate(tokens[1:], 1) if token not in tokens[:i]))
    requests = [
        Request(prompt, 20, stop_ids=[alone(model, Request(prompt, 20))[stop]])
        for prompt, stop in zip(prompts, stops, strict=True)
    ]
    results = list(serve(model, requests, cache=make_cache(model)))
    assert_as_alone(model, requests, results)
    assert all(result.finish_reason == "stop" for result in results)
    assert sum(rows for name, rows in events if name == "decode") == sum(stops) + 3 * ahead
    assert sum(rows for name, rows in events if name == "draw") == sum(stops) + 3


def test_no_request_is_sent_beyond_its_pages_or_the_model(model):
    """Requests that fill all pages, or all positions, with their last token."""
    for sizes, request in (
        ({"num_pages": 5}, Request([1] * 6, 15, stop_ids=[0])),
        ({"num_pages": 32}, Request([1] * 100, 28)),
    ):
        for new in range(request.max_new_tokens - 2, request.max_new_tokens + 1):
            cut = replace(request, max_new_tokens=new)
            cache = make_cache(model, max_batch=1, **sizes)
            assert_as_alone(model, [cut, cut], list(serve(model, [cut, cut], cache=cache)))


def calls_per_step(model: Llama2, batch: int) -> float:
    """Python's and C's functions that a step calls, where requests neither begin nor end."""
    counts = []
    for new in (8, 24):  # 16 steps apart: every row fills as many pages
        cache, count = make_cache(model, num_pages=10 * batch, max_batch=batch), [0]

        def counting(frame, event, argument, count=count):
            count[0] += event in ("call", "c_call")

        requests = [Request([1, 5, 7, i], new) for i in range(batch)]
        sys.setprofile(counting)
        try:
            list(serve(model, requests, cache=cache))
        finally:
            sys.setprofile(None)
        counts.append(count[0])
    return (counts[1] - counts[0]) / 16


def test_the_hosts_work_grows_at_most_with_the_batch(model, monkeypatch):
    """With the model and the choice of a token replaced by nothing. What were quadratic would grow
    four times as much from 32 to 64 as from 16 to 32."""
    monkeypatch.setattr(PagedDecode, "_run_model", lambda decoder: None)
    monkeypatch.setattr(PagedDecode, "_sample", lambda decoder, greedy: None)
    calls = {batch: calls_per_step(model, batch) for batch in (16, 32, 64)}
    assert calls[64] - calls[32] <= 2.2 * (calls[32] - calls[16])
    assert calls[64] < 10 * 64
