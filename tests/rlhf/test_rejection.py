"""`llama2 rejection-sample`: what is sampled, chosen, written, resumed and counted."""

import json
import math
import os
import random
import resource
import shutil
import signal
import threading
import time
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from answering import TOKENIZER, Answering, dialogue, replace_weights, turns_of
from tqdm import tqdm

from gqa_kernels import get_backend
from llama2 import checkpoint, cli
from llama2.commands import dialogue_jobs, rejection_sample
from llama2.finetune import sampling
from llama2.finetune.conversations import place_numbers
from llama2.finetune.dialogues import Dialogue, read_dialogues
from llama2.finetune.encoding import encode_dialogue
from llama2.requests import seed_of
from llama2.rlhf.rejection import Judge, best_of
from llama2.rlhf.rewards import combined
from llama2.rlhf.scoring import Scorer
from llama2.scalar_model import ScalarModel

LINES = [
    {"prompt": "one"},
    dialogue("zero", "given", "two", "dropped", system="Shout", source="turns"),
    {"messages": [{"role": "user", "content": "three"}], "safety": True},
    {"prompt": "four", "source": "ours"},
]
LAST = {1: "one", 2: "two", 3: "three", 4: "four"}
K = 5


def text_of(question: str, sample: int) -> str:
    """A sample of the stand-in: as many letters as its reward says."""
    return f"{question} " + "x" * random.Random(f"{question} {sample}").randrange(1, 50)


def length(sequences: list[list[int]]) -> list[float]:
    """A reward model's stand-in: the number of letters x."""
    return [float(TOKENIZER.decode(ids).count("x")) for ids in sequences]


@pytest.fixture
def model(device):
    return checkpoint.load(checkpoint.SHIPPED_CHAT, get_backend("eager"), device=device)


@pytest.fixture
def weights(monkeypatch):
    return replace_weights(monkeypatch, rejection_sample, dialogue_jobs)


@pytest.fixture
def judge(monkeypatch, weights):
    """The reward models of the command are functions: `judge.helpful`, `judge.safety`."""
    judge = Judge(TOKENIZER, "chat", 512, length)
    monkeypatch.setattr(rejection_sample, "_judge", lambda *_: judge)
    return judge


@pytest.fixture
def stand_in(monkeypatch, model, judge):
    """Answers in place of the shipped model: which sample it is follows from the request's seed."""
    numbers = {}
    for line in LAST:
        place = place_numbers(Path("data.jsonl"), line)
        numbers[seed_of(0, *place)] = 0
        numbers |= {seed_of(0, *place, sample): sample for sample in range(1, 20)}
    stub = Answering(lambda text: stub.sample(turns_of(text)[-1], numbers[stub.request.seed]))
    stub.sample = text_of
    stub.loaded = []

    def load(arguments):
        stub.loaded.append(arguments.checkpoint)
        return model, TOKENIZER

    monkeypatch.setattr(sampling, "serve", stub.serve)
    monkeypatch.setattr(rejection_sample, "load", load)
    return stub


@pytest.fixture
def earnest(monkeypatch, model, judge):
    """The shipped model itself, one token in five of which ends an answer: a model of source ends
    none by itself."""
    monkeypatch.setattr(rejection_sample, "load", lambda _: (model, TOKENIZER))
    monkeypatch.setattr(dialogue_jobs, "load", lambda _: (model, TOKENIZER))
    monkeypatch.setattr(dialogue_jobs, "stop_ids", lambda *_: list(range(3, 1024, 5)))


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def by_place(path: Path) -> dict[str, dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {record["place"]: record for record in map(json.loads, lines)}
    assert len(records) == len(lines)
    return records


@pytest.fixture
def files(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    write(data, LINES)
    return data, out


@pytest.fixture
def rejection(files, device, capfd):
    """Runs the command on `files`: (status, records by place, stdout, stderr)."""

    def run(*options: str, samples: int = K) -> tuple[int, dict, str, str]:
        data, out = files
        paths = ["--data", str(data), "--out", str(out), "--device", str(device)]
        paths += ["--reward", "RM", "--samples", str(samples), "--backend", "torch"]
        status = cli.main(["rejection-sample", *paths, *options])
        return status, by_place(out), *capfd.readouterr()

    return run


def answers(records: dict) -> dict[int, str]:
    return {
        int(place.rpartition(":")[2]): record["messages"][-1]["content"]
        for place, record in records.items()
    }


def expected(line: int, count: int = K) -> tuple[str, list[float]]:
    """The best sample of a line, and the rewards of all."""
    texts = [text_of(LAST[line], sample) for sample in range(count)]
    return max(texts, key=lambda text: text.count("x")), [float(t.count("x")) for t in texts]


# --- rewards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("helpful", "safety", "is_safety", "which"),
    [
        (2.0, 1.0, False, "helpful"),
        (2.0, 1.0, True, "safety"),
        (2.0, -1.7, False, "helpful"),  # σ = 0.154
        (2.0, -1.8, False, "safety"),  # σ = 0.142
        (-9.0, -1.8, False, "safety"),
        (2.0, None, True, "helpful"),
        (1e300, -1e300, False, "safety"),
    ],
)
def test_which_reward_counts(helpful, safety, is_safety, which):
    assert combined(helpful, safety, is_safety) == {"helpful": helpful, "safety": safety}[which]


def test_which_reward_counts_is_the_papers_formula():
    def probability(logit):
        return 1 / (1 + math.exp(-logit))

    rng = random.Random(0)
    for _ in range(500):
        helpful, safety, is_safety = rng.gauss(0, 3), rng.gauss(-1.7, 1), rng.random() < 0.3
        r_h, r_s = probability(helpful), probability(safety)
        r_c = r_s if is_safety or r_s < 0.15 else r_h
        assert probability(combined(helpful, safety, is_safety)) == r_c


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_is_finite(bad):
    with pytest.raises(ValueError, match="helpful: expected a finite reward; got"):
        combined(bad, 0.0, True)
    with pytest.raises(ValueError, match="safety: expected a finite reward; got"):
        combined(0.0, bad, False)


def test_best_of():
    assert best_of([[1.0, 3.0, 2.0], [None, 5.0, None], [None] * 3], 3) == [3.0, 4.0, 4.0]
    assert best_of([[None]], 1) == best_of([], 1) == []


# --- what is written ----------------------------------------------------------------------------


def test_the_best_of_each_prompt_is_written(rejection, stand_in, files, tmp_path):
    summary = tmp_path / "summary.json"
    status, records, table, err = rejection("--summary", str(summary))
    assert status == 0, err
    assert answers(records) == {line: expected(line)[0] for line in LAST}
    last = err.splitlines()[-1]
    assert last.startswith("4 prompts done, 0 were done before, 0 left out, 0 earlier answers")
    best, rewards = expected(2)
    assert records["data.jsonl:2"] == {
        "place": "data.jsonl:2",
        "checkpoint": str(checkpoint.SHIPPED_CHAT),
        "weights_crc32": "00000000",
        "messages": [
            {"role": "system", "content": "Shout"},
            {"role": "user", "content": "zero"},
            {"role": "assistant", "content": "given", "weight": 0},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": best},
        ],
        "source": "turns",
        "safety": False,
        "reward": max(rewards),
        "sample": rewards.index(max(rewards)),
        "earlier": None,
        "rewards": rewards,
        "faults": {},
        "round": {
            "samples": K,
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": 0,
            "max_new_tokens": 256,
            "dtype": None,
            "kv_cache_dtype": "auto",
            "format": "chat",
            "reward_model": "RM",
            "safety_reward_model": None,
            "earlier": [],
            "crc32": {
                "reward_model": "00000000",
                "safety_reward_model": None,
            },
        },
    }
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert found.pop("made_with")["command"].startswith("llama2 rejection-sample --data ")
    curves = [list(accumulate(expected(line)[1], max)) for line in LAST]
    means = [sum(curve[n] for curve in curves) / len(curves) for n in range(K)]
    assert found.pop("best_of") == pytest.approx(means, rel=1e-12)
    assert found.pop("mean_reward") == pytest.approx(means[-1], rel=1e-12)
    assert found == {
        "data": str(files[0]),
        "checkpoint": str(checkpoint.SHIPPED_CHAT),
        "round": records["data.jsonl:2"]["round"],
        "prompts": 4,
        "safety_prompts": 1,
        "answered": 4,
        "left_out": [],
        "faults": {},
        "from_earlier_rounds": 0,
        "earlier_answers_to_other_prompts": 0,
        "bad_lines": 0,
    }
    rows = [f"{n:>7}  {means[n - 1]:>11.4f}\n" for n in (1, 2, 4, 5)]
    assert table == "best of  mean reward\n" + "".join(rows)


def test_sft_learns_the_chosen_answer_alone(rejection, stand_in, files):
    rejection()
    refused = []
    found = {
        each.source: each for each in read_dialogues(files[1], lambda *bad: refused.append(bad))
    }
    assert not refused and found["turns"].trained == (False, True)
    assert found["turns"].messages[-1] == {"role": "assistant", "content": expected(2)[0]}
    assert found["ours"].messages[0] == {"role": "user", "content": "four"}


def test_every_sample_with_its_reward(rejection, stand_in, tmp_path):
    path = tmp_path / "all.jsonl"
    assert rejection("--all-samples", str(path))[0] == 0
    found = by_place(path)
    for line, question in LAST.items():
        record = found[f"data.jsonl:{line}"]
        assert record["messages"][-1] == {"role": "user", "content": question}
        assert record["safety"] == (line == 3) and record["round"]["samples"] == K
        texts = [text_of(question, sample) for sample in range(K)]
        assert [sample["answer"] for sample in record["samples"]] == texts
        assert [sample["reward"] for sample in record["samples"]] == expected(line)[1]
        for sample in record["samples"]:
            ids = TOKENIZER.encode(sample["answer"], bos=False, eos=True)
            assert sample["num_new_tokens"] == len(ids) and sample["fault"] is None


def test_results_are_written_as_they_finish(rejection, stand_in, files, judge):
    seen = []

    def noting(sequences):
        seen.append(len(by_place(files[1])))
        return length(sequences)

    judge.helpful = noting
    assert rejection()[0] == 0
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_equal_rewards_take_the_first_sample(count, rejection, stand_in, judge):
    judge.helpful = lambda sequences: [0.5] * len(sequences)
    _, records, _, _ = rejection(samples=count)
    assert answers(records) == {line: text_of(question, 0) for line, question in LAST.items()}
    assert {record["sample"] for record in records.values()} == {0}


# --- safety -------------------------------------------------------------------------------------


def test_safety_counts_where_it_is_at_stake(rejection, stand_in, judge):
    """Of a prompt that is tagged, the safest answer; of the others, the most helpful safe one."""

    def safest(sequences):  # the short ones, to 30 letters
        return [15.0 - reward / 2 if reward <= 30 else -reward for reward in length(sequences)]

    judge.safety = safest
    status, records, _, err = rejection("--safety-reward", "SAFE", samples=8)
    assert status == 0 and "tagged" not in err
    for line in LAST:
        rewards = expected(line, 8)[1]
        assert max(rewards) > 30 >= min(rewards), "the stand-in's draws must tell the cases apart"
        wanted = min(rewards) if line == 3 else max(reward for reward in rewards if reward <= 30)
        record = records[f"data.jsonl:{line}"]
        assert answers(records)[line].count("x") == wanted
        assert record["reward"] == (15.0 - wanted / 2 if line == 3 else wanted)
        assert record["round"]["safety_reward_model"] == "SAFE"


def test_tags_without_a_safety_model_are_told(rejection, stand_in):
    assert "1 safety prompt judged like all others" in rejection()[3]


# --- answers that cannot be learnt, prompts that cannot be asked --------------------------------


def test_answers_that_are_empty_or_cut_cannot_win(rejection, stand_in, tmp_path):
    """Though they be the longest; a prompt without any other is named and left out."""
    summary, path = tmp_path / "summary.json", tmp_path / "all.jsonl"

    def sample(question, number):
        if question == "two" or number == 1:
            return "x" * 400
        return " " if number == 2 else text_of(question, number)

    stand_in.sample = sample
    options = ("--max-new-tokens", "60", "--summary", str(summary), "--all-samples", str(path))
    status, records, _, err = rejection(*options)
    assert (status, answers(records).keys()) == (0, {1, 3, 4})
    assert "data.jsonl:2: left out: none of 5 answers can be trained on: 5 cut\n" in err
    assert "3 prompts done, 0 were done before, 1 left out" in err
    for line in (1, 3, 4):
        rewards = expected(line)[1]
        assert records[f"data.jsonl:{line}"]["rewards"] == [rewards[0], None, None, *rewards[3:]]
        assert records[f"data.jsonl:{line}"]["faults"] == {"cut": 1, "empty": 1}
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert found["left_out"] == ["data.jsonl:2"] and found["faults"] == {"cut": 8, "empty": 3}
    assert [each["fault"] for each in by_place(path)["data.jsonl:2"]["samples"]] == ["cut"] * 5
    assert "1 left out" in rejection(*options)[3], "and again in a run that goes on"


def test_an_answer_that_no_reward_model_can_read_cannot_win(rejection, stand_in, judge):
    judge.max_tokens = 40
    status, records, _, _ = rejection()
    assert status == 0
    faults = sum(record["faults"].get("long", 0) for record in records.values())
    assert faults and set(expected(1)[1]) & {r for r in records["data.jsonl:1"]["rewards"] if r}


def test_bad_lines_are_named_and_the_others_done(rejection, stand_in, files):
    good = [json.dumps(line) for line in LINES]
    too_long = json.dumps({"prompt": "word " * 200})
    files[0].write_text("\n".join([*good, "{", '{"text": "x"}', too_long]), encoding="utf-8")
    status, records, _, err = rejection()
    assert status == 1 and len(records) == 4
    first, second, _, third, summary = err.splitlines()
    assert first.startswith(f"{files[0]}:5: line: expected JSON; ")
    assert second.startswith(f'{files[0]}:6: line: expected "messages" or "prompt"')
    assert third.startswith(f"{files[0]}:7: messages: expected fewer tokens before an answer")
    assert summary.endswith("3 bad lines")


def test_rewards_that_are_not_finite_are_an_error_of_their_line(rejection, stand_in, judge):
    def broken(sequences):
        return [math.nan if "three" in TOKENIZER.decode(ids) else 1.0 for ids in sequences]

    judge.helpful = broken
    status, records, _, err = rejection()
    assert (status, answers(records).keys()) == (1, {1, 2, 4})
    assert "data.jsonl:3: helpful: expected a finite reward; got nan" in err


def test_logits_that_are_not_finite_are_an_error_of_their_line(rejection, earnest, model, files):
    asked = ["def f(x):", "Qqq"]
    one, other = (set(TOKENIZER.encode_chat([{"role": "user", "content": x}])) for x in asked)
    write(files[0], [{"prompt": text} for text in asked])
    with torch.no_grad():
        model.embed_tokens.weight[list(other - one)] = float("nan")
    status, records, _, err = rejection("--max-new-tokens", "1", samples=3)  # all are cut
    assert (status, records) == (1, {})
    assert "data.jsonl:1: left out: none of 3 answers" in err
    assert "data.jsonl:2: model: expected finite logits; got NaN or infinity" in err


# --- earlier rounds -----------------------------------------------------------------------------


def test_the_best_of_all_rounds_is_kept(rejection, stand_in, tmp_path, files):
    ours, other = tmp_path / "round1.jsonl", tmp_path / "written.jsonl"
    best = {line: int(max(expected(line)[1])) for line in LAST}
    write(
        ours,
        [
            dialogue(" one ", "x" * (best[1] + 1), reward=-3.0),
            dialogue("zero", "given", "two", "x" * 60),  # without the system message: another
            dialogue("three", "x" * best[3]),  # not better
        ],
    )
    write(
        other,
        [
            dialogue("one", "x" * (best[1] + 2)),
            dialogue("elsewhere", "x" * 70),
            dialogue("four", "x" * (best[4] - 1), "elsewhere", "x"),
        ],
    )
    summary, path = tmp_path / "summary.json", tmp_path / "all.jsonl"
    options = ("--earlier", str(ours), "--earlier", str(other), "--summary", str(summary))
    status, records, table, err = rejection(*options, "--all-samples", str(path))
    assert status == 0 and "3 earlier answers to other prompts" in err
    assert answers(records) == {line: expected(line)[0] for line in LAST} | {1: "x" * (best[1] + 2)}
    record = records["data.jsonl:1"]
    assert (record["earlier"], record["sample"]) == ("written.jsonl:1", None)
    assert record["reward"] == best[1] + 2 and record["rewards"] == expected(1)[1]
    assert record["round"]["earlier"] == [str(ours), str(other)]
    assert [each["reward"] for each in by_place(path)["data.jsonl:1"]["earlier"]] == [
        best[1] + 1,
        best[1] + 2,
    ]
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert found["from_earlier_rounds"] == 1 and found["earlier_answers_to_other_prompts"] == 3
    assert found["mean_reward"] == pytest.approx(found["best_of"][-1] + 2 / 4, rel=1e-12)
    assert table.splitlines()[-1] == f"and earlier rounds  {found['mean_reward']:>11.4f}"


def test_a_round_can_follow_on_a_round(rejection, stand_in, files, tmp_path):
    """With more samples nothing gets worse, and what was better is kept."""
    assert rejection(samples=2)[0] == 0
    first = tmp_path / "first.jsonl"
    files[1].rename(first)
    stand_in.sample = lambda question, sample: text_of(question, sample + 7)
    status, records, _, _ = rejection("--earlier", str(first), samples=2)
    assert status == 0
    for line, question in LAST.items():
        texts = [text_of(question, sample) for sample in (7, 8, 0, 1)]
        assert answers(records)[line] == max(texts, key=lambda text: text.count("x"))
    assert {record["earlier"] is None for record in records.values()} == {True, False}


def test_an_earlier_answer_stands_where_none_of_this_round_can_be_learnt(
    rejection, stand_in, tmp_path
):
    earlier = tmp_path / "round1.jsonl"
    write(earlier, [dialogue("one", "xx")])
    stand_in.sample = lambda question, _: "" if question == "one" else question
    status, records, _, err = rejection("--earlier", str(earlier))
    assert status == 0 and "0 left out" in err
    assert answers(records)[1] == "xx" and records["data.jsonl:1"]["faults"] == {"empty": 5}


# --- runs that go on ----------------------------------------------------------------------------


@pytest.mark.parametrize("kill_after", range(0, 4 * K, 3))
def test_a_killed_run_is_gone_on_with(kill_after, rejection, stand_in, files, tmp_path):
    """At any sample; the lines are those of a run that nobody kills, in both files."""
    path, summary = tmp_path / "all.jsonl", tmp_path / "summary.json"
    options = ("--all-samples", str(path), "--summary", str(summary))
    stand_in.kill_after = kill_after
    status, records, table, _ = rejection(*options)
    assert (status, len(records), table) == (130, kill_after // K, "") and not summary.exists()
    stand_in.kill_after = None
    status, records, table, err = rejection(*options)
    assert status == 0 and f"{kill_after // K} were done before" in err
    cut = (files[1], path, summary)
    found = [{*file.read_text(encoding="utf-8").splitlines()} for file in cut]
    for file in cut:
        file.unlink()
    assert rejection(*options)[1:3] == (records, table)
    assert found == [{*file.read_text(encoding="utf-8").splitlines()} for file in cut]


@pytest.mark.parametrize("seed", range(12))
def test_files_that_are_cut_anywhere_are_gone_on_with(seed, rejection, stand_in, files, tmp_path):
    path, rng = tmp_path / "all.jsonl", random.Random(seed)
    assert rejection("--all-samples", str(path))[0] == 0
    whole = [by_place(file) for file in (files[1], path)]
    for file in (files[1], path):
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    status, _, _, err = rejection("--all-samples", str(path))
    assert status == 0, err
    assert [by_place(file) for file in (files[1], path)] == whole


def test_nothing_to_do_loads_no_model(rejection, stand_in):
    _, records, table, _ = rejection()
    stand_in.loaded.clear()
    assert rejection()[:3] == (0, records, table) and not stand_in.loaded


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--samples", "6"], "samples"),
        (["--temperature", "1.2"], "temperature"),
        (["--top-p", "0.9"], "top_p"),
        (["--seed", "1"], "seed"),
        (["--max-new-tokens", "9"], "max_new_tokens"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--checkpoint", "{tmp}"], "checkpoint"),
        (["--reward", "{tmp}"], "reward_model"),
        (["--safety-reward", "{tmp}"], "safety_reward_model"),
        (["--earlier", "{data}"], "earlier"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_option_needs_another_file(options, name, rejection, stand_in, files, tmp_path):
    path = tmp_path / "all.jsonl"
    assert rejection("--all-samples", str(path))[0] == 0
    kept = files[1].read_bytes()
    (tmp_path / "earlier").mkdir()
    write(tmp_path / "earlier" / "e.jsonl", [dialogue("one", "x")])
    options = [each.format(tmp=tmp_path, data=tmp_path / "earlier") for each in options]
    status, _, table, err = rejection(*options)
    assert (status, table) == (2, "") and err.count("\n") == 1
    assert "llama2: --out: expected results with " in err
    assert f"; got {name} " in err and files[1].read_bytes() == kept
    files[1].unlink()
    err = rejection(*options, "--all-samples", str(path))[3]
    assert f"--all-samples: expected results with {name}" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples: expected at least 1; got 0"),
        (["--temperature", "0"], "--temperature: expected more than 0, so that answers differ"),
        (["--all-samples", "{out}"], "--all-samples: expected a file other than --out's; got "),
        (["--all-samples", "{data}"], "--all-samples: expected a file other than --data's"),
        (["--summary", "{out}"], "--summary: expected a file other than --out's; got "),
        (["--summary", "{data}"], "--summary: expected a file other than --data's; got "),
        (["--format", "separator"], "--format: expected that of the reward model, chat; got "),
        (["--out", "{data}"], "--out: expected a file other than --data's; got "),
        (["--earlier", "{out}"], "--out: expected a file other than --earlier's; got "),
        (["--earlier", "{folder}"], "--out: expected a file other than --earlier's; got "),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(options, message, rejection, files, stand_in):
    data, out = files
    out.touch()
    options = [option.format(data=data, out=out, folder=data.parent) for option in options]
    status, records, table, err = rejection(*options)
    assert (status, records, table) == (2, {}, "")
    assert err.count("\n") == 1 and message in err


@pytest.mark.parametrize("option", ["--all-samples", "--summary"])
def test_nothing_that_is_read_is_written_to(option, rejection, stand_in, tmp_path):
    data, earlier = tmp_path / "prompts", tmp_path / "earlier"
    for folder in (data, earlier):
        folder.mkdir()
        write(folder / "a.jsonl", [dialogue("one", "given")])
    kept = (data / "a.jsonl").read_bytes()
    options = ("--data", str(data), "--earlier", str(earlier))
    for folder, name in ((data, "--data"), (earlier, "--earlier")):
        for file in ("a.jsonl", "new.jsonl"):
            status, _, _, err = rejection(*options, option, str(folder / file))
            assert status == 2 and f"{option}: expected a file other than {name}'s; got " in err
        assert [file.name for file in folder.iterdir()] == ["a.jsonl"]
        assert (folder / "a.jsonl").read_bytes() == kept
    both = str(tmp_path / "both.jsonl")
    err = rejection("--all-samples", both, "--summary", both)[3]
    assert "--summary: expected a file other than --all-samples's; got " in err


@pytest.mark.parametrize("name", ["weights_crc32", "reward_model", "safety_reward_model"])
def test_other_weights_in_the_same_directory_need_another_file(
    name, rejection, stand_in, weights, files
):
    places = {"weights_crc32": "HERE", "reward_model": "RM", "safety_reward_model": "SAFE"}
    options = ("--checkpoint", "HERE", "--safety-reward", "SAFE")
    assert rejection(*options)[0] == 0
    kept = files[1].read_bytes()
    weights[places[name]] = "12345678"
    status, _, _, err = rejection(*options)
    assert status == 2 and f"--out: expected results with {name} 12345678; " in err
    assert files[1].read_bytes() == kept


def test_another_tag_needs_another_file(rejection, stand_in, files):
    assert rejection()[0] == 0
    kept = files[1].read_bytes()
    write(files[0], [LINES[0] | {"safety": True}, *LINES[1:]])
    status, _, _, err = rejection()
    assert status == 2 and err.count("\n") == 1 and files[1].read_bytes() == kept
    assert '--out: expected results of prompts with the same "safety"; got safety False at ' in err


def test_a_result_that_cannot_be_written_is_named(rejection, stand_in, files, capfd):
    """By a limit on the size of files, which writes meet as they meet a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ValueError):  # of the half line, which the fixture reads
            rejection()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"llama2: {files[1]}: expected to write a result; " in capfd.readouterr().err
    assert rejection()[0] == 0 and len(by_place(files[1])) == len(LINES)


def test_a_run_that_is_killed_outright_is_gone_on_with(
    rejection, stand_in, files, tmp_path, device
):
    """By SIGKILL, at moments that nobody chooses, until a run comes to its end."""
    if device.type == "cuda":
        pytest.skip("a fork of a process that uses a GPU cannot use it")
    path, rng = tmp_path / "all.jsonl", random.SystemRandom()
    options = ("--all-samples", str(path))
    assert rejection(*options)[0] == 0
    written = (files[1], path)
    whole = [by_place(file) for file in written]

    def size():
        return sum(file.stat().st_size for file in written if file.exists())

    for file in written:
        file.unlink()
    sample = stand_in.sample
    stand_in.sample = lambda *which: time.sleep(0.004) or sample(*which)
    ended, num_killed = 0, 0
    while not ended:
        moment, child = size() + rng.randrange(1, 1500), os.fork()
        if not child:
            try:
                # Its own lock is one of all processes: a child that is killed would keep it.
                tqdm.set_lock(threading.RLock())
                torch.set_num_threads(1)  # a fork has no other threads to wait for
                rejection(*options)
            finally:
                os._exit(0)
        while not ended and size() < moment:
            time.sleep(0.001)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            num_killed += 1
    assert num_killed
    assert [by_place(file) for file in written] == whole


# --- models in earnest ----------------------------------------------------------------------------

PROMPTS = [{"prompt": "def f(x):"}, {"prompt": "import"}, {"prompt": "def f(x):"}]
DRAWN = ("--max-new-tokens", "60", "--max-batch", "4")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_one_sample_none_is_chosen(sign, rejection, earnest, judge, files, device, tmp_path):
    """The answers are those of `llama2 answer` with the same seed, whatever the rewards are."""
    write(files[0], PROMPTS)
    judge.helpful = lambda sequences: [sign * reward for reward in length(sequences)]
    # Of a seed of 64 bits a further 0 in a sample's place would not go unseen, as of a small one.
    drawn = ("--seed", str(2**40 + 5), "--temperature", "1.2", "--top-p", "0.95", *DRAWN)
    status, records, _, err = rejection(*drawn, samples=1)
    assert (status, len(records)) == (0, 3), err
    data, out = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    write(data, [dialogue(line["prompt"], "x") for line in PROMPTS])
    paths = ["--data", str(data), "--out", str(out), "--device", str(device)]
    assert cli.main(["answer", *paths, "--backend", "torch", *drawn]) == 0
    plain = by_place(out)
    assert {place: record["answer"] for place, record in plain.items()} == {
        place: record["messages"][-1]["content"] for place, record in records.items()
    }


def test_rewards_rise_with_the_number_of_samples(rejection, earnest, judge, files):
    """The first samples are the same ones; a fixed reward is never less, and somewhere more."""
    write(files[0], PROMPTS)
    judge.helpful = lambda sequences: [float(len(ids)) for ids in sequences]
    rewards = []
    for count in (1, 2, 8):
        files[1].unlink(missing_ok=True)
        status, records, _, err = rejection(*DRAWN, samples=count)
        assert (status, len(records)) == (0, 3), err
        rewards.append({place: record["reward"] for place, record in records.items()})
        for before in rewards[:-1]:
            assert all(rewards[-1][place] >= before[place] for place in before)
    means = [sum(each.values()) for each in rewards]
    assert means[0] < means[2] and means == sorted(means)


def test_samples_draw_apart_and_again_alike(rejection, earnest, files, tmp_path):
    """Those of one prompt, and those of the same prompt in another line; in a resumed run too."""
    write(files[0], PROMPTS)
    path = tmp_path / "all.jsonl"
    options = ("--all-samples", str(path), *DRAWN)
    status, _, _, err = rejection(*options, samples=6)
    assert status == 0, err
    drawn = by_place(path)
    first, third = (
        [sample["answer"] for sample in drawn[f"data.jsonl:{line}"]["samples"]] for line in (1, 3)
    )
    assert len({*first, *third}) > 8
    kept = files[1].read_text(encoding="utf-8").splitlines(keepends=True)[1:2]
    files[1].write_text("".join(kept), encoding="utf-8")
    path.unlink()
    whole = by_place(files[1])
    status, records, _, _ = rejection(*options, samples=6)
    assert status == 0 and by_place(path) == drawn and records.items() >= whole.items()


def test_a_prompt_goes_through_the_policy_once(rejection, earnest, model, files):
    write(files[0], PROMPTS[:2])
    prefilled = []
    hook = model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: prefilled.append(inputs[0].shape[1]) if len(inputs[0]) == 1 else None
    )
    assert rejection("--max-new-tokens", "20", "--max-batch", "8", samples=4)[0] == 0
    hook.remove()
    asked = [[{"role": "user", "content": line["prompt"]}] for line in PROMPTS[:2]]
    assert prefilled == [len(TOKENIZER.encode_chat(messages)) for messages in asked]


def test_reward_models_of_a_directory(rejection, files, tmp_path, device, monkeypatch):
    """Rewards are the model's at the EOS after the answer, of the ids that sft would train on."""
    monkeypatch.setattr(dialogue_jobs, "stop_ids", lambda *_: list(range(3, 1024, 5)))
    write(files[0], [*PROMPTS[:2], {"prompt": "class", "safety": True}])
    ops = get_backend("torch")  # the command's
    policy = checkpoint.load(checkpoint.SHIPPED_CHAT, ops, device=device)
    models = []
    for seed in (0, 1):
        models.append(ScalarModel.from_decoder(policy, ops, seed=seed))
        with torch.no_grad():
            models[-1].score.weight.mul_(20)  # rewards that lie apart
        folder = tmp_path / f"rm{seed}"
        checkpoint.save_hf(models[-1], folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(checkpoint.SHIPPED_CHAT / name, folder)
    options = ("--reward", str(tmp_path / "rm0"), "--safety-reward", str(tmp_path / "rm1"))
    path = tmp_path / "all.jsonl"
    status, records, _, err = rejection(*options, *DRAWN, "--all-samples", str(path))
    assert status == 0, err
    assert len(records) == 3
    scorers = [Scorer(model) for model in models]
    for record in by_place(path).values():
        usable = [sample for sample in record["samples"] if sample["fault"] is None]
        rewards = {sample["answer"]: sample["reward"] for sample in usable}
        sequences = []
        for answer in rewards:
            said = (*record["messages"], {"role": "assistant", "content": answer})
            dialogue = Dialogue(said, (True,), "s", Path("f"), 1)
            sequences.append(encode_dialogue(TOKENIZER, dialogue, "chat").ids.tolist())
            assert sequences[-1][-1] == TOKENIZER.eos_id
        scores = zip(*(scorer(sequences) for scorer in scorers), strict=True)
        found = [combined(*both, record["safety"]) for both in scores]
        assert found == list(rewards.values()) != []
    best = records["data.jsonl:3"]
    assert best["safety"] and best["reward"] == max(x for x in best["rewards"] if x is not None)
