"""Safety context distillation: what is asked, what is kept, and what it is learnt as."""

from pathlib import Path

import pytest
from answering import TOKENIZER, Answering, turns_of

from gqa_kernels import get_backend
from llama2 import PagedKVCache, checkpoint
from llama2.finetune import safety, sampling
from llama2.finetune.dialogues import read_dialogues
from llama2.finetune.safety import PREPROMPTS, TEMPLATES, RiskyPrompt, distil, write_distilled

FILE = Path("p.jsonl")
SHORT = ("Be safe.", "Be kind.")
NO_RISK: dict[str, str] = {"illicit": "No crimes."}


def asks(text: str, line: int = 1, **beside) -> RiskyPrompt:
    return RiskyPrompt(({"role": "user", "content": text},), FILE, line, **beside)


def answer(text: str) -> str:
    """Of a question "x y": x without a preprompt, y with one."""
    without, with_it = turns_of(text)[-1].split("\n")[-1].split()
    chosen = with_it if "<<SYS>>" in text else without
    return {"nothing": "", "endless": "word " * 60}.get(chosen, chosen)


@pytest.fixture
def stand_in(monkeypatch):
    stub = Answering(answer)
    monkeypatch.setattr(sampling, "serve", stub.serve)
    return stub


@pytest.fixture(scope="module")
def sampler(device):
    model = checkpoint.load(checkpoint.SHIPPED, get_backend("eager"), device=device)
    dtype = model.lm_head.weight.dtype
    cache = PagedKVCache(model.cache_config, num_pages=64, max_batch=4, dtype=dtype, device=device)
    settings = sampling.Settings(20, [TOKENIZER.eos_id], seed=0)
    return sampling.Sampler(model, TOKENIZER, cache, settings)


def length(messages, text: str) -> float:
    return float(len(text))


@pytest.mark.parametrize("backwards", [False, True])
def test_the_better_answer_is_kept_with_the_prompt_alone(backwards, sampler, stand_in, tmp_path):
    stand_in.backwards, scored = backwards, []

    def reward(messages, text):
        scored.append((messages, text))
        return length(messages, text)

    prompts = [
        asks("aa bbbb"),
        asks("aaaa bb"),
        asks("aa bb"),
        asks("aa nothing"),
        asks("nothing bb"),
        asks("aa endless"),
        asks("endless bb"),
        asks("word " * 300),
    ]
    out = tmp_path / "safe.jsonl"
    outcomes = write_distilled(
        out, distil(sampler, prompts, reward, preprompts=SHORT, templates=NO_RISK)
    )
    assert outcomes == {"kept": 1, "not better": 3, "empty": 2, "cut": 1, "error": 1}
    (kept,) = read_dialogues(out, refuse)
    assert [message["content"] for message in kept.messages] == ["aa bbbb", "bbbb"]
    assert kept.trained == (True,) and kept.source == "safety"
    assert all(messages[0]["role"] == "user" for messages, _ in scored)
    assert len(scored) == 8


def refuse(file, number, error):
    raise error


def test_the_preprompt_is_a_system_message_with_the_template_of_the_risk(sampler, stand_in):
    own = RiskyPrompt(
        (
            {"role": "system", "content": "Rhyme."},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "earlier"},
            {"role": "user", "content": "aa bbbb"},
        ),
        FILE,
        7,
        risk="illicit",
        source="mine",
    )
    scores = iter((0.0, 1.0))
    (kept,) = distil(
        sampler, [own], lambda *_: next(scores), preprompts=SHORT[:1], templates=NO_RISK
    )
    assert any("Be safe.\n\nNo crimes.\n\nRhyme.\n<</SYS>>" in text for text in stand_in.prompts)
    assert any("<<SYS>>\nRhyme.\n<</SYS>>" in text for text in stand_in.prompts)
    assert kept.dialogue.messages[:-1] == own.messages and kept.dialogue.source == "mine"
    assert kept.dialogue.trained == (False, True) and kept.dialogue.line == 7


def test_preprompts_follow_from_the_seed_and_the_place():
    prompts = [asks(f"a{number} b", number) for number in range(30)]

    def drawn(seed):
        return [
            safety.with_preprompt(prompt, PREPROMPTS, TEMPLATES, seed)[0]["content"]
            for prompt in prompts
        ]

    assert drawn(0) == drawn(0) != drawn(1) and set(drawn(0)) == set(PREPROMPTS)
    for risk, template in TEMPLATES.items():
        system = safety.with_preprompt(asks("a b", risk=risk), PREPROMPTS, TEMPLATES, 0)[0]
        assert system["content"].endswith(f"\n\n{template}")


def test_what_is_wrong_is_named(sampler, stand_in):
    (unknown,) = distil(sampler, [asks("a b", risk="tides")], length)
    assert unknown.outcome == "error" and unknown.error == (
        "risk: expected one of illicit, hateful, unqualified or None; got 'tides'"
    )
    with pytest.raises(
        ValueError, match=r"reward: expected finite numbers; got .*nan.* for p.jsonl:1"
    ):
        list(distil(sampler, [asks("a b")], lambda *_: float("nan"), preprompts=SHORT))


def test_a_failed_run_writes_nothing(sampler, stand_in, tmp_path):
    out = tmp_path / "safe.jsonl"
    out.write_text("before", encoding="utf-8")
    with pytest.raises(ValueError, match="reward"):
        write_distilled(out, distil(sampler, [asks("a b")], lambda *_: float("inf")))
    assert out.read_text(encoding="utf-8") == "before"


def test_a_model_in_earnest(sampler):
    """Both answers of each prompt are scored once, whichever comes first."""
    scored = []

    def reward(messages, text):
        scored.append(messages[-1]["content"])
        return float(len(scored))

    prompts = [asks(f"def f{number}(x):") for number in range(5)]
    stops = range(3, 1024, 4)
    free = sampling.Sampler(
        sampler.model, TOKENIZER, sampler.cache, sampling.Settings(60, stops, seed=0)
    )
    outcomes = list(distil(free, prompts, reward, preprompts=SHORT))
    kept = [each for each in outcomes if each.outcome == "kept"]
    assert len(outcomes) == 5 and kept
    assert sorted(scored) == sorted(2 * [each.prompt.messages[-1]["content"] for each in kept])


def test_a_reward_that_raises_leaves_the_cache_free(sampler):
    free = sampling.Sampler(
        sampler.model, TOKENIZER, sampler.cache, sampling.Settings(60, range(3, 1024, 4), seed=0)
    )
    prompts = [asks(f"def f{number}(x):") for number in range(5)]
    with pytest.raises(ZeroDivisionError) as raised:
        list(distil(free, prompts, lambda *_: 1 / 0, preprompts=SHORT))
    assert sampler.cache.num_free_rows == sampler.cache.max_batch, raised
