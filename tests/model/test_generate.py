"""Generation: sampling, stopping, ragged batches, refusals. Greedy tokens against transformers are
in test_model.py, on Triton in test_model_triton.py."""

from collections import Counter

import pytest
import torch
from small_llama import lively, small_config

from gqa_kernels import get_backend
from llama2.decoding.sampling import sample
from llama2.generate import generate, stream

EAGER = get_backend("eager")
PROMPTS = [[1, 5, 9], [2], [3, 1, 4, 1, 5, 9, 2, 6]]
# Sums of these are exact, so that the nucleus is too: token 3 is the likeliest, then 0, 5, 1.
PROBABILITIES = [0.25, 0.0625, 0.03125, 0.5, 0.03125, 0.125]


@pytest.fixture
def model(device):
    return lively(small_config(), device)


def drawn(device, **settings) -> Counter:
    """How often `sample` takes each token when `uniform` runs once through [0, 1) in 1/1024."""
    uniform = torch.arange(1024, device=device) / 1024
    logits = torch.tensor(PROBABILITIES, device=device).log().expand(1024, -1)
    return Counter(sample(EAGER.sample_tokens, logits, uniform, **settings).tolist())


def test_sample_draws_in_proportion(device):
    counts = drawn(device)
    for token, probability in enumerate(PROBABILITIES):
        assert abs(counts[token] - 1024 * probability) <= 1


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (1e-6, {3}),
        (0.5, {3}),
        (0.51, {3, 0}),
        (0.75, {3, 0}),
        (0.8, {3, 0, 5}),
        (0.9375, {3, 0, 5, 1}),
        (0.95, {3, 0, 5, 1, 2}),  # 2 and 4 are equally likely: the lower id comes first
        (1.0, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_top_p_keeps_exactly_the_nucleus(top_p, nucleus, device):
    counts = drawn(device, top_p=top_p)
    assert set(counts) == nucleus
    mass = sum(PROBABILITIES[token] for token in nucleus)
    for token in nucleus:
        assert abs(counts[token] - 1024 * PROBABILITIES[token] / mass) <= 1


def test_temperature_divides_the_logits(device):
    counts = drawn(device, temperature=0.5)
    squares = [p * p for p in PROBABILITIES]
    for token, square in enumerate(squares):
        assert abs(counts[token] - 1024 * square / sum(squares)) <= 1


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cold_samples_are_the_likeliest_tokens(temperature, dtype, device):
    # Apart by 1, as the limit of a temperature holds no tie.
    logits = torch.stack([torch.randperm(97, device=device) for _ in range(64)]).to(dtype)
    tokens = sample(EAGER.sample_tokens, logits, torch.rand(64, device=device), temperature)
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_a_temperature_beyond_float32_is_the_hottest(model, device):
    counts = drawn(device, temperature=1e300)
    assert max(counts.values()) - min(counts.values()) <= 1  # of six tokens, a sixth each
    settings = {"max_new_tokens": 4, "seed": 1}
    hot = generate(model, PROMPTS, temperature=1e300, **settings)
    assert hot == generate(model, PROMPTS, temperature=3e38, **settings)


def test_the_first_of_equals_wins_at_every_temperature(device):
    logits = torch.zeros(1, 50, device=device)
    logits[0, [20, 30]] = 1.0
    for temperature, top_p in ((0.0, 1.0), (1.0, 1e-6)):
        assert (
            sample(
                EAGER.sample_tokens, logits, torch.zeros(1, device=device), temperature, top_p
            ).item()
            == 20
        )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_finite_logits_give_minus_one(temperature, device):
    logits = torch.zeros(4, 7, device=device)
    logits[0, 2] = float("nan")
    logits[1, 2] = float("inf")
    logits[2, :] = -float("inf")
    logits[3, :6] = -float("inf")  # a legal mask: one token is left
    tokens = sample(
        EAGER.sample_tokens, logits, torch.full((4,), 0.5, device=device), temperature, 0.9
    )
    assert tokens.tolist() == [-1, -1, -1, 6]


def greedy_by_whole_forwards(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=model.lm_head.weight.device))
        tokens.append(logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_greedy_ragged_batch_is_each_prompt_by_itself(model):
    together = generate(model, PROMPTS, max_new_tokens=12)
    assert together == [greedy_by_whole_forwards(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_cache_follows_the_models_dtype(dtype, model):
    # The cache raises, or the ops do, where it has another dtype than the keys.
    assert len(generate(model.to(dtype), PROMPTS, max_new_tokens=4)[0]) == 4


def test_stream_yields_the_tokens_step_by_step(model):
    pairs = list(stream(model, PROMPTS, max_new_tokens=5))
    assert [index for index, _ in pairs] == [0, 1, 2] * 5
    whole = generate(model, PROMPTS, max_new_tokens=5)
    assert [[token for i, token in pairs if i == index] for index in range(3)] == whole


def test_the_model_runs_in_inference_mode_and_the_caller_does_not(model):
    inside = []
    model.lm_head.register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for _ in stream(model, PROMPTS, max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert inside == [True] * 3
    model.loss(torch.tensor([PROMPTS[0]], device=model.lm_head.weight.device)).backward()
    assert model.lm_head.weight.grad is not None


def test_a_stop_token_ends_its_own_sequence_and_is_its_last(model):
    whole = generate(model, PROMPTS, max_new_tokens=20)
    stop = whole[0][7]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len(cut[0]) < 20 and max(map(len, cut)) == 20, "the sequences must end apart"
    assert generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop]) == cut


def test_generation_ends_when_every_sequence_has_stopped(model, monkeypatch):
    first = {tokens[0] for tokens in generate(model, PROMPTS, max_new_tokens=1)}
    calls = []
    original = type(model).hidden_states
    monkeypatch.setattr(
        type(model), "hidden_states", lambda *args: calls.append(args) or original(*args)
    )
    generate(model, PROMPTS, max_new_tokens=50, stop_ids=first)
    assert len(calls) == 1


def test_the_head_sees_one_position_per_sequence(model):
    shapes = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    generate(model, PROMPTS, max_new_tokens=3)
    assert shapes == [(3, 48)] * 3


def test_seed_reproduces_and_seeds_differ(model):
    def draw(**settings):
        return generate(model, PROMPTS, max_new_tokens=16, temperature=1.0, **settings)

    assert draw(seed=7) == draw(seed=7)
    assert draw(seed=7) != draw(seed=8)
    assert draw(seed=0) != draw(seed=2**32)  # all bits of a seed count
    assert draw() != draw()


def test_a_draw_does_not_depend_on_the_batch(model):
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = generate(model, PROMPTS, **settings)
    assert generate(model, PROMPTS[:1], **settings) == together[:1]
    assert generate(model, [PROMPTS[0], [7] * 20], **settings)[0] == together[0]
    # Nor on how long the call may go on.
    assert generate(model, PROMPTS, **settings | {"max_new_tokens": 9}) == [
        tokens[:9] for tokens in together
    ]


def test_equal_prompts_draw_apart_and_seeds_do_not_overlap(model):
    settings = {"max_new_tokens": 16, "temperature": 1.0}
    first, second = generate(model, [[1], [1]], seed=0, **settings)
    assert first != second
    assert generate(model, [[1]], seed=1, **settings)[0] not in (first, second)


def test_no_new_tokens_is_no_work(model, monkeypatch):
    monkeypatch.setattr(type(model), "hidden_states", None)
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], []]


def test_the_whole_context_can_be_used(model):
    assert len(generate(model, [[1] * 120, [2]], max_new_tokens=8)[0]) == 8


def test_prompts_are_those_of_the_call(model):
    prompts = [[1, 5, 9], [2]]
    steps = stream(model, prompts, max_new_tokens=3)
    prompts[0].append(999)
    prompts[1].clear()
    assert [t for i, t in steps if i == 0] == generate(model, [[1, 5, 9]], max_new_tokens=3)[0]


def test_logits_that_are_not_finite_are_reported(model, device):
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model: .* prompts\[1\] at new token 0"):
        generate(model, [[1, 2], [1, 5]], max_new_tokens=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one; got none"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token"),
        ({"prompts": [1, 2]}, r"prompts\[0\]: expected a list of token ids; got a int"),
        ({"prompts": ["text"]}, r"prompts\[0\]: expected a list of token ids; got a str"),
        ({"prompts": [[1, 97]]}, r"prompts\[0\]: expected token ids in \[0, 97\); got 97"),
        ({"prompts": [[1], [-1]]}, r"prompts\[1\]: expected token ids in \[0, 97\); got -1"),
        ({"prompts": [[1.0]]}, r"prompts\[0\]: expected token ids in \[0, 97\); got 1.0"),
        (
            {"prompts": [[1], [1] * 121]},
            r"prompts\[1\]: expected at most max_seq_len \(128\) .*; got 121 \+ 8",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an int of at least 0; got -1"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens: .* got 2\.0"),
        ({"max_new_tokens": True}, r"max_new_tokens: .* got True"),
        ({"prompts": [[True]]}, r"prompts\[0\]: expected token ids .*; got True"),
        ({"temperature": torch.tensor(1.0)}, r"temperature: .* got tensor\(1\.\)"),
        ({"top_p": True}, r"top_p: .* got True"),
        ({"seed": True}, r"seed: .* got True"),
        ({"temperature": -0.1}, "temperature: expected a finite number ≥ 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"temperature": float("inf")}, "temperature: .* got inf"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\]; got 0.0"),
        ({"top_p": 1.01}, "top_p: .* got 1.01"),
        ({"top_p": float("nan")}, "top_p: .* got nan"),
        ({"stop_ids": [2, 97]}, r"stop_ids: expected token ids in \[0, 97\); got 97"),
        ({"stop_ids": [-1]}, "stop_ids: .* got -1"),
        ({"seed": -1}, "seed: expected an int of at least 0, or None; got -1"),
        ({"seed": 0.5}, "seed: .* got 0.5"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [generate, stream])
def test_wrong_arguments_are_named_at_the_call(function, changes, message, model):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 8} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        function(model, **arguments)
