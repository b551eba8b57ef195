"""What a study reads: text to train on beside rows of recall tasks, and files held out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama2.evaluation import recall
from llama2.storage import read_json, write_text
from llama2.tokenizer import Tokenizer, check_fits
from llama2.tradeoff.study.presets import Preset
from llama2.train.data import (
    Document,
    add_documents,
    corpus_documents,
    document_ids,
    random_batch,
)

# What a seed's batches are for.
BASE, UPTRAIN, CALIBRATION = range(3)


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
        held_out = np.load(folder / "held_out.npz")
        return cls(
            np.load(folder / "train.npy", mmap_mode="r"),
            [held_out[str(number)] for number in range(len(held_out))],
            read_json(folder / "corpus.json"),
        )


def prepare(
    folder: Path, text: Path | None, held_out: Path | None, tokenizer_file: Path, preset: Preset
) -> Corpus:
    """Tokenises a corpus into `folder`, where it is not there already.

    Args:
        text, held_out: as `corpus_documents` takes them.
    Raises:
        OSError, ValueError: as `corpus_documents`; no file is held out; the tokenizer has more ids
            than the model.
    """
    documents = corpus_documents(text, held_out)
    tokenizer = Tokenizer(tokenizer_file)
    check_fits(tokenizer, preset.model.vocab_size, tokenizer_file)
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
    described = folder / "corpus.json"
    if not described.exists() or not _same_text(read_json(described), record):
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(training, desc="tokenising", unit="file", leave=False)
        stream = np.concatenate([document_ids(document, tokenizer) for document in bar])
        ids = [document_ids(document, tokenizer) for document in kept_back]
        record["train"]["tokens"] = len(stream)
        record["held_out"]["tokens"] = sum(map(len, ids))
        np.save(folder / "train.npy", stream)
        np.savez(folder / "held_out.npz", **{str(n): tokens for n, tokens in enumerate(ids)})
        write_text(described, json.dumps(record))  # last: it says that the rest is whole
    return Corpus.load(folder)


def _sizes(documents: list[Document]) -> dict[str, Any]:
    digest = hashlib.sha256()
    add_documents(digest, documents)
    num_bytes = sum(document.num_bytes for document in documents)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _same_text(found: dict[str, Any], record: dict[str, Any]) -> bool:
    return all(found[part]["sha256"] == record[part]["sha256"] for part in ("train", "held_out"))


class StudyBatches:
    """Batches of text and of recall tasks: a function of the seed, the purpose and the step.

    Their rows are `preset.lookup_rows` and `preset.copy_rows` of the tasks, then windows of the
    text at random places.
    """

    def __init__(self, corpus: Corpus, preset: Preset, seed: int, purpose: int) -> None:
        self._corpus, self._preset = corpus, preset
        self._seed = 3 * seed + purpose

    def batch(self, step: int) -> Tensor:
        preset = self._preset
        counts = {"lookup": preset.lookup_rows, "copy": preset.copy_rows}
        generator = np.random.default_rng([self._seed, step, 1])
        rows = [
            recall.TASKS[name].rows(generator, count, preset.train.seq_len, preset.model.vocab_size)
            for name, count in counts.items()
        ]
        text = random_batch(
            self._corpus.stream,
            batch_size=preset.train.batch_size - sum(counts.values()),
            seq_len=preset.train.seq_len,
            seed=self._seed,
            step=step,
        )
        return torch.cat([*map(torch.from_numpy, rows), text])

    def identity(self) -> dict[str, Any]:
        return {
            "sha256": self._corpus.record["train"]["sha256"],
            "seed": self._seed,
            "lookup_rows": self._preset.lookup_rows,
            "copy_rows": self._preset.copy_rows,
        }
