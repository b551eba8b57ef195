"""A corpus that every Python carries, the standard library, read in place; and batches of it."""

import sysconfig
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama2.tokenizer import Tokenizer

# Other people's packages, the test suite (twice the size of all the rest), and 120 tables of codes.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
# Written when Python is built: they hold that machine's paths.
_BUILD_RECORDS = ("_sysconfigdata", "config-")
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Document:
    """A text, and its path relative to the corpus, "/" between the parts."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation only: one path in 20, by CRC-32 of the path."""
        return zlib.crc32(self.path.encode()) % _HELD_OUT_ONE_IN == 0


def read_sources(folder: Path) -> list[Document]:
    """The Python files under `folder` as text, in the order of their paths."""
    documents = []
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(path.parts) or path.parts[0].startswith(_BUILD_RECORDS):
            continue
        with tokenize.open(file) as opened:  # decodes as the file's own coding line says
            documents.append(Document(path.as_posix(), opened.read()))
    return sorted(documents, key=lambda document: document.path)


def stdlib_documents() -> list[Document]:
    """The running Python's standard library: its sources, and its manual's topics as prose."""
    from pydoc_data.topics import topics

    manual = "pydoc_data/topics.py"  # one long literal: its texts are read instead
    sources = read_sources(Path(sysconfig.get_path("stdlib")))
    prose = [Document(f"{manual}:{name}", text) for name, text in sorted(topics.items())]
    return [document for document in sources if document.path != manual] + prose


def token_stream(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    """The documents' ids one after the other, each from BOS to EOS; int32 `[num_tokens]`."""
    ids = [tokenizer.encode(document.text, bos=True, eos=True) for document in documents]
    return np.concatenate([np.array(tokens, dtype=np.int32) for tokens in ids])


def random_batch(
    stream: np.ndarray, *, batch_size: int, seq_len: int, seed: int, step: int
) -> Tensor:
    """Windows of the stream at random places: a function of `seed` and `step` alone.

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
