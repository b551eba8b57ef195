"""`llama2 reward`: from comparisons to a checkpoint that scores, and killed at any moment."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from killed_runs import check_killed_runs

from gqa_kernels.backends import get_backend
from llama2.checkpoint import SHIPPED_CHAT, load_scalar, save_hf
from llama2.commands import reward, reward_options
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.rlhf.comparisons import RATINGS
from llama2.taught_format import taught_format
from llama2.tokenizer import Tokenizer
from llama2.train.state import read_log

EAGER = get_backend("eager")
SHAPE = ModelConfig(
    vocab_size=1024,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_seq_len=64,
)
WORDS = ("red", "blue", "cat", "dog", "tree", "one", "two")
RECIPE = ("--batch-size", 8, "--peak-lr", 1e-2, "--threads", 1, "--backend", "torch")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    reward_options.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def comparison(number, **more):
    """An answer that names what was asked for is better than one that does not."""
    asked, other = WORDS[number % 7], WORDS[(number + number // 7 % 6 + 1) % 7]
    line = {"prompt": f"Say {asked}.", "chosen": f"Yes: {asked}.", "rejected": f"No: {other}."}
    return line | {"rating": RATINGS[number % 4]} | more


def write(path, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A chat model, comparisons, and options of a run."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    save_hf(Llama2(SHAPE, EAGER), base, dtype=torch.bfloat16)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(SHIPPED_CHAT / name, base / name)
    write(tmp_path / "train.jsonl", [comparison(number) for number in range(40)])
    held_out = [comparison(number, source="held") for number in range(40, 52)]
    write(tmp_path / "held.jsonl", held_out)
    return tmp_path


def options(folder, **changed):
    found = {"work": "work", "out": "out", "init": "base", "data": "train.jsonl"} | changed
    pairs = [(f"--{name.replace('_', '-')}", folder / value) for name, value in found.items()]
    return [part for pair in pairs for part in pair]


def record_of(folder, out="out"):
    return json.loads((folder / out / "training.json").read_text(encoding="utf-8"))


def test_comparisons_become_a_reward_model(folder, capsys):
    run = (*options(folder, held_out="held.jsonl"), *RECIPE, "--epochs", 8)
    assert reward.run(parse(*run)) == 0
    shown, record = capsys.readouterr(), record_of(folder)
    log = read_log(folder / "work" / "log.jsonl")
    assert len(log) == record["train_config"]["steps"] == 40
    assert record["train_config"]["warmup_steps"] == 5 and log[4]["lr"] == 1e-2
    assert log[-1]["lr"] == pytest.approx(1e-3)
    assert log[-1].keys() == {"step", "loss", "lr", "grad_norm", "seconds"}
    assert record["comparisons"] == 40 and record["margins"] == "small"
    assert record["ratings"] == dict.fromkeys(RATINGS, 10)
    assert record["sources"] == {"train.jsonl": 40} and record["format"] == "chat"
    held_out = record["held_out"]
    assert held_out["sources"] == {"held": 12} and held_out["after"]["accuracy"] > 0.9
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    assert sum(each["pairs"] for each in held_out["after"]["by_rating"].values()) == 12
    assert "made_with" in record and "held out: " in shown.out and "margins: small" in shown.err
    assert "significantly better: 3 of 3 right" in shown.out
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {
        *("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"),
        "training.json",
    }
    assert taught_format(folder / "out") == "chat"
    assert reward.run(parse(*run)) == 0  # nothing is left to do


def test_a_last_step_that_goes_too_far_leaves_no_reward_model(folder):
    """Its loss is finite, the scores of held-out pairs are not."""
    run = (*options(folder, held_out="held.jsonl"), *RECIPE, "--batch-size", 40)
    run += ("--warmup-steps", 0, "--peak-lr", 1e39)
    with pytest.raises(FloatingPointError, match=r"held_out: expected finite scores; got .* of 12"):
        reward.run(parse(*run))
    assert not (folder / "out" / "training.json").exists()


def test_a_reward_model_is_gone_on_with(folder):
    """With its head, which a chat model gets anew."""
    once = (*options(folder, held_out="held.jsonl"), *RECIPE, "--epochs", 4)
    assert reward.run(parse(*once)) == 0
    again = options(folder, held_out="held.jsonl", work="work2", out="out2", init="out")
    assert reward.run(parse(*again, *RECIPE, "--epochs", 1)) == 0
    before = record_of(folder, "out2")["held_out"]["before"]
    assert before == record_of(folder)["held_out"]["after"]


def test_transformers_gives_the_same_scores(folder):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    assert reward.run(parse(*options(folder), *RECIPE, "--epochs", 4)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "out", dtype=torch.float32
    )
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    ours = load_scalar(folder / "out", EAGER, dtype=torch.float32)
    ids = Tokenizer(folder / "out" / "tokenizer.model")
    for answer in ("Yes: red.", "No: blue."):
        dialogue = [{"role": "user", "content": "Say red."}]
        dialogue.append({"role": "assistant", "content": answer})
        tokens = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
        expected = ids.encode(f"[INST] Say red. [/INST] {answer} ", bos=True, eos=True)
        assert tokens["input_ids"].tolist() == [expected]
        with torch.no_grad():
            score = theirs(**tokens).logits
            found = ours(torch.tensor([expected]))[0, -1]
        assert score.shape == (1, 1)
        torch.testing.assert_close(found, score[0, 0], rtol=1e-5, atol=1e-6)


BAD = [
    '{"chosen": "a"}\n',
    '{"prompt": "q", "chosen": "a", "rejected": " a "}\n',
    '{"prompt": "q", "chosen": "a", "rejected": "b", "rating": "best"}\n',
    '{"prompt": "q", "chosen": "a", "rejected": "' + "word " * 100 + '"}\n',
    '{"prompt": "q", "chosen": "' + "x" * 10**6 + '", "rejected": "b"}\n',
]


def test_bad_lines_are_named_and_nothing_is_lost(folder, capsys):
    good = [comparison(number) for number in range(7)]
    path = write(folder / "train.jsonl", [*BAD, *good])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    write(folder / "held.jsonl", ["[]\n", *good])
    run = (*options(folder, held_out="held.jsonl"), *RECIPE)
    with pytest.raises(ValueError, match="data: expected no bad lines; got 7, for the reasons"):
        reward.run(parse(*run))
    shown = capsys.readouterr().err.splitlines()
    complaints = [line.split("train.jsonl:")[1] for line in shown if "train.jsonl:" in line]
    assert [line.split(":")[0] for line in complaints] == [*"12345", "13"]
    reasons = ('expected "chosen" and', "an answer other", "rating", "rejected: ", "chosen: ")
    assert all(why in line for why, line in zip(reasons, complaints, strict=False))
    assert "expected at most 64 tokens" in complaints[3] and "or more" in complaints[4]
    assert any("held.jsonl:1: line: expected a JSON object" in line for line in shown)
    assert not (folder / "work" / "state.pt").exists()
    assert not (folder / "out" / "model.safetensors").exists()
    assert reward.run(parse(*run, "--skip-bad-lines")) == 0
    assert (record_of(folder)["comparisons"], record_of(folder)["bad_lines"]) == (7, 7)


def test_margins_need_ratings(folder, capsys):
    lines = [comparison(0), comparison(1, rating=None), comparison(2)]
    write(folder / "train.jsonl", lines)
    write(folder / "held.jsonl", lines)  # which no margin is applied to
    run = (*options(folder, held_out="held.jsonl"), *RECIPE)
    with pytest.raises(ValueError, match="expected no bad lines; got 1, for the reasons above"):
        reward.run(parse(*run, "--margins", "large"))
    assert "train.jsonl:2: rating: expected one of significantly" in capsys.readouterr().err
    assert reward.run(parse(*run)) == 0
    assert "3 comparisons, margins: none (1 without a rating); " in capsys.readouterr().err
    assert record_of(folder)["margins"] == "none"
    assert record_of(folder)["ratings"]["unrated"] == 1
    with pytest.raises(ValueError, match="expected the state of a run with "):
        reward.run(parse(*run, "--margins", "small", "--skip-bad-lines"))


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"data": "none.jsonl"}, (), r"none\.jsonl: expected a JSON-lines file"),
        ({"data": "empty.jsonl"}, (), r"empty\.jsonl: expected at least one comparison; got none"),
        ({"out": "base"}, (), "out: expected a directory other than --init"),
        ({"init": "nowhere"}, (), "nowhere"),
        ({}, ("--epochs", 0), "epochs: expected a positive number; got 0"),
        ({}, ("--seq-len", 65), r"at most the model's max_seq_len \(64\); got 65"),
        ({}, ("--micro-batch-size", 3), "micro_batch_size: expected a divisor"),
        (
            {},
            ("--tp", 2),
            "tp: expected processes started by torchrun; got --tp 2",
        ),
    ],
)
def test_what_a_user_can_cause(folder, changed, more, message):
    write(folder / "empty.jsonl", ["\n"])
    with pytest.raises((OSError, ValueError), match=message):
        reward.run(parse(*options(folder, **changed), *RECIPE, *more))


@pytest.mark.parametrize(
    ("epochs", "more", "expected"),
    [(200, (), 6), (1, (), 5), (1, ("--warmup-steps", 0), 0)],
)
def test_the_warm_up_is_a_share_of_the_steps(folder, epochs, more, expected):
    write(folder / "train.jsonl", [comparison(0)])
    run = (*options(folder), *RECIPE, "--batch-size", 1, "--epochs", epochs, *more)
    assert reward.run(parse(*run)) == 0
    assert record_of(folder)["train_config"]["warmup_steps"] == expected


def test_an_answer_of_the_models_longest_length_is_scored(folder):
    """All its tokens are read, unlike those of a dialogue that is trained on."""
    tokenizer = Tokenizer(SHIPPED_CHAT / "tokenizer.model")

    def size(answer):
        return len(tokenizer.encode(f"[INST] q [/INST] {answer} ", bos=True, eos=True))

    answer = next(text for n in range(64) if size(text := "a b" + " c" * n) == 64)
    write(folder / "train.jsonl", [{"prompt": "q", "chosen": answer, "rejected": "b"}])
    assert reward.run(parse(*options(folder), *RECIPE)) == 0
    write(folder / "train.jsonl", [{"prompt": "q", "chosen": answer + " c", "rejected": "b"}])
    with pytest.raises(ValueError, match="expected at least one comparison; got none and 1 bad"):
        reward.run(parse(*options(folder, work="work2", out="out2"), *RECIPE))


@pytest.mark.long
def test_two_processes_train_the_same_model(folder):
    run = ("--held-out", folder / "held.jsonl", *RECIPE, "--micro-batch-size", 2, "--epochs", 1)
    assert reward.run(parse(*options(folder), *run)) == 0
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command += ("-m", "llama2", "reward", *options(folder, work="work2", out="out2"), *run)
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for one, two in zip(
        read_log(folder / "work" / "log.jsonl"),
        read_log(folder / "work2" / "log.jsonl"),
        strict=True,
    ):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    one, two = record_of(folder)["held_out"], record_of(folder, "out2")["held_out"]
    assert two["before"]["loss"] == pytest.approx(one["before"]["loss"], rel=1e-5)
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-2)


@pytest.mark.long
def test_killed_at_random_moments_the_command_gives_the_same_bits(folder):
    run = ("--data", folder / "train.jsonl", "--init", folder / "base", "--held-out")
    run += (folder / "held.jsonl", "--micro-batch-size", 2, "--save-every", 4, *RECIPE)
    assert check_killed_runs("reward", (*run, "--batch-size", 4, "--epochs", 5), folder) == 50
