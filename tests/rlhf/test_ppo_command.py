"""`llama2 ppo`: from prompts and reward models to a checkpoint, and killed at any moment."""

import argparse
import json
import shutil

import pytest
import torch
from killed_runs import check_killed_runs

from gqa_kernels.backends import get_backend
from llama2.chat_format import CHAT_TEMPLATES
from llama2.checkpoint import SHIPPED, load, save_hf
from llama2.commands import ppo, ppo_options, reward, reward_options
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.scalar_model import ScalarModel
from llama2.train.state import read_log

SHAPE = ModelConfig(
    vocab_size=1024,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_seq_len=64,
)
RECIPE = ("--iterations", 2, "--batch-size", 8, "--mini-batch-size", 4, "--lr", 1e-3)
RECIPE += ("--max-new-tokens", 8, "--threads", 1, "--backend", "torch")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    ppo_options.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def save(model, path, template="chat"):
    save_hf(model, path, dtype=torch.bfloat16)
    shutil.copyfile(SHIPPED / "tokenizer.model", path / "tokenizer.model")
    settings = json.dumps({"chat_template": CHAT_TEMPLATES[template]})
    (path / "tokenizer_config.json").write_text(settings, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A chat model, two reward models, prompts."""
    torch.manual_seed(0)
    ops = get_backend("eager")
    for name, model in (("chat", Llama2), ("helpful", ScalarModel), ("safe", ScalarModel)):
        save(model(SHAPE, ops), tmp_path / name)
    lines = [{"prompt": f"Say {word}.", "safety": word == "cat"} for word in ("cat", "dog", "one")]
    write(tmp_path / "prompts.jsonl", lines)
    return tmp_path


def options(folder, **changed):
    found = {"work": "work", "out": "out", "init": "chat", "data": "prompts.jsonl"}
    found |= {"reward": "helpful", "safety_reward": "safe"} | changed
    pairs = [(f"--{name.replace('_', '-')}", folder / path) for name, path in found.items() if path]
    return [part for pair in pairs for part in pair]


@pytest.mark.parametrize("group_size", [0, 2])
def test_prompts_become_a_checkpoint(folder, group_size, capsys):
    run = (*options(folder), *RECIPE, "--group-size", group_size)
    assert ppo.run(parse(*run)) == 0
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    log = read_log(folder / "work" / "log.jsonl")
    assert len(log) == 2 and record["prompts"] == 3
    assert record["first_reward"] == log[0]["reward"]
    assert record["ppo_config"]["kl_weight"] == 0.01 and record["made_with"]["packages"]
    assert all(line["first_ratio_deviation"] == 0 == line["gathers"] for line in log)
    assert log[0]["kl"] == 0.0 < log[0]["entropy"] and log[0]["reward_safety"] is not None
    assert (log[0]["value_loss"] is None) == (group_size > 0)
    settings = json.loads((folder / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == CHAT_TEMPLATES["chat"]
    tuned = load(folder / "out", get_backend("eager"), dtype=torch.float32)
    before = load(folder / "chat", get_backend("eager"), dtype=torch.float32)
    assert not tuned.lm_head.weight.equal(before.lm_head.weight)
    assert "2 iterations over 3 prompts; mean reward" in capsys.readouterr().out
    assert ppo.run(parse(*run)) == 0  # nothing is left to do
    assert ppo.run(parse(*run, "--iterations", 3)) == 0  # and here one iteration is
    assert read_log(folder / "work" / "log.jsonl")[:2] == log


def test_in_bfloat16_the_first_ratio_is_one_to_the_bit(folder):
    run = (*options(folder), *RECIPE, "--bf16", "--micro-batch-size", 2)
    assert ppo.run(parse(*run)) == 0
    log = read_log(folder / "work" / "log.jsonl")
    assert [line["first_ratio_deviation"] for line in log] == [0.0, 0.0]
    assert log[0]["kl"] == 0.0 != log[1]["kl"]  # policy and reference compute in one dtype


def test_bad_lines_are_named_and_nothing_is_lost(folder, capsys):
    lines = [{"prompt": "word " * 60}, {"messages": []}, {"prompt": "Say red."}]
    write(folder / "prompts.jsonl", lines)
    run = (*options(folder), *RECIPE)
    with pytest.raises(ValueError, match="data: expected no bad lines; got 2, for the reasons"):
        ppo.run(parse(*run))
    shown = capsys.readouterr().err
    assert "prompts.jsonl:1: messages: expected" in shown and "prompts.jsonl:2: " in shown
    assert not (folder / "work" / "log.jsonl").exists()
    assert ppo.run(parse(*run, "--skip-bad-lines")) == 0
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    assert (record["prompts"], record["bad_lines"]) == (1, 2)


def test_a_prompt_has_to_leave_room_for_the_whole_answer(folder, capsys):
    with pytest.raises(ValueError, match="expected at least one prompt; got none and 3 bad"):
        ppo.run(parse(*options(folder), *RECIPE, "--max-new-tokens", 60))
    assert "expected at most 4 tokens before an answer of 60; got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"reward": "chat"}, (), "chat: expected a reward model"),
        ({"safety_reward": "other"}, (), "other: expected the format of dialogues of "),
        ({"safety_reward": None}, (), "data: expected no bad lines; got 1, for the reasons above"),
        ({"data": "none.jsonl"}, (), r"none\.jsonl: expected a JSON-lines file"),
        ({"out": "chat"}, (), "out: expected a directory other than --init"),
        ({"work": "helpful"}, (), "work: expected a directory other than --reward; got "),
        ({"out": "safe"}, (), "out: expected a directory other than --safety-reward; got "),
        ({}, ("--lr", "nan"), "lr: expected a positive number; got nan"),
        ({}, ("--iterations", 10**9), "iterations: expected fewer than .*; got 1000000000 of 8"),
        ({}, ("--max-new-tokens", 64), r"max_new_tokens: expected less than .* \(64\), .*; got 64"),
        ({}, ("--mini-batch-size", 3), r"mini_batch_size: expected a divisor of batch_size \(8\)"),
        ({}, ("--group-size", 3), "group_size: expected a divisor"),
        ({}, ("--group-size", 1), "group_size: expected 0 or at least 2"),
        ({}, ("--temperature", 0), "temperature: expected a positive number; got 0"),
        ({}, ("--kl-weight", -1), "kl_weight: expected at least 0; got -1"),
        ({}, ("--trace-decay", 2), "trace_decay: expected from 0 to 1; got 2"),
        ({}, ("--micro-batch-size", 8), r"micro_.*: .* divisor of mini_batch_size \(4\); got 8"),
        ({}, ("--max-batch", 0), "max_batch: expected at least 1; got 0"),
        (
            {},
            ("--tp", 2),
            "tp: expected processes started by torchrun; got --tp 2",
        ),
    ],
)
def test_what_a_user_can_cause(folder, changed, more, message):
    save(ScalarModel(SHAPE, get_backend("eager")), folder / "other", template="separator")
    with pytest.raises((OSError, ValueError), match=message):
        ppo.run(parse(*options(folder, **changed), *RECIPE, *more))
    assert not (folder / "out" / "training.json").exists()


def test_other_prompts_and_rewards_are_another_run(folder):
    assert ppo.run(parse(*options(folder), *RECIPE)) == 0
    with pytest.raises(ValueError, match="state of a run with inputs reward_crc32="):
        ppo.run(parse(*options(folder, reward="safe"), *RECIPE))
    write(folder / "prompts.jsonl", [{"prompt": "Say red."}])
    with pytest.raises(ValueError, match="expected the state of a run with prompts num_prompts=1"):
        ppo.run(parse(*options(folder), *RECIPE))


@pytest.mark.parametrize("name", ["init", "reward", "safety_reward"])
def test_other_weights_in_the_same_directory_are_another_run(name, folder):
    assert ppo.run(parse(*options(folder), *RECIPE)) == 0
    path, kept = folder / {"init": "chat", "reward": "helpful"}.get(name, "safe"), folder / "kept"
    shutil.copytree(path, kept)
    file, torn = path / "model.safetensors", folder / "torn"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last bit of a weight's exponent or sign
    torn.write_bytes(content)
    torn.replace(file)  # not in place: what is mapped into memory stays
    with pytest.raises(ValueError, match=f"state of a run with inputs {name}_crc32="):
        ppo.run(parse(*options(folder), *RECIPE, "--iterations", 3))
    if name != "init":  # elsewhere, the same weights are the same
        assert ppo.run(parse(*options(folder, **{name: "kept"}), *RECIPE)) == 0


def test_the_state_of_another_command_is_named(folder):
    assert ppo.run(parse(*options(folder), *RECIPE)) == 0
    parser = argparse.ArgumentParser()
    reward_options.add_arguments(parser)
    line = {"prompt": "Say red.", "chosen": "red", "rejected": "blue"}
    data = write(folder / "comparisons.jsonl", [line])
    run = ("--work", folder / "work", "--out", folder / "rm", "--init", folder / "chat")
    run += ("--data", data, "--backend", "torch")
    with pytest.raises(ValueError, match=r"model_config, train_config, .*; got no train_config"):
        reward.run(parser.parse_args([str(part) for part in run]))


def test_a_run_does_not_say_that_it_had_fewer_iterations(folder):
    assert ppo.run(parse(*options(folder), *RECIPE)) == 0
    before = (folder / "out" / "training.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"iterations: expected at least the 2 of the run in .*; got 1"
    ):
        ppo.run(parse(*options(folder), *RECIPE, "--iterations", 1))
    assert (folder / "out" / "training.json").read_bytes() == before


def test_a_last_step_that_goes_too_far_is_not_exported(folder):
    """Nothing is computed after it that would not be finite."""
    run = (*options(folder), *RECIPE, "--iterations", 1, "--batch-size", 4, "--lr", 1e39)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="expected finite weights after the last step"):
            ppo.run(parse(*run))
        assert not list((folder / "out").glob("*.json"))


def test_killed_at_random_moments_the_command_gives_the_same_bits(folder):
    named = {"init": "chat", "data": "prompts.jsonl", "reward": "helpful", "safety-reward": "safe"}
    run = [part for name, path in named.items() for part in (f"--{name}", folder / path)]
    run += (*RECIPE, "--iterations", 16, "--micro-batch-size", 2, "--save-every", 3)
    assert check_killed_runs("ppo", tuple(run), folder) == 16
