"""`llama2 pretrain`: from texts or shards to a checkpoint, and killed at any moment."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killed_runs import check_killed_runs

from gqa_kernels.backends import get_backend
from llama2.checkpoint import SHIPPED, load, load_config
from llama2.commands import pretrain, pretrain_options, training
from llama2.config import PUBLISHED, ModelConfig
from llama2.storage import locked
from llama2.tokenizer import Tokenizer
from llama2.train.data import Document
from llama2.train.ownership import check_held, claimed
from llama2.train.shards import write_shards
from llama2.train.state import read_log

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "max_seq_len": 32,
}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    pretrain_options.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def shape_of(*arguments):
    return pretrain_options.model_config(parse("--work", "w", "--out", "o", *arguments))


@pytest.fixture
def folders(tmp_path):
    """Options of a small run with a shape of its own, and a folder of 60 texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(
            f"The square of {number} is {number**2}.\n" * 3, encoding="utf-8"
        )
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE), encoding="utf-8")
    return ["--work", tmp_path / "work", "--out", tmp_path / "out", "--shape", shape], texts


RECIPE = ("--steps", 3, "--batch-size", 2, "--warmup-steps", 1, "--backend", "eager")


def test_shapes(tmp_path):
    small = shape_of()
    assert small == load_config(SHIPPED)
    assert shape_of("--shape", "70B") == PUBLISHED["70B"]
    wide = shape_of("--shape", "7B", "--hidden-size", 256, "--num-q-heads", 8, "--num-kv-heads", 2)
    assert (wide.hidden_size, wide.head_dim, wide.num_kv_heads) == (256, 32, 2)
    assert (wide.num_layers, wide.vocab_size) == (32, 32000)
    sizes = ("num-layers", "intermediate-size", "max-seq-len", "vocab-size", "num-kv-heads")
    changed = shape_of(*(x for size in sizes for x in (f"--{size}", 1)))
    assert changed.head_dim == small.head_dim
    assert {getattr(changed, size.replace("-", "_")) for size in sizes} == {1}
    (tmp_path / "x.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    assert shape_of("--shape", tmp_path / "x.json") == ModelConfig(**SHAPE)
    config = (SHIPPED / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 6', '"x": 0'), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"config\.json: missing key num_hidden_layers"):
        shape_of("--shape", tmp_path / "config.json")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert shape_of("--shape", tmp_path / "config.json") == small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "8B"), "shape: expected one of 7B, 13B, 34B, 70B or a JSON file; got '8B'"),
        (("--num-q-heads", 3), r"hidden_size: expected a multiple of num_q_heads \(3\); got 128"),
        (("--num-q-heads", 0), r"hidden_size: expected a multiple of num_q_heads \(0\); got 128"),
        (("--num-kv-heads", 3), r"num_q_heads: expected a multiple of num_kv_heads \(3\)"),
    ],
)
def test_shapes_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        shape_of(*arguments)


def test_a_shape_file_of_other_fields(tmp_path):
    (tmp_path / "x.json").write_text('{"width": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: expected the fields of ModelConfig; .*width"):
        shape_of("--shape", tmp_path / "x.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('"tie_word_embeddings": "no"', "tie_word_embeddings: expected True or False; got 'no'"),
        ('"rope_interleaved": 1', "rope_interleaved: expected True or False; got 1"),
        ('"num_layers": true', "num_layers: expected an int from 1 to 2147483647; got True"),
        ('"max_seq_len": 2000000', "max_seq_len: expected an int from 1 to 1048576; got 2000000"),
        ('"norm_eps": "abc"', "norm_eps: expected a positive number; got 'abc'"),
        ('"norm_eps": [1]', r"norm_eps: expected a positive number; got \[1\]"),
        ('"norm_eps": NaN', "norm_eps: expected a positive number; got nan"),
        ('"norm_eps": -1', "norm_eps: expected a positive number; got -1"),
        ('"rope_theta": "10000"', "rope_theta: expected a positive number; got '10000'"),
        ('"rope_theta": 0', "rope_theta: expected a positive number; got 0"),
        (f'"rope_theta": 1{"0" * 400}', "rope_theta: expected a positive number; got 1000"),
    ],
)
def test_a_shape_file_of_wrong_values(wrong, message, tmp_path):
    fields = json.dumps(SHAPE)[1:-1]
    (tmp_path / "x.json").write_text(f"{{{fields}, {wrong}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"x\.json: {message}"):
        shape_of("--shape", tmp_path / "x.json")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (("--steps", 7), 7),
        (("--alpha", 0.05, "--of-steps", 1000), 50),
        (("--alpha", 0.05, "--of-steps", 50), 2),
        ((), "expected either --steps N, or --alpha SHARE and --of-steps N; got steps=None"),
        (("--alpha", 0.05), "expected either"),
        (("--of-steps", 5), "expected either"),
        (("--steps", 1, "--alpha", 0.5, "--of-steps", 2), "expected either"),
        (("--alpha", -0.5, "--of-steps", 100), r"alpha: expected a share in \(0, 1\]"),
        (("--alpha", "nan", "--of-steps", 100), "alpha: expected a share"),
        (("--alpha", 0.001, "--of-steps", 100), "that is at least one of the 100 steps; got 0.001"),
    ],
)
def test_steps(arguments, steps):
    args = parse("--work", "w", "--out", "o", *arguments)
    if isinstance(steps, int):
        assert pretrain_options.num_steps(args) == steps
    else:
        with pytest.raises(ValueError, match=steps):
            pretrain_options.num_steps(args)


def test_weights_of_sources(tmp_path, capsys):
    (tmp_path / "a=2").touch()
    given = ("--data", "x", "--data", "y=0.5", "--data", tmp_path / "a=2", "--text", "k=v=3")
    args = parse("--work", "w", "--out", "o", *given)
    assert args.data == [(Path("x"), 1.0), (Path("y"), 0.5), (tmp_path / "a=2", 1.0)]
    assert args.text == [(Path("k=v"), 3.0)]
    for wrong in ("x=heavy", "x=", "=3", ""):
        with pytest.raises(SystemExit):
            parse("--work", "w", "--out", "o", "--data", wrong)
        assert f"expected PATH or PATH=WEIGHT; got {wrong!r}" in capsys.readouterr().err


def test_texts_become_a_checkpoint(folders, capsys, tmp_path):
    options, texts = folders
    arguments = (*options, "--text", texts, *RECIPE)
    assert pretrain.run(parse(*arguments)) == 0
    (tokens,) = (tmp_path / "work" / "tokens").iterdir()
    lines = capsys.readouterr().out.splitlines()
    model = load(tmp_path / "out", get_backend("eager"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines[0].startswith(
        f"{tmp_path / 'out'}: checkpoint with {count:,} parameters after 192 tokens; loss "
    )
    assert lines[1].startswith(f"  {tokens}: 192 tokens, 0.")
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    # 58.txt is the one in 20 whose path is held out
    held_out = {"documents": 1, "bytes": len((texts / "58.txt").read_text(encoding="utf-8"))}
    assert held_out.items() <= record["held_out"].items()
    assert f"{record['held_out']['bits_per_byte']:.4f} bits per byte over 1 doc" in lines[2]
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.model")
    names = sorted(path.name for path in texts.iterdir() if path.name != "58.txt")
    ids = [
        tokenizer.encode((texts / name).read_text(encoding="utf-8"), bos=True, eos=True)
        for name in names
    ]
    assert np.array_equal(np.load(tokens / "shard-00000.npy"), np.concatenate(ids))
    # finished, it says the same again; with other texts it is another run
    assert pretrain.run(parse(*arguments)) == 0
    assert capsys.readouterr().out.splitlines() == lines
    (texts / "0.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected the state of a run with stream num_tokens"):
        pretrain.run(parse(*arguments))


def test_held_out_texts_without_a_byte_give_no_figure(folders, tmp_path):
    options, texts = folders
    (texts / "58.txt").write_text("", encoding="utf-8")
    assert pretrain.run(parse(*options, "--text", texts, *RECIPE)) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["held_out"] is None


def test_shards_are_mixed_by_weight(folders, capsys, tmp_path):
    options, texts = folders
    for name in "ab":
        write_shards(tmp_path / name, [np.arange(500) % 90], vocab_size=1024)
    data = ("--data", f"{tmp_path / 'a'}=3", "--data", f"{tmp_path / 'b'}=1")
    recipe = ("--steps", 2, "--batch-size", 4, "--seq-len", 8, "--backend", "eager")
    with pytest.raises(ValueError, match="tokenizer: expected --tokenizer FILE for texts"):
        pretrain.run(parse(*options, *data, *recipe, "--text", texts))
    with pytest.raises(ValueError, match="tokenizer: expected --tokenizer FILE for texts"):
        pretrain.run(parse(*options, *data, *recipe, "--held-out", texts))
    assert pretrain.run(parse(*options, *data, *recipe)) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'a'}: 48 tokens" in captured.out
    assert f"{tmp_path / 'b'}: 16 tokens" in captured.out
    assert "held out" not in captured.out
    assert "the warm-up of 2000 steps does not end within the run's 2 steps" in captured.err
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["held_out"] is None
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    tokenizer = ("--tokenizer", SHIPPED / "tokenizer.model", "--held-out", texts)
    assert pretrain.run(parse(*options, *data, *recipe, *tokenizer)) == 0
    assert "bits per byte over 60 documents" in capsys.readouterr().out


def test_a_checkpoint_goes_on(tmp_path, capsys):
    (tmp_path / "text").write_text(
        (Path(pretrain_options.__file__)).read_text(encoding="utf-8"), encoding="utf-8"
    )
    folders = ("--work", tmp_path / "work", "--out", tmp_path / "out", "--text", tmp_path / "text")
    recipe = ("--alpha", 0.02, "--of-steps", 100, "--batch-size", 2, "--backend", "eager")
    arguments = (*folders, *recipe, "--warmup-steps", 1)
    with pytest.raises(
        ValueError,
        match=r"init: expected no option that .*; got num_layers",
    ):
        pretrain.run(parse(*arguments, "--init", SHIPPED, "--num-layers", 2))
    assert pretrain.run(parse(*arguments, "--init", SHIPPED)) == 0
    log = read_log(tmp_path / "work" / "log.jsonl")
    assert len(log) == 2 and log[0]["loss"] < 4  # ln(1024) = 6.9
    assert load_config(tmp_path / "out") == load_config(SHIPPED)
    names = ("tokenizer.model", "tokenizer_config.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (SHIPPED / name).read_bytes()
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    for other in ((), ("--init", tmp_path / "copy")):
        with pytest.raises(ValueError, match=r"work: expected --init .*stdlib"):
            pretrain.run(parse(*arguments, *other))


def test_the_standard_library_is_the_default(folders, monkeypatch, tmp_path):
    options, _ = folders
    documents = [Document("a.py", "x = 1\n" * 99, False), Document("b.py", "y = 2\n", True)]
    monkeypatch.setattr("llama2.train.data.stdlib_documents", lambda: documents)
    assert pretrain.run(parse(*options, *RECIPE, "--bf16", "--activation-checkpointing")) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["held_out"]["bytes"] == 6
    (name,) = (path.name for path in (tmp_path / "work" / "tokens").iterdir())
    assert name.startswith("standard-library-")
    assert record["train_config"]["bf16"] and record["train_config"]["activation_checkpointing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-len", 33), r"seq_len: expected at most the model's max_seq_len \(32\); got 33"),
        (("--vocab-size", 100), "expected a tokenizer with at most the model's 100 ids; got"),
        (("--device", "nowhere"), "device: expected one that is there"),
        (("--out", pretrain_options.__file__), "File exists"),
        (("--threads", 0), "threads: expected from 1 to 1024; got 0"),
        (("--threads", 10**6), "threads: expected from 1 to 1024; got 1000000"),
        (
            ("--batch-size", 10**11),
            "batch_size: expected sequences that fit in the .* 100,000,000,",
        ),
        (
            ("--batch-size", 10**11, "--micro-batch-size", 1),
            "^batch_size: expected sequences that fit in the .* got 100,000,000,000",
        ),
        (
            ("--num-layers", 10**9),
            "shape: expected a model whose training fits .* parameters",
        ),
        (("--save-every", 0), "save_every: expected at least 1; got 0"),
        (("--tokenizer", "none"), "none: expected a SentencePiece model file; got none"),
        (("--text", "none"), "none: expected a text file or a directory"),
        (("--data", "none.npy"), r"tokenizer: expected --tokenizer FILE for texts; got none"),
    ],
)
def test_what_a_user_can_cause(folders, arguments, message):
    options, texts = folders
    with pytest.raises((ValueError, OSError), match=message):
        pretrain.run(parse(*options, "--text", texts, *RECIPE, *arguments))


def test_a_link_to_itself_is_no_text(folders, tmp_path):
    options, _ = folders
    link = tmp_path / "link"
    link.symlink_to(link)
    for option in ("--text", "--held-out"):
        with pytest.raises(FileNotFoundError, match="link: expected a text file or a directory"):
            pretrain.run(parse(*options, option, link, *RECIPE))


def test_a_run_changes_neither_its_texts_nor_its_start(folders, tmp_path):
    """Inside a text folder the log of a run would be a text, another one when it resumes."""
    options, texts = folders
    arguments = (*options, "--text", texts, *RECIPE)
    for wrong, message in (
        (("--work", texts / "work"), r"work: expected a directory outside of the texts .*texts"),
        (("--out", texts), "out: expected a directory outside of the texts"),
        (("--held-out", tmp_path), "work: expected a directory outside of the texts"),
        (("--text", texts / "3.txt"), r"text: expected no text inside another, .*; got .*3\.txt"),
        (("--text", tmp_path / "texts" / ".."), r"text: expected no text inside another, "),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain.run(parse(*arguments, *wrong))
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "shape.json"}
    start = tmp_path / "start"
    shutil.copytree(SHIPPED, start)
    uptraining = ("--work", tmp_path / "work", "--init", start, "--text", texts, *RECIPE)
    with pytest.raises(ValueError, match="out: expected a directory other than --init"):
        pretrain.run(parse(*uptraining, "--out", tmp_path / "texts" / ".." / "start"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "params.json").touch()
    with pytest.raises(
        ValueError, match="out: expected a directory without a checkpoint in Meta's layout"
    ):
        pretrain.run(parse(*uptraining, "--out", tmp_path / "out"))


def test_one_run_at_a_time(folders, tmp_path):
    options, texts = folders
    (tmp_path / "work").mkdir()
    with locked(tmp_path / "work"), pytest.raises(ValueError, match="work: expected no other run"):
        pretrain.run(parse(*options, "--text", texts, *RECIPE))
    assert list((tmp_path / "work").iterdir()) == []
    assert pretrain.run(parse(*options, "--text", texts, *RECIPE)) == 0


def test_texts_for_training_are_not_evaluated(folders, capsys, tmp_path):
    """58.txt is held out by its path."""
    options, texts = folders
    (texts / "copy.txt").symlink_to("58.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / os.fsdecode(b"\xe9")).write_text(
        (texts / "7.txt").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (other / "new").write_text("A text of its own.", encoding="utf-8")
    assert pretrain.run(parse(*options, "--text", texts, *RECIPE)) == 0
    assert "1 of 1 held-out texts are left out" in capsys.readouterr().err
    assert (
        json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))["held_out"]
        is None
    )
    options[1], options[3] = tmp_path / "another", tmp_path / "other out"
    assert pretrain.run(parse(*options, "--text", texts, "--held-out", other, *RECIPE)) == 0
    assert "1 of 2 held-out texts are left out" in capsys.readouterr().err
    record = json.loads((tmp_path / "other out" / "training.json").read_text(encoding="utf-8"))
    assert record["held_out"]["bytes"] == len("A text of its own.")
    options[1], options[3] = tmp_path / "third", tmp_path / "third out"
    assert pretrain.run(parse(*options, "--text", other, *RECIPE)) == 0  # names of any bytes


def test_a_tokenizer_without_bos(folders, monkeypatch):
    options, texts = folders
    found = SimpleNamespace(vocab_size=10, bos_id=-1, eos_id=2)
    monkeypatch.setattr("llama2.train.corpora.Tokenizer", lambda file: found)
    with pytest.raises(ValueError, match=r"model: expected a tokenizer with BOS and EOS"):
        pretrain.run(parse(*options, "--text", texts, *RECIPE))


def test_killed_at_random_moments_the_command_gives_the_same_bits(folders, tmp_path):
    options, texts = folders
    shape = options[-1]
    run = ("--text", texts, "--shape", shape, "--steps", 60, "--batch-size", 4, "--save-every", 4)
    run += ("--warmup-steps", 10, "--micro-batch-size", 2, "--threads", 1, "--backend", "eager")
    assert check_killed_runs("pretrain", run, tmp_path) == 60


def test_a_directory_is_one_runs(folders, tmp_path, capsys):
    """Neither a foreign checkpoint nor another run's is written over; the run's own is."""
    options, texts = folders
    arguments = (*options, "--text", texts, *RECIPE)
    assert pretrain.run(parse(*arguments)) == 0
    whole = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert pretrain.run(parse(*arguments)) == 0  # nothing is left to do
    other = list(arguments)
    other[1] = tmp_path / "another"
    with pytest.raises(ValueError, match="out: expected a new or empty directory, or"):
        pretrain.run(parse(*other))
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == whole


def test_ctrl_c_saves_the_step(folders, tmp_path):
    options, texts = folders
    arguments = [*options, "--text", texts, *RECIPE[:-2], "--save-every", 1000, "--steps", 4000]
    arguments = [*map(str, arguments), "--backend", "eager", "--threads", "1"]
    command = [sys.executable, "-m", "llama2", "pretrain", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    saved = int(re.search(r"saved after step (\d+) of 4000; the same command resumes", err)[1])
    assert torch.load(tmp_path / "work" / "state.pt", weights_only=True)["step"] == saved > 3


@pytest.mark.parametrize("name", ["start.json", "log.jsonl", "state.pt"])
def test_a_damaged_file_is_named(name, folders, tmp_path):
    options, texts = folders
    arguments = (*options, "--text", texts, *RECIPE)
    assert pretrain.run(parse(*arguments)) == 0
    (tmp_path / "work" / name).write_text("{broken}\n" * 9, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(name)):
        pretrain.run(parse(*arguments))


def test_two_runs_on_their_way_to_one_directory(folders, tmp_path):
    options, texts = folders
    with (
        claimed(tmp_path / "out", "another"),
        pytest.raises(ValueError, match="out: expected no other run there"),
    ):
        pretrain.run(parse(*options, "--text", texts, *RECIPE))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".claimed"]
    assert pretrain.run(parse(*options, "--text", texts, *RECIPE)) == 0  # the other one has ended


@pytest.mark.parametrize("found", [None, '{"run": "another"}'])
def test_a_directory_that_was_cleared_meanwhile(found, folders, tmp_path, monkeypatch):
    """Somebody else may be on the way there now; the run is not lost."""
    options, texts = folders
    arguments = (*options, "--text", texts, *RECIPE)
    claim = tmp_path / "out" / ".claimed"

    def cleared(*args, **settings):
        claim.unlink()
        if found:
            claim.write_text(found, encoding="utf-8")
        return training.train(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", cleared)
        with pytest.raises(ValueError, match=r"out: expected .*out with this run's \.claimed; got"):
            pretrain.run(parse(*arguments))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert pretrain.run(parse(*arguments)) == 0


@pytest.mark.parametrize("name", [".claimed", ".claimed.partial"])
def test_a_claim_that_was_cut_keeps_nobody_out(name, tmp_path):
    (tmp_path / name).touch()
    with claimed(tmp_path, "mine"):
        check_held(tmp_path, "mine")
    (tmp_path / "notes").touch()
    with claimed(tmp_path, "mine"):  # gone on with
        pass
    with (
        pytest.raises(ValueError, match=r"this run's own; got .* with notes"),
        claimed(tmp_path, "x"),
    ):
        pass
