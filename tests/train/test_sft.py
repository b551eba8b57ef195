"""`llama2 sft`: from dialogues to a checkpoint that answers, and killed at any moment."""

import argparse
import json
import shutil

import pytest
import torch
from killed_runs import check_killed_runs

from gqa_kernels.backends import get_backend
from llama2.chat_format import CHAT_TEMPLATES
from llama2.checkpoint import SHIPPED, load, save_hf
from llama2.cli import main
from llama2.commands import sft, sft_options
from llama2.config import ModelConfig
from llama2.finetune.encoding import encode_prompt
from llama2.generate import Generator
from llama2.model import Llama2
from llama2.tokenizer import Tokenizer
from llama2.train.state import read_log

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
RECIPE = ("--batch-size", 4, "--epochs", 1, "--peak-lr", 1e-2, "--threads", 1, "--backend", "eager")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    sft_options.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def dialogue(*words, **more):
    turns = [
        ("user", f"Say {word}.") if n % 2 == 0 else ("assistant", word)
        for n, word in enumerate(word for word in words for _ in range(2))
    ]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(path, lines):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A base model, dialogues, and options of a run."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    save_hf(Llama2(SHAPE, get_backend("eager")), base, dtype=torch.bfloat16)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED / name, base / name)
    lines = [dialogue(*(WORDS[(n + m) % 7] for m in range(n % 3 + 1))) for n in range(40)]
    write(tmp_path / "train.jsonl", lines)
    write(
        tmp_path / "held.jsonl",
        [dialogue(word * 2, source="held") for word in WORDS],
    )
    return tmp_path


def options(folder, **changed):
    found = {"work": "work", "out": "out", "init": "base", "data": "train.jsonl"} | changed
    pairs = [(f"--{name.replace('_', '-')}", folder / value) for name, value in found.items()]
    return [part for pair in pairs for part in pair]


def test_dialogues_become_a_checkpoint(folder, capsys):
    run = (*options(folder, held_out="held.jsonl"), *RECIPE, "--epochs", 3)
    assert sft.run(parse(*run)) == 0
    shown = capsys.readouterr()
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    log = read_log(folder / "work" / "log.jsonl")
    assert len(log) == record["train_config"]["steps"] > 3
    assert log[-1]["loss"] < log[0]["loss"] and "% of them padding" in shown.err
    assert record["held_out"]["loss"] < record["held_out"]["loss_before"]
    assert record["sources"]["train.jsonl"]["documents"] == record["dialogues"] == 40
    assert record["held_out"]["sources"]["held"]["documents"] == 7
    assert record["format"] == "chat" and "nats per token of an answer" in shown.out
    settings = json.loads((folder / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == CHAT_TEMPLATES["chat"] and settings["bos_token"] == "<s>"
    ends = json.loads((folder / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert ends == {"bos_token_id": 1, "eos_token_id": 2}
    tuned = load(folder / "out", get_backend("eager"), dtype=torch.float32)
    base = load(folder / "base", get_backend("eager"), dtype=torch.float32)
    assert not tuned.lm_head.weight.equal(base.lm_head.weight)
    assert sft.run(parse(*run)) == 0  # nothing is left to do


@pytest.mark.parametrize("form", ["chat", "separator"])
def test_a_model_learns_its_answers(form, folder, capsys, monkeypatch):
    """And `llama2 chat` asks in the format that it was taught."""
    write(folder / "train.jsonl", [dialogue("red")])
    recipe = (*RECIPE, "--epochs", 60, "--batch-size", 1, "--format", form)
    assert sft.run(parse(*options(folder), *recipe)) == 0
    lines, prompts = iter(["Say red.", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    stream = Generator.stream
    monkeypatch.setattr(
        Generator,
        "stream",
        lambda self, asked, **kw: prompts.append(asked) or stream(self, asked, **kw),
    )
    capsys.readouterr()
    assert main(["chat", "--checkpoint", str(folder / "out"), "--backend", "eager"]) == 0
    assert capsys.readouterr().out.strip() == "red"
    question = [{"role": "user", "content": "Say red."}]
    tokenizer = Tokenizer(folder / "out" / "tokenizer.model")
    assert prompts == [[encode_prompt(tokenizer, question, form)]]


BAD = [
    '{"messages": [{"content": "q"}]}\n',
    '{"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]}\n',
    '{"prompt": "q", "completion": " "}\n',
    '{"prompt": "q", "completion": "' + "word " * 100 + '"}\n',
    '{"prompt": "q", "completion": "' + "x" * 10**6 + '"}\n',
]


def test_bad_lines_are_named_and_nothing_is_lost(folder, capsys):
    good = [dialogue(word) for word in WORDS]
    path = write(folder / "train.jsonl", [*BAD, *good])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    run = (*options(folder), *RECIPE)
    with pytest.raises(ValueError, match="data: expected no bad lines; got 6, for the reas"):
        sft.run(parse(*run))
    complaints = [line for line in capsys.readouterr().err.splitlines() if "train.jsonl:" in line]
    assert [line.split("train.jsonl:")[1].split(":")[0] for line in complaints] == [*"12345", "13"]
    assert "expected at most 65 tokens" in complaints[3] and "or more" in complaints[4]
    assert not (folder / "work" / "state.pt").exists()
    assert not (folder / "out" / "model.safetensors").exists()
    assert sft.run(parse(*run, "--skip-bad-lines")) == 0
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["dialogues"] == 7 and record["bad_lines"] == 6


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"data": "none.jsonl"}, (), r"none\.jsonl: expected a JSON-lines file"),
        ({"data": "empty.jsonl"}, (), r"empty\.jsonl: expected at least one dialogue; got 0 bad"),
        ({"out": "base"}, (), "out: expected a directory other than --init"),
        ({"work": "base"}, (), "work: expected a directory other than --init"),
        ({"init": "nowhere"}, (), "nowhere"),
        ({}, ("--epochs", 0), "epochs: expected a positive number; got 0"),
        (
            {},
            ("--seq-len", 65),
            r"seq_len: expected at most the model's max_seq_len \(64\); got 65",
        ),
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
        sft.run(parse(*options(folder, **changed), *RECIPE, *more))


def test_care_is_taken_of_dialogues(folder, capsys):
    """Of each message by itself, so that the roles stay; counts are told by source."""
    long = "one two red blue cat dog tree one two"
    lines = [
        dialogue("red", source="private"),
        {"prompt": "Write to a@gmail.com.", "completion": "b@web.de", "source": "mail"},
        {"prompt": long, "completion": "red", "source": "twice"},
        {"prompt": long + " red", "completion": "red", "source": "twice"},
    ]
    write(folder / "train.jsonl", lines)
    write(folder / "held.jsonl", [lines[1], dialogue("cat")])
    run = (*options(folder, held_out="held.jsonl"), *RECIPE)
    care = ("--exclude", "priv*", "--exclude", "none", "--redact", "--drop-near-duplicates", 0.7)
    assert sft.run(parse(*run, *care)) == 0
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    kept = {name: counts["documents"] for name, counts in record["sources"].items()}
    assert kept == {"private": 0, "mail": 1, "twice": 1}
    assert record["sources"]["private"]["excluded"] == 1
    assert record["sources"]["mail"]["redacted"] == {"EMAIL_ADDRESS": 2}
    assert record["sources"]["twice"]["near_duplicates"] == 1
    assert record["held_out"]["dialogues"] == 1  # the other is among those for training
    assert record["care"]["exclude"] == ["priv*", "none"]
    shown = capsys.readouterr()
    assert "exclude: no document or source matches 'none'" in shown.err
    assert "mail: 1 dialogue," in shown.out and "redacted: EMAIL_ADDRESS 2" in shown.out


def test_a_dialogue_that_is_too_long_is_no_near_duplicates_first(folder):
    """Otherwise neither would be trained on."""
    words = "a b c d e f g h i j"
    lines = [
        {"prompt": words, "completion": f"k b@web.de {'x' * 200}"},
        {"prompt": words, "completion": "k"},
    ]
    write(folder / "train.jsonl", lines)
    care = ("--redact", "--drop-near-duplicates", 0.5, "--skip-bad-lines")
    assert sft.run(parse(*options(folder), *RECIPE, *care)) == 0
    record = json.loads((folder / "out" / "training.json").read_text(encoding="utf-8"))
    assert (record["dialogues"], record["bad_lines"]) == (1, 1)
    counts = record["sources"]["train.jsonl"]
    assert counts["documents"] == 1 and counts["near_duplicates"] == 0 == len(counts["redacted"])


def test_space_around_a_text_takes_no_room(folder):
    space = " " * 10**5
    write(folder / "train.jsonl", [{"prompt": f"q{space}", "completion": f"{space}\nr"}])
    assert sft.run(parse(*options(folder), *RECIPE)) == 0


def test_a_damaged_tokenizer_config_is_named_before_the_training(folder):
    (folder / "base" / "tokenizer_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a JSON object; got "):
        sft.run(parse(*options(folder), *RECIPE))
    assert not (folder / "work" / "log.jsonl").exists()


def test_transformers_gives_the_answer_and_ends_it(folder):
    """Loaded as it is, by its own template; and what --init says of generation is kept."""
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    write(folder / "train.jsonl", [dialogue("red")])
    said = {"eos_token_id": [2, 1], "temperature": 0.5, "do_sample": True}
    (folder / "base" / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    recipe = (*RECIPE, "--epochs", 60, "--batch-size", 1)
    assert sft.run(parse(*options(folder), *recipe)) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    asked = [{"role": "user", "content": "Say red."}]
    prompt = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)
    found = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    ours = Tokenizer(folder / "out" / "tokenizer.model")
    answer = ours.encode("[INST] Say red. [/INST] red ", eos=True)
    assert found.tolist() == answer
    kept = json.loads((folder / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert kept == {"bos_token_id": 1} | said


def test_other_dialogues_are_another_run(folder):
    run = (*options(folder), *RECIPE)
    assert sft.run(parse(*run)) == 0
    write(folder / "train.jsonl", [dialogue("red")] * 40)
    with pytest.raises(ValueError, match="expected the state of a run with "):
        sft.run(parse(*run))


def test_killed_at_random_moments_the_command_gives_the_same_bits(folder):
    run = ("--data", folder / "train.jsonl", "--init", folder / "base", "--held-out")
    run += (folder / "held.jsonl", "--micro-batch-size", 2, "--save-every", 4, *RECIPE)
    assert check_killed_runs("sft", (*run, "--epochs", 12), folder) > 40
