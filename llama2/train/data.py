"""Corpora, from text files or Python's standard library, and batches of random windows."""

import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.tokenizer import Tokenizer
from llama2.train.pretrain import TrainConfig

# Third-party packages, the test suite (twice the size of the rest) and 120 tables of encodings.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
# Written when Python is built; they contain paths of that machine.
_BUILD_RECORDS = ("_sysconfigdata", "config-")
_HELD_OUT_ONE_IN = 20
_HELD_OUT_OF_ONE_FILE = 0.05


@dataclass(frozen=True)
class Document:
    """A text and its path relative to the corpus, with "/" as separator.

    `kept_back` says whether it is only for evaluation; None decides by its path.
    """

    path: str
    text: str
    kept_back: bool | None = None

    @property
    def held_out(self) -> bool:
        """Whether it is only for evaluation: `kept_back`, or else one path in 20, by CRC-32 of the
        path."""
        if self.kept_back is not None:
            return self.kept_back
        path = self.path.encode(errors="surrogateescape")  # file names may contain any bytes
        return zlib.crc32(path) % _HELD_OUT_ONE_IN == 0

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


def read_sources(folder: Path) -> list[Document]:
    """Returns the Python files under `folder` as text, in the order of their paths."""
    documents = []
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(path.parts) or path.parts[0].startswith(_BUILD_RECORDS):
            continue
        with tokenize.open(file) as opened:  # decodes by the file's coding line
            documents.append(Document(path.as_posix(), opened.read()))
    return sorted(documents, key=lambda document: document.path)


def stdlib_documents() -> list[Document]:
    """Returns the running Python's standard library: its sources, and its manual's topics as
    prose."""
    from pydoc_data.topics import topics

    manual = "pydoc_data/topics.py"  # one long literal, whose texts are read instead
    sources = read_sources(Path(sysconfig.get_path("stdlib")))
    prose = [Document(f"{manual}:{name}", text) for name, text in sorted(topics.items())]
    return [document for document in sources if document.path != manual] + prose


def text_documents(path: Path) -> list[Document]:
    """Returns every UTF-8 text file under a directory, in the order of their paths, or the parts of
    a single file.

    It skips hidden files and folders and links to folders, and files that are not UTF-8 or contain
    a zero byte, whose number it reports on stderr. One path in 20 is held out. Of a single file,
    the last whole lines are held out, at most 5 % of its characters; without a line break there,
    the whole file is for training.

    Raises:
        FileNotFoundError: `path` does not exist.
        OSError: a file or folder cannot be read.
        ValueError: it contains no text.
    """
    if path.is_file():
        text = _decoded(path)
        if not text:
            raise ValueError(f"{path}: expected a non-empty UTF-8 text file; got another file")
        return _split_at_a_line(path.name, text)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a text file or a directory of them; got none")
    documents, num_skipped = [], 0
    for file in _files(path):
        text = _decoded(file)
        if text is None:
            num_skipped += 1
        else:
            documents.append(Document(file.relative_to(path).as_posix(), text))
    if num_skipped:
        print(f"{path}: skipped {num_skipped} files that are not UTF-8 text", file=sys.stderr)
    if not any(document.text for document in documents):
        raise ValueError(f"{path}: expected a UTF-8 text file; got {num_skipped} others")
    return sorted(documents, key=lambda document: document.path)


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files under a folder that are not hidden. `Path.rglob` would silently skip folders
    that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _decoded(file: Path) -> str | None:
    content = file.read_bytes()
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _split_at_a_line(name: str, text: str) -> list[Document]:
    border = text.find("\n", int(len(text) * (1 - _HELD_OUT_OF_ONE_FILE))) + 1 or len(text)
    parts = [Document(f"{name}:head", text[:border], False)]
    if border < len(text):
        parts.append(Document(f"{name}:tail", text[border:], True))
    return parts


def corpus_documents(path: Path | None, held_out: Path | None = None) -> list[Document]:
    """Returns the documents of a text file or directory; for None, those of the standard library.

    Args:
        held_out: a text file or directory to hold out; all of `path` is then for training. None
            holds out what `Document` and `text_documents` describe; with few files that may be
            nothing, which is reported on stderr.
    Raises:
        OSError, ValueError: as `text_documents`; or one of the paths is inside the other, or all
            texts are held out.
    """
    documents = stdlib_documents() if path is None else text_documents(path)
    if held_out is not None:
        if path and (is_within(held_out, path) or is_within(path, held_out)):
            raise ValueError(f"held_out: expected texts outside of {path}; got {held_out}")
        kept = text_documents(held_out)
        documents = [replace(document, kept_back=False) for document in documents]
        return documents + [replace(document, kept_back=True) for document in kept]
    if all(document.held_out for document in documents):
        raise ValueError(
            f"{path}: expected texts for training; got {len(documents)} that are all held out by "
            "their paths. Use --held-out PATH for evaluation texts"
        )
    if not any(document.held_out for document in documents):
        by_path = f"one path in {_HELD_OUT_ONE_IN} is held out and there are only {len(documents)}"
        reason = "no line begins in its last 5 %" if path and path.is_file() else by_path
        print(
            f"{path}: nothing is held out, as {reason}. Use --held-out PATH for evaluation texts",
            file=sys.stderr,
        )
    return documents


def is_within(inner: Path, outer: Path) -> bool:
    """Returns whether `inner` is `outer` or below it, after resolving links."""
    # Path.resolve raises RuntimeError for a link to itself; opening it raises an error that names
    # it.
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def add_documents(digest: Any, documents: list[Document]) -> None:
    """Updates a `hashlib` digest with the paths and texts of documents, in order."""
    for document in documents:
        named = f"{document.path}\0{document.text}\0"
        digest.update(named.encode(errors="surrogateescape"))  # names may contain any bytes


def document_ids(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the document's ids from BOS to EOS, int32 `[num_tokens]`."""
    return np.array(tokenizer.encode(document.text, bos=True, eos=True), dtype=np.int32)


def token_stream(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the documents' ids one after the other, each from BOS to EOS; int32
    `[num_tokens]`."""
    return np.concatenate([document_ids(document, tokenizer) for document in documents])


class RandomWindows:
    """The batches of a run by `random_batch`: windows at random places of a stream in memory.

    Args:
        stream: integer ids `[num_tokens]`.
    """

    def __init__(self, stream: np.ndarray, config: TrainConfig) -> None:
        self._stream, self._config = stream, config

    def batch(self, step: int) -> Tensor:
        """Returns int64 `[batch_size, seq_len + 1]`; see `random_batch`."""
        config = self._config
        sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        return random_batch(self._stream, **sizes, seed=config.seed, step=step)

    def identity(self) -> dict[str, Any]:
        stream = np.ascontiguousarray(self._stream)
        return {"num_tokens": len(stream), "crc32": zlib.crc32(stream)}


def random_batch(
    stream: np.ndarray, *, batch_size: int, seq_len: int, seed: int, step: int
) -> Tensor:
    """Returns windows of the stream at random places, determined by `seed` and `step` alone.

    Args:
        stream: integer `[num_tokens]`.
    Returns:
        int64 `[batch_size, seq_len + 1]`: inputs and, shifted by one, targets.
    Raises:
        ValueError: the stream is shorter than one window.
    """
    if len(stream) <= seq_len:
        raise ValueError(f"stream: expected more than seq_len ({seq_len}) ids; got {len(stream)}")
    generator = np.random.default_rng([seed, step])
    starts = generator.integers(len(stream) - seq_len, size=(batch_size, 1))
    return torch.from_numpy(stream[starts + np.arange(seq_len + 1)].astype(np.int64))
