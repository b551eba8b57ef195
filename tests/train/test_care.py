"""Texts left out and redacted before a model is trained on them, in whole runs."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from llama2.commands import pretrain, pretrain_options
from llama2.tokenizer import Tokenizer
from llama2.train.card import card, write_card
from llama2.train.care import (
    Care,
    CareCounts,
    NearDuplicates,
    Redactor,
    described,
    is_excluded,
)
from llama2.train.data import Document
from llama2.train.shards import write_shards

EMAIL, PHONE, IP = "<EMAIL_ADDRESS>", "<PHONE_NUMBER>", "<IP_ADDRESS>"


def words(seed, count):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh", k=6)) for _ in range(count)]


@pytest.mark.parametrize(
    ("missing", "made"),
    [
        ("phonenumbers", Redactor),
        ("publicsuffixlist", Redactor),
        ("datasketch", NearDuplicates),
        ("datasketch", lambda: Care(threshold=0.8)),
    ],
)
def test_a_missing_library_names_the_extra(missing, made, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}; .*: pip install "\.\[data\]"'):
        made()
    Care(["*.md"])  # needs none of them


@pytest.mark.parametrize(
    ("names", "patterns", "expected"),
    [
        (("a/b/c.md", "docs"), ["*.md"], True),
        (("a/b/c.md", "docs"), ["doc"], False),
        (("a/b/c.md", "docs"), ["x", "docs"], True),
        (("private/x", "docs"), ["private/*"], True),
        (("a/private/x", "docs"), ["private/*"], False),
        (("A.MD", "docs"), ["*.md"], False),
        (("a[1].md", "docs"), ["a[[]1].md"], True),
        (("a.md",), [], False),
    ],
)
def test_patterns(names, patterns, expected):
    assert is_excluded(names, patterns) is expected


def test_counts_of_a_source():
    """A text that differs by what is redacted is a duplicate; what is in it does not count."""
    long = " ".join(words(0, 50))
    texts = {
        "a": f"{long} me@web.de",
        "b": f"{long} you@web.de",
        "c.md": "x@web.de",
        "d": "81.2.69.160 +49 30 901820, 8.8.8.8",
        "e.md": "y",
    }
    documents = [Document(path, text) for path, text in texts.items()]
    care = Care(["*.md", "two"], "US", 0.8)
    kept, counts = care.training("one", documents)
    assert [(d.path, d.text) for d in kept] == [
        ("a", f"{long} {EMAIL}"),
        ("d", f"{IP} {PHONE}, 8.8.8.8"),
    ]
    redacted = {"EMAIL_ADDRESS": 1, "IP_ADDRESS": 1, "PHONE_NUMBER": 1}
    assert counts == CareCounts(2, 2, Counter(redacted), 1)
    assert json.loads(json.dumps(counts.to_json())) == {
        "documents": 2,
        "excluded": 2,
        "redacted": redacted,
        "near_duplicates": 1,
    }
    assert described(counts.to_json()) == (
        "2 documents excluded; redacted: EMAIL_ADDRESS 1, IP_ADDRESS 1, PHONE_NUMBER 1; "
        "1 near-duplicate dropped"
    )
    assert described(CareCounts(5).to_json()) == ""
    assert care.training("two", documents) == ([], CareCounts(excluded=5))
    assert care.training("three", documents) == ([], CareCounts(excluded=2, near_duplicates=3))
    held_out = CareCounts()
    own = Document("f", "him@web.de, of his own")
    assert [d.text for d in care.evaluation("test", [*documents, own, own], held_out)] == [
        f"{EMAIL}, of his own"
    ] * 2
    assert held_out == CareCounts(2, 2, Counter(EMAIL_ADDRESS=2), 3)


def test_without_options_texts_stay_as_they_are():
    documents = [Document(path, "me@web.de, him and her and it") for path in "ab"]
    care = Care()
    assert not care and care.training("one", documents) == (documents, CareCounts(2))
    assert care.evaluation("one", documents, counts := CareCounts()) == []  # as always
    assert counts.near_duplicates == 2
    assert care.evaluation("one", [Document("c", "him and her and it and you")], counts)


def test_a_pattern_of_no_use_is_said(capsys):
    care = Care(["*.md", "*.mdd"])
    care.training("one", [Document("a.md", "x")])
    care.report_unused()
    assert capsys.readouterr().err == "exclude: no document or source matches '*.mdd'\n"


SHAPE = ("--hidden-size", 16, "--intermediate-size", 24, "--num-layers", 1, "--num-q-heads", 2)
SHAPE += ("--num-kv-heads", 1, "--max-seq-len", 32)
RECIPE = ("--batch-size", 2, "--warmup-steps", 1, "--threads", 1, "--backend", "eager")
CARE = ("--exclude", "*.md", "--exclude", "secret", "--redact", "--drop-near-duplicates")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    pretrain_options.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize("threshold", [0, 0.05, 1.01, "nan", "much"])
def test_thresholds_that_are_none(threshold, capsys):
    with pytest.raises(SystemExit):
        parse("--work", "w", "--out", "o", "--drop-near-duplicates", threshold)
    assert f"expected a number from 0.1 to 1; got '{threshold}'" in capsys.readouterr().err


@pytest.fixture
def sources(tmp_path):
    """Options of texts: of "mail" 12 stay of 15, of "web" 2 of 3, of "secret" nothing."""
    texts = {f"mail/{n:02}": " ".join(words(n, 40)) for n in range(12)}
    texts["mail/03"] += "\nBy jane.doe@web.de, +49 30 901820, from 81.2.69.160 or me@web.de."
    texts["mail/twin"] = texts["mail/05"] + " end"
    texts |= {"mail/deep/er/notes.md": "Notes.", "mail/b.md": texts["mail/02"]}
    texts |= {
        "web/a": texts["mail/07"].upper(),
        "web/b": "(415) 555-2671",
        "web/c": "A short one. " * 9,
    }
    texts |= {"secret/a": "Secret. " * 20, "secret/b": "Another Secret."}
    texts |= {"test/near": texts["mail/01"] + " end", "test/own": "One of its own, me@web.de."}
    texts |= {"test/left.md": "Left out."}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    options = [x for name in ("mail=1", "web=3", "secret=1") for x in ("--text", tmp_path / name)]
    return (*options, "--held-out", tmp_path / "test", *SHAPE, *RECIPE)


def tokens_of(work):
    """(path, text) of the tokenised texts, by the source's name."""
    tokenizer, found = Tokenizer(pretrain.checkpoint.SHIPPED / "tokenizer.model"), {}
    for folder in (work / "tokens").iterdir():
        ids = np.concatenate([np.load(file) for file in sorted(folder.iterdir())])
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.bos_id)[1:])
        text = [tokenizer.decode(document[1:-1].tolist()) for document in documents]
        found[folder.name.rpartition("-")[0]] = (str(folder), text)
    return found


def test_a_run_with_care(sources, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    run = ("--work", work, "--out", out, *sources, "--steps", 8, *CARE)
    args = parse(*run)
    args.command_line = "llama2 pretrain --work … --redact"
    assert pretrain.run(args) == 0
    printed, said = capsys.readouterr()
    assert f"{tmp_path / 'secret'}: no documents are left to train on" in said
    assert "1 of 2 held-out texts are left out, as they are training texts" in said

    found = tokens_of(work)
    mail, web = found["mail"][1], found["web"][1]
    assert found.keys() == {"mail", "web"}
    assert mail[3].endswith(f"By {EMAIL}, {PHONE}, from {IP} or {EMAIL}.")
    assert [text.split()[0] for text in mail] == [words(n, 1)[0] for n in range(12)]
    assert web == [PHONE, "A short one. " * 9]
    everything = " ".join(mail + web)
    assert not any(gone in everything for gone in ("@", "81.2", "901820", "Notes", "Secret"))

    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    counts = {
        found["mail"][0]: CareCounts(
            12, 2, Counter(EMAIL_ADDRESS=2, IP_ADDRESS=1, PHONE_NUMBER=1), 1
        ),
        found["web"][0]: CareCounts(2, 0, Counter(PHONE_NUMBER=1), 1),
        str(tmp_path / "secret"): CareCounts(excluded=2),
    }
    for name, expected in counts.items():
        assert record["sources"][name].items() >= expected.to_json().items()
    assert list(record["sources"]) == list(counts)
    assert record["sources"][str(tmp_path / "secret")]["tokens"] == 0
    held_out = CareCounts(1, 1, Counter(EMAIL_ADDRESS=1), 1)
    assert record["care"]["held_out"] == held_out.to_json()
    assert record["held_out"]["bytes"] == len(f"One of its own, {EMAIL}.")
    assert record["care"].items() >= {"redact": "US", "near_duplicates": 0.8}.items()
    assert record["care"]["exclude"] == ["*.md", "secret"]
    assert record["command"] == args.command_line

    epochs = record["sources"][found["web"][0]]["epochs"]
    assert epochs > 1  # up-sampled
    line = f"  {found['web'][0]}: {12 * 32} tokens, {epochs:.2f} epochs; redacted: PHONE_NUMBER 1; "
    assert f"{line}1 near-duplicate dropped\n" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    web_name = os.path.basename(found["web"][0])
    assert f"| `{web_name}` | 384 | {epochs:.2f} | 2 | 0 | PHONE_NUMBER 1 | 1 |" in card
    assert "| `secret` | 0 | 0.00 | 0 | 2 | 0 | 0 |" in card
    assert f"{record['held_out']['bits_per_byte']:.4f} bits per byte over 1 document " in card
    for part in ("`*.md`, `secret`", args.command_line, "US", "0.8", record["run"]):
        assert part in card

    stream = torch.load(work / "state.pt", weights_only=True)["stream"]
    assert stream["texts"] == [found[name][0].rpartition("-")[2] for name in ("mail", "web")]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert pretrain.run(args) == 0  # nothing is left to do
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    # Other care makes other data, and another run.
    for other in (CARE[:-1], (*CARE, 0.5, "--exclude", "07"), ()):
        with pytest.raises(ValueError, match="expected the state of a run with stream"):
            pretrain.run(parse(*run[: -len(CARE)], *other))
    assert {file.name: file.read_bytes() for file in out.iterdir()}.items() >= before.items()
    assert len(list((work / "tokens").iterdir())) > 2
    assert pretrain.run(parse(*run, "--exclude", "none-has-this-name")) == 0


def test_killed_and_resumed_with_care(sources, tmp_path):
    run = (*sources, "--steps", 60, "--save-every", 4, *CARE)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    folders = {at: ("--work", at / "work", "--out", at / "out") for at in (whole, cut)}
    assert pretrain.run(parse(*folders[whole], *run)) == 0
    long = [*map(str, (*folders[cut], *run))]
    process = subprocess.Popen([sys.executable, "-m", "llama2", "pretrain", *long])
    log = cut / "work" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 8):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "out" / "README.md").exists()
    assert pretrain.run(parse(*folders[cut], *run)) == 0
    results = [
        (
            (at / "out" / "model.safetensors").read_bytes(),
            sorted(os.listdir(at / "work" / "tokens")),
        )
        for at in (whole, cut)
    ]
    assert results[0] == results[1]


def test_shards_are_excluded_by_name_and_otherwise_taken_as_they_are(sources, tmp_path, capsys):
    for name in ("a.npy", "b"):
        write_shards(tmp_path / name, [np.arange(500) % 90], vocab_size=1024)
    data = ("--data", tmp_path / "a.npy", "--data", tmp_path / "b")
    run = ("--work", tmp_path / "work", "--out", tmp_path / "out", *data, *SHAPE, *RECIPE)
    assert pretrain.run(parse(*run, "--steps", 1, "--exclude", "*.npy", "--redact", "GB")) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path / 'a.npy'}: 0 tokens, 0.00 epochs\n" in captured.out
    assert f"{tmp_path / 'b'}: 64 tokens" in captured.out
    assert "token shards are used unchanged" in captured.err
    run = ("--work", tmp_path / "w", *run[2:], "--steps", 1, "--exclude", "*")
    with pytest.raises(
        ValueError,
        match=r"exclude: expected patterns that leave a source to train on; got \['\*'\]",
    ):
        pretrain.run(parse(*run[:2], "--out", tmp_path / "o", *run[4:]))


def test_care_is_part_of_what_identifies_a_run(tmp_path):
    """Where a redacted text in the middle of a large shard has the length of the other."""
    ids = np.arange(3 * 2**16) % 90
    identities = []
    for name, digests in (("a", None), ("b", ["1"]), ("c", ["2"])):
        ids[len(ids) // 2] += 1
        write_shards(tmp_path / name, [ids], vocab_size=1024)
        config = pretrain.TrainConfig(steps=1, batch_size=2, seq_len=8)
        identities.append(
            pretrain.Mixture([(tmp_path / name, 1.0)], config, 1024, digests).identity()
        )
    texts = [identity.pop("texts") for identity in identities]
    assert identities[0] == identities[1] == identities[2] and texts == [None, ["1"], ["2"]]


def test_a_card_of_ones_own_stays(tmp_path, capsys):
    file = tmp_path / "README.md"
    write_card(tmp_path, "first\n", "abc")
    assert file.read_text(encoding="utf-8").startswith("first\n\n<!-- run abc, SHA-256 of ")
    write_card(tmp_path, "second |\udce9\n", "abc")
    assert file.read_text(encoding="utf-8").startswith("second |\ufffd\n")
    assert capsys.readouterr().err == ""
    changed = file.read_text(encoding="utf-8").replace("second", "changed")
    for text, run_id in ((changed, "abc"), (file.read_text(encoding="utf-8"), "other"), ("", "a")):
        file.write_text(text, encoding="utf-8")
        write_card(tmp_path, "third", run_id)
        assert file.read_text(encoding="utf-8") == text
        assert f"{file}: kept" in capsys.readouterr().err
    file.unlink()
    file.mkdir()
    write_card(tmp_path, "fourth", "abc")
    assert file.is_dir()


def test_nothing_ends_the_code_of_a_card():
    """A bar ends a cell of a table even within code, and any line end a line of the command."""
    counts = {"tokens": 1, "epochs": 1.0}
    record = {"parameters": 1, "tokens_seen": 1, "final_train_loss": 1.0, "held_out": None}
    care = {"exclude": ["a|b"], "redact": None, "near_duplicates": None, "libraries": {}}
    written = card(
        "*model*",
        "us",
        {
            **record,
            "init": "a|b",
            "sources": {"x/a|b": counts},
            "care": care,
            "command": "llama2 'a\r# b\n# c\u2028# d'",
        },
    )
    assert written.startswith("# \\*model\\*\n") and "| `a\\|b` | 1 |" in written
    assert "weights of `a|b` on" in written and "sources: `a|b`" in written
    assert written.count("\n    # ") == 3 and "\r" not in written
