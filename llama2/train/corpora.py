"""The data of `llama2 pretrain`: token shards, texts tokenised into shards, and held-out texts."""

import argparse
import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama2.checkpoint import SHIPPED
from llama2.config import ModelConfig
from llama2.tokenizer import Tokenizer, check_fits
from llama2.train.care import Care, CareCounts
from llama2.train.data import (
    Document,
    add_documents,
    corpus_documents,
    document_ids,
    text_documents,
)
from llama2.train.shards import write_shards

TOKENIZER = "tokenizer.model"


def tokenizer_file_of(args: argparse.Namespace) -> Path | None:
    """Returns the tokenizer of the texts and of the checkpoint; None if the data are only ids."""
    if args.tokenizer is not None:
        return args.tokenizer
    if args.init is not None and (args.init / TOKENIZER).is_file():
        return args.init / TOKENIZER
    if args.init is None and not args.data:
        return SHIPPED / TOKENIZER
    if args.text or args.held_out or not args.data:
        raise ValueError("tokenizer: expected --tokenizer FILE for texts; got none")
    return None


@dataclass
class Corpora:
    """The data of a run.

    Attributes:
        sources: token shards with their weights.
        held_out: documents for evaluation, not used for training.
        care: the options for the texts, and the counts of the held-out ones.
        counts: the counts of each source of texts, by the path of its shards, or by its name if
            none of its documents are kept.
        digests: of the texts of those shards, in order, if they were filtered.
    """

    sources: list[tuple[Path, float]]
    held_out: list[Document] = field(default_factory=list)
    care: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, CareCounts] = field(default_factory=dict)
    digests: list[str] | None = None

    def record(self, shares: dict[str, tuple[int, float]]) -> dict[str, dict[str, Any]]:
        """Returns, by source, the tokens and epochs of `Mixture.shares`, and for texts the
        counts."""
        record: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys((*shares, *self.counts)):
            tokens, epochs = shares.get(name, (0, 0.0))
            record[name] = {"tokens": tokens, "epochs": epochs}
            if name in self.counts:
                record[name] |= self.counts[name].to_json()
        return record


def corpora_of(
    args: argparse.Namespace, tokenizer_file: Path | None, shape: ModelConfig
) -> Corpora:
    """Returns the token shards, after making missing ones from texts, and the held-out documents.

    Patterns exclude documents and whole sources, including shards. Redaction and removal of
    near-duplicates apply only to texts, as shards no longer contain documents.

    Raises:
        OSError, ValueError: as `corpus_documents` and `write_shards`; or the tokenizer has more ids
            than the model, or lacks BOS or EOS for texts; or nothing is left to train on.
        ImportError: as `Care`.
    """
    care = Care(args.exclude, args.redact, args.drop_near_duplicates)
    corpora = Corpora([])
    for path, weight in args.data:
        if care.excludes(_name_of(path)):
            _nothing_is_left(path, corpora.counts, CareCounts())
        else:
            corpora.sources.append((path, weight))
    if corpora.sources and (args.redact or args.drop_near_duplicates):
        print("note: token shards are used unchanged; only texts are cleaned", file=sys.stderr)
    if tokenizer_file is not None:
        _add_texts(corpora, care, args, tokenizer_file, shape)
    care.report_unused()
    if not corpora.sources:
        raise ValueError(
            f"exclude: expected patterns that leave a source to train on; got {args.exclude}"
        )
    corpora.care = care.described() | corpora.care
    return corpora


def _add_texts(
    corpora: Corpora,
    care: Care,
    args: argparse.Namespace,
    tokenizer_file: Path,
    shape: ModelConfig,
) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    check_fits(tokenizer, shape.vocab_size, tokenizer_file)
    has_texts = args.text or args.held_out or not args.data
    if has_texts and min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise ValueError(
            f"{tokenizer_file}: expected a tokenizer with BOS and EOS; got one without"
        )
    held_out: dict[str, list[Document]] = {}
    if args.held_out and args.data and not args.text:  # otherwise the first corpus brings them
        held_out[_name_of(args.held_out)] = text_documents(args.held_out)
    digests = []
    for path, weight in args.text or ([] if args.data else [(None, 1.0)]):
        name = "standard-library" if path is None else _name_of(path)
        documents = corpus_documents(path, args.held_out)
        held_out_name = _name_of(args.held_out) if args.held_out else name
        found = [document for document in documents if document.held_out]
        held_out.setdefault(held_out_name, []).extend(found)
        training, counts = care.training(
            name, [document for document in documents if not document.held_out]
        )
        if not training:
            _nothing_is_left(path or Path(name), corpora.counts, counts)
            continue
        folder = _tokenised(name, training, tokenizer, tokenizer_file, args.work / "tokens")
        corpora.counts[str(folder)] = counts
        corpora.sources.append((folder, weight))
        digests.append(folder.name.rpartition("-")[2])
    corpora.digests = digests if care and digests else None
    _hold_out(corpora, care, held_out)


def _name_of(path: Path) -> str:
    return Path(os.path.realpath(path)).name  # a link to itself fails on opening


def _nothing_is_left(path: Path, all_counts: dict[str, CareCounts], counts: CareCounts) -> None:
    all_counts[str(path)] = counts
    print(f"{path}: no documents are left to train on", file=sys.stderr)


def _hold_out(corpora: Corpora, care: Care, by_name: dict[str, list[Document]]) -> None:
    """Adds the held-out documents that are not training documents, each once."""
    counts, seen = CareCounts(), {}
    for name, documents in by_name.items():
        unique = [document for document in dict.fromkeys(documents) if document.text]
        unique = [document for document in unique if document not in seen]
        seen |= dict.fromkeys(unique)
        corpora.held_out += care.evaluation(name, unique, counts)
    if counts.near_duplicates:
        nearly = " or nearly so" if care.options["near_duplicates"] else ""
        print(
            f"{counts.near_duplicates} of {counts.documents + counts.near_duplicates} held-out "
            f"texts are left out, as they are training texts{nearly}",
            file=sys.stderr,
        )
    corpora.care["held_out"] = counts.to_json()


def _tokenised(
    name: str, documents: list[Document], tokenizer: Tokenizer, tokenizer_file: Path, folder: Path
) -> Path:
    """Returns shards of the documents; makes them unless those of the same texts and tokenizer
    exist.

    Other texts get another folder, so that a run with changed texts is detected.
    """
    digest = hashlib.sha256(tokenizer_file.read_bytes())
    add_documents(digest, documents)
    shards = folder / f"{name}-{digest.hexdigest()[:16]}"
    if not shards.exists():
        bar = tqdm(documents, desc=f"tokenising {name}", unit="document", leave=False)
        write_shards(
            shards,
            (document_ids(document, tokenizer) for document in bar),
            vocab_size=tokenizer.vocab_size,
        )
    return shards
