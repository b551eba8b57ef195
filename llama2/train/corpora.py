"""The data of `llama2 pretrain`: token shards, texts made into shards, and texts held out."""

import argparse
import hashlib
import sys
from pathlib import Path

from tqdm import tqdm

from llama2.checkpoint import SHIPPED
from llama2.config import ModelConfig
from llama2.tokenizer import Tokenizer, check_fits
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
    """The tokenizer of the texts and of the checkpoint; None where only its ids are known."""
    if args.tokenizer is not None:
        return args.tokenizer
    if args.init is not None and (args.init / TOKENIZER).is_file():
        return args.init / TOKENIZER
    if args.init is None and not args.data:
        return SHIPPED / TOKENIZER
    if args.text or args.held_out or not args.data:
        raise ValueError("tokenizer: expected --tokenizer FILE for texts; got none")
    return None


def corpora_of(
    args: argparse.Namespace, tokenizer_file: Path | None, shape: ModelConfig
) -> tuple[list[tuple[Path, float]], list[Document]]:
    """(token shards with their weights, documents held out and none of them for training).

    Raises:
        OSError, ValueError: as `corpus_documents` and `write_shards`; or the tokenizer has more ids
            than the model, or no BOS or EOS for texts.
    """
    if tokenizer_file is None:
        return args.data, []
    tokenizer = Tokenizer(tokenizer_file)
    check_fits(tokenizer, shape.vocab_size, tokenizer_file)
    has_texts = args.text or args.held_out or not args.data
    if has_texts and min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise ValueError(f"{tokenizer_file}: expected a tokenizer with BOS and EOS; got another")
    sources, seen = list(args.data), set()
    held_out = text_documents(args.held_out) if args.data and args.held_out else []
    for path, weight in args.text or ([] if args.data else [(None, 1.0)]):
        documents = corpus_documents(path, args.held_out)
        held_out += [document for document in documents if document.held_out]
        training = [document for document in documents if not document.held_out]
        seen.update(_digest(document) for document in training)
        name = "standard-library" if path is None else path.resolve().name
        folder = _tokenised(name, training, tokenizer, tokenizer_file, args.work / "tokens")
        sources.append((folder, weight))
    # Every corpus brings those of --held-out.
    unique = [document for document in dict.fromkeys(held_out) if document.text]
    unseen = [document for document in unique if _digest(document) not in seen]
    if len(unseen) < len(unique):
        print(
            f"{len(unique) - len(unseen)} of {len(unique)} texts for evaluation are left out, as "
            "they are also among those for training",
            file=sys.stderr,
        )
    return sources, unseen


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()


def _tokenised(
    name: str, documents: list[Document], tokenizer: Tokenizer, tokenizer_file: Path, folder: Path
) -> Path:
    """Shards of the documents, made only where those of the same texts and tokenizer are not there.

    Other texts get another folder, so that a run whose texts have changed is told from the first.
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
