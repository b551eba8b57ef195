"""Reads the text of a study: training text and held-out files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from llama2.storage import reading, replacing, write_text
from llama2.tokenizer import Tokenizer, check_fits
from llama2.tradeoff.study.presets import Preset
from llama2.tradeoff.study.result_form import CORPUS, read_entry
from llama2.train.data import (
    Document,
    add_documents,
    corpus_documents,
    document_ids,
    random_batch,
)
from llama2.train.pretrain import TrainConfig

# What a seed's batches are for.
BASE, UPTRAIN, CALIBRATION = range(3)
_DESCRIBED = "corpus.json"
_COMPLAINT = "expected the token ids of the corpus;"  # of a damaged file


@dataclass(frozen=True)
class Texts:
    """The documents of a corpus, and what a report says of them."""

    training: list[Document]
    held_out: list[Document]
    record: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Token ids, as `prepare` stored them in a folder, and what a report says of them.

    Attributes:
        stream: int32 `[num_tokens]`, the training documents one after another.
        held_out: the ids of each held-out file, or of its beginning.
        record: the entry "corpus" of a result.
    """

    stream: np.ndarray
    held_out: list[np.ndarray]
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """Raises ValueError, which names the file, for one that is damaged or of another corpus."""
        record = read_entry(folder / _DESCRIBED, CORPUS)
        train, held_out = folder / "train.npy", folder / "held_out.npz"
        with reading(train, _COMPLAINT):
            stream = np.load(train, mmap_mode="r")
            _check_count(len(stream), record["train"])
        with reading(held_out, _COMPLAINT), np.load(held_out) as arrays:
            ids = [arrays[str(number)] for number in range(len(arrays))]
            _check_count(sum(map(len, ids)), record["held_out"])
        return cls(stream, ids, record)


def read_texts(text: Path | None, held_out: Path | None, preset: Preset) -> Texts:
    """The texts of a study, of which `preset` says how much is held out.

    Args:
        text, held_out: as `corpus_documents` takes them.
    Raises:
        OSError, ValueError: as `corpus_documents`; no file is held out.
    """
    documents = corpus_documents(text, held_out)
    training = [document for document in documents if not document.held_out]
    kept_back = [
        Document(document.path, document.text[: preset.held_out_characters], True)
        for document in documents
        if document.held_out and document.text
    ]
    if not kept_back:
        raise ValueError("held_out: expected a file to evaluate on; got none")
    record = {
        "name": "Python's standard library" if text is None else text.resolve().name,
        "train": {"documents": len(training), **_sizes(training)},
        "held_out": {
            **_sizes(kept_back),
            "files": [{"path": item.path, "bytes": item.num_bytes} for item in kept_back],
        },
    }
    return Texts(training, kept_back, record)


def prepare(folder: Path, texts: Texts, tokenizer_file: Path, preset: Preset) -> Corpus:
    """Tokenises texts into `folder`, where they are not there already; the caller has it locked.

    Raises:
        OSError, ValueError: the tokenizer has more ids than the model; `folder` is damaged.
    """
    tokenizer = Tokenizer(tokenizer_file)
    check_fits(tokenizer, preset.model.vocab_size, tokenizer_file)
    described = folder / _DESCRIBED
    if not described.exists() or not _same_text(read_entry(described, CORPUS), texts.record):
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(texts.training, desc="tokenising", unit="file", leave=False)
        stream = np.concatenate([document_ids(document, tokenizer) for document in bar])
        held_out = [document_ids(document, tokenizer) for document in texts.held_out]
        record = texts.record | {
            "train": texts.record["train"] | {"tokens": len(stream)},
            "held_out": texts.record["held_out"] | {"tokens": sum(map(len, held_out))},
        }
        # First and last: where it is, it describes the files beside it.
        described.unlink(missing_ok=True)
        with replacing(folder / "train.npy") as partial, partial.open("wb") as file:
            np.save(file, stream)
        with replacing(folder / "held_out.npz") as partial, partial.open("wb") as file:
            np.savez(file, **{str(n): tokens for n, tokens in enumerate(held_out)})
        write_text(described, json.dumps(record))
    return Corpus.load(folder)


def _check_count(found: int, record: dict[str, Any]) -> None:
    if found != record["tokens"]:
        raise ValueError(f"got {found} where {_DESCRIBED} says {record['tokens']}")


def _same_text(found: dict[str, Any], record: dict[str, Any]) -> bool:
    return all(found[part]["sha256"] == record[part]["sha256"] for part in ("train", "held_out"))


def _sizes(documents: list[Document]) -> dict[str, Any]:
    digest = hashlib.sha256()
    add_documents(digest, documents)
    num_bytes = sum(document.num_bytes for document in documents)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


class TextBatches:
    """Batches of windows at random places of the text, a function of seed, purpose and step."""

    def __init__(self, corpus: Corpus, config: TrainConfig, seed: int, purpose: int) -> None:
        self._corpus, self._config = corpus, config
        self._seed = 3 * seed + purpose

    def batch(self, step: int) -> Tensor:
        return random_batch(
            self._corpus.stream,
            batch_size=self._config.batch_size,
            seq_len=self._config.seq_len,
            seed=self._seed,
            step=step,
        )

    def identity(self) -> dict[str, Any]:
        return {"sha256": self._corpus.record["train"]["sha256"], "seed": self._seed}
