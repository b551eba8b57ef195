"""Texts of one's own as a corpus, and what of them is held out."""

import os
import zlib
from pathlib import Path

import pytest

from llama2.train.data import corpus_documents, stdlib_documents, text_documents


def write(folder, **contents):
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_texts_under_a_folder_in_the_order_of_their_paths(tmp_path, capsys):
    binary = {"a.png": b"\x89PNG\0", "sub/latin": b"\xe9"}
    hidden = {".git/x": "no", "sub/.cache/y": "no", ".z": "no"}
    texts = {"b.txt": "two\r\n", "a/é.md": "ä one", "empty": ""}
    write(tmp_path, **binary, **hidden, **texts)
    found = text_documents(tmp_path)
    assert [(d.path, d.text) for d in found] == [
        ("a/é.md", "ä one"),
        ("b.txt", "two\r\n"),
        ("empty", ""),
    ]
    assert capsys.readouterr().err == f"{tmp_path}: skipped 2 files that are not UTF-8 text\n"


def test_links_and_names_of_any_bytes(tmp_path):
    """A link to a file is one; folders that are links could be without end."""
    write(tmp_path, **{"a.txt": "one", "sub/b.txt": "two"})
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "to-nothing").symlink_to("none")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.txt")).write_text("three", encoding="utf-8")
    found = text_documents(tmp_path)
    assert [d.text for d in found] == ["one", "one", "two", "three"]
    assert found[-1].held_out == (zlib.crc32(b"\xe9.txt") % 20 == 0)


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path, **{"a.txt": "one", "sub/b.txt": "two", ".hidden/c.txt": "three"})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("sub", ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read whatever its mode says
    with pytest.raises(PermissionError, match="sub"):
        text_documents(tmp_path)


def test_a_folder_is_split_by_path(tmp_path, capsys):
    names = [f"{n}.txt" for n in range(60)]
    documents = corpus_documents(write(tmp_path, **dict.fromkeys(names, "x")))
    held_out = {document.path for document in documents if document.held_out}
    assert held_out == {name for name in names if zlib.crc32(name.encode()) % 20 == 0}
    assert 0 < len(held_out) < 60
    assert capsys.readouterr().err == ""


def test_the_last_lines_of_a_single_file_are_held_out(tmp_path):
    file = write(tmp_path, book="".join(f"line {n:02}\n" for n in range(100))) / "book"
    head, tail = text_documents(file)
    assert (head.held_out, tail.held_out) == (False, True)
    assert head.text + tail.text == file.read_text(encoding="utf-8")
    assert tail.text.splitlines() == ["line 96", "line 97", "line 98", "line 99"]
    assert (head.path, tail.path) == ("book:head", "book:tail")


def test_a_file_without_lines_is_all_for_training_and_says_so(tmp_path, capsys):
    (document,) = corpus_documents(write(tmp_path, book="x" * 100) / "book")
    assert not document.held_out and document.text == "x" * 100
    assert "nothing is held out, as no line begins in its last 5 %" in capsys.readouterr().err


def test_few_files_say_how_to_hold_out(tmp_path, capsys):
    documents = corpus_documents(write(tmp_path, a="x", b="y"))
    assert not any(document.held_out for document in documents)
    error = capsys.readouterr().err
    assert "nothing is held out" in error and "there are only 2. Use --held-out PATH" in error


def test_texts_that_are_all_held_out(tmp_path):
    """Where all are, by their paths, nothing is left to train on."""
    write(tmp_path / "train", **{"58.txt": "x"})
    with pytest.raises(ValueError, match=r"train: expected texts for training; .* --held-out PATH"):
        corpus_documents(tmp_path / "train")
    (document, _) = corpus_documents(tmp_path / "train", write(tmp_path / "test", a="y") / "a")
    assert not document.held_out


def test_held_out_texts_of_ones_own(tmp_path, capsys):
    """All of `path` is then for training."""
    train, test = write(tmp_path / "train", **{"58.txt": "x", "b": "x"}), tmp_path / "test"
    write(test, c="y\nz\n", d="z")
    documents = corpus_documents(train, test)
    assert [(d.path, d.held_out) for d in documents] == [
        ("58.txt", False),
        ("b", False),
        ("c", True),
        ("d", True),
    ]
    single = corpus_documents(train, test / "c")[2:]
    assert "".join(d.text for d in single) == "y\nz\n" and all(d.held_out for d in single)
    for pair in ((tmp_path, test), (test, tmp_path), (test, test)):
        with pytest.raises(ValueError, match="held_out: expected texts outside of"):
            corpus_documents(*pair)


def test_none_is_the_standard_library():
    assert corpus_documents(None) == stdlib_documents()


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: expected a text file or a directory"):
        text_documents(tmp_path / "none")
    write(tmp_path, binary=b"\0", empty="")
    with pytest.raises(ValueError, match="expected a UTF-8 text file; got 1 others"):
        text_documents(tmp_path)
    for name in ("binary", "empty"):
        with pytest.raises(ValueError, match=f"{name}: expected a non-empty UTF-8 text file"):
            text_documents(tmp_path / name)
