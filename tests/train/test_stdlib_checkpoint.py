"""The standard library as a corpus, and the checkpoint made of it."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import llama2
from gqa_kernels.backends import get_backend
from llama2.checkpoint import load, load_config
from llama2.evaluation.bits import bits_per_byte
from llama2.tokenizer import Tokenizer
from llama2.train import stdlib_checkpoint
from llama2.train.data import random_batch, read_sources, stdlib_documents, token_stream

SHIPPED = Path(llama2.__file__).parent / "checkpoints" / "stdlib"
UNSEEN = '''class Basket:
    """A basket of fruit."""

    def __init__(self, fruit=None):
        if fruit is None:
            fruit = []
        self.fruit = fruit

    def add(self, name):
        if not isinstance(name, str):
            raise TypeError("name must be a string")
        self.fruit.append(name)
        return len(self.fruit)
'''
STREAM = np.tile(np.arange(32, dtype=np.int32), 20)


@pytest.fixture(scope="module")
def documents():
    return stdlib_documents()


def test_batches_depend_on_seed_and_step_alone():
    def batch(seed, step):
        return random_batch(STREAM, batch_size=4, seq_len=8, seed=seed, step=step)

    first = batch(0, 5)
    assert (first.dtype, first.shape) == (torch.int64, (4, 9))
    torch.manual_seed(1)
    assert first.equal(batch(0, 5))
    assert not first.equal(batch(0, 6))
    assert not first.equal(batch(1, 5))
    assert ((first[:, 1:] - first[:, :-1]) % 32 == 1).all()  # windows of the stream


def test_batches_reach_both_ends_of_the_stream():
    short = np.arange(10)
    starts = {
        int(random_batch(short, batch_size=1, seq_len=8, seed=0, step=step)[0, 0])
        for step in range(20)
    }
    assert starts == {0, 1}
    with pytest.raises(ValueError, match=r"stream: expected more than seq_len \(10\) ids; got 10"):
        random_batch(short, batch_size=1, seq_len=10, seed=0, step=0)


def test_sources_are_read_in_order_and_as_declared(tmp_path):
    for path in ["b.py", "a/x.py", "test/t.py", "a/tests/t.py", "_sysconfigdata_x.py", "n.txt"]:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {path}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\r\n# \xe9\r\n")
    found = read_sources(tmp_path)
    assert [document.path for document in found] == ["a/x.py", "b.py", "latin.py"]
    assert found[-1].text == "# coding: latin-1\n# é\n"


def test_split_of_the_standard_library_is_by_path(documents):
    paths = [document.path for document in documents]
    assert len(paths) == len(set(paths))
    held_out = [document for document in documents if document.held_out]
    assert all(zlib.crc32(document.path.encode()) % 20 == 0 for document in held_out)
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.01 < share < 0.15
    assert any(path.startswith("pydoc_data/topics.py:") for path in paths)
    assert not any(path.startswith("test/") for path in paths)
    assert documents == stdlib_documents()


def test_checkpoint_script_from_corpus_to_directory(documents, tmp_path, monkeypatch):
    few = [document for document in documents if document.path.startswith(("a", "c", "pydoc"))]
    few = [document for document in few if len(document.text) < 20_000]
    assert {document.held_out for document in few} == {True, False}
    monkeypatch.setattr(stdlib_checkpoint, "stdlib_documents", lambda: few[::3])
    out, work = str(tmp_path / "out"), str(tmp_path / "work")
    arguments = ["--out", out, "--work", work, "--steps", "2", "--seq-len", "16", "--seed", "7"]
    assert stdlib_checkpoint.main(arguments) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["command"].endswith(" ".join(arguments))
    assert record["tokens_seen"] == 2 * 4 * 16
    assert record["train_config"]["seed"] == 7
    assert load_config(tmp_path / "out") == stdlib_checkpoint.MODEL
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.vocab_size == stdlib_checkpoint.MODEL.vocab_size
    assert not list((tmp_path / "out").glob(".claimed*"))
    assert stdlib_checkpoint.main(["--out", out, "--work", f"{work} 2"]) == 2  # another run


def test_the_script_writes_over_nothing(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    arguments = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert stdlib_checkpoint.main(arguments) == 2
    assert "out: expected a new or empty directory" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert stdlib_checkpoint.main([*arguments, "--steps", "0"]) == 2
    assert "stdlib_checkpoint: steps: expected at least 1; got 0" in capsys.readouterr().err


def test_documents_begin_with_bos_and_end_with_eos(documents):
    class Letters:
        def encode(self, text, bos, eos):
            return [1] * bos + [3] * len(text) + [2] * eos

    pair = [replace(documents[0], text="ab"), replace(documents[0], text="")]
    assert token_stream(pair, Letters()).tolist() == [1, 3, 3, 2, 1, 2]


def test_shipped_checkpoint_fits_and_has_learnt_python():
    files = list(SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) < 3_000_000
    record = json.loads((SHIPPED / "training.json").read_text(encoding="utf-8"))
    assert f"{record['held_out_bits_per_byte']:.3f}" in (SHIPPED / "README.md").read_text(
        encoding="utf-8"
    )
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model")
    model = load(SHIPPED, get_backend("eager"), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    stream = np.array(tokenizer.encode(UNSEEN))
    assert bits_per_byte(model, stream, len(UNSEEN), seq_len=256) < 2.5
