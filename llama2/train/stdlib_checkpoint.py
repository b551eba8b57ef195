"""Makes this package's small checkpoint from Python's standard library alone:

    python -m llama2.train.stdlib_checkpoint --out build/stdlib/checkpoint --work build/stdlib

trains a tokenizer and a model and writes them to a directory in Hugging Face's layout, which must
be new or this run's own. If it is killed, the same command resumes from `--work`. On one machine,
the same Python, PyTorch and number of threads give the same bits.
"""

import argparse
import hashlib
import io
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from gqa_kernels.backends import get_backend
from llama2.checkpoint import save_hf
from llama2.config import ModelConfig
from llama2.evaluation.bits import bits_per_byte
from llama2.model import Llama2
from llama2.terminal import answered
from llama2.tokenizer import Tokenizer
from llama2.train.data import (
    Document,
    RandomWindows,
    add_documents,
    stdlib_documents,
    token_stream,
)
from llama2.train.execution import use_threads
from llama2.train.ownership import check_held, claimed, finish, run_id_of
from llama2.train.pretrain import TrainConfig, train

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=352,
    num_layers=6,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=256,
)

# Settings with which transformers reads the same tokenizer and stops generation. A generated BOS
# would begin another document, so it ends the text like EOS.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 1], "do_sample": True}

CARD = """\
# stdlib: a 1.4-million-parameter Llama 2 that has read Python's standard library

A complete checkpoint small enough to ship, so that everything in this package can be tried at once:
Llama 2's architecture with grouped-query attention ({num_q_heads} query heads, {num_kv_heads}
key/value heads), {num_layers} layers of width {hidden_size}, a SentencePiece tokenizer of
{vocab_size} pieces with byte fallback, bfloat16 weights.

It was trained from random weights on the standard library of Python {python}, its sources without
the tests and its manual's topics: {tokens_seen:,} tokens in windows of {train_config[seq_len]},
the longest that it takes. On files that it never saw it needs
**{held_out_bits_per_byte:.3f} bits per byte**. `training.json` has all figures and the command that
makes it.

It writes text that looks like Python and means nothing. It is not a coding assistant, follows no
instructions, knows no chat format, and has nothing of Meta's weights or tokenizer.

The training text is the Python Software Foundation's, under the PSF License Version 2 and the
licenses that Python lists for incorporated software.
"""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """Trains and returns a SentencePiece model with Llama 2's switches, and with runs of spaces as
    pieces for indentation.

    Llama 2: BPE, digits split, byte fallback, identity normaliser, no whitespace collapse, pieces
    of at most 16 characters, coverage 0.99995, unk 0, bos 1, eos 2, no pad. Here a text is a whole
    document, not a line, so that "\\n" can be part of a piece.
    """
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=16,
        character_coverage=0.99995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 30,  # bytes; a longer text would be skipped
        num_threads=1,  # for the same bits on every machine
        minloglevel=1,
    )
    return written.getvalue()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llama2.train.stdlib_checkpoint",
        description="Train a small Llama 2 on Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="directory for log and state")
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
    parser.add_argument(
        "--micro-batch-size", type=int, default=4, help="sequences per forward pass"
    )
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--peak-lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument(
        "--warmup-steps", type=int, default=200, help="steps of linear warm-up to the peak"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    return parser.parse_args(arguments)


def _corpus_record(documents: list[Document], stream: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256()
    add_documents(digest, documents)
    return {
        "documents": len(documents),
        "bytes": _num_bytes(documents),
        "tokens": len(stream),
        "sha256": digest.hexdigest(),
    }


def _num_bytes(documents: list[Document]) -> int:
    return sum(document.num_bytes for document in documents)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _export(model: Llama2, tokenizer_model: bytes, record: dict[str, Any], out: Path) -> None:
    save_hf(model, out, dtype=torch.bfloat16)
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(out / "generation_config.json", GENERATION_CONFIG)
    (out / "README.md").write_text(CARD.format(**asdict(MODEL), **record), encoding="utf-8")
    finish(out, record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and returns 0, or 2 after a one-line error on stderr about the user's input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    return answered("llama2.train.stdlib_checkpoint", lambda: _run(args, arguments))


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    use_threads(args.threads)
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        micro_batch_size=args.micro_batch_size,
        peak_lr=args.peak_lr,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    run_id = run_id_of(args.work, begun=True)
    with claimed(args.out, run_id):
        record = _train(args, config, run_id, shlex.join(arguments))
    print(f"{args.out}: {record['held_out_bits_per_byte']:.3f} bits per byte on held-out files")


def _train(
    args: argparse.Namespace, config: TrainConfig, run_id: str, command: str
) -> dict[str, Any]:
    documents = stdlib_documents()
    training = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]

    tokenizer_file = args.work / "tokenizer.model"
    tokenizer_file.write_bytes(
        train_tokenizer([document.text for document in training], MODEL.vocab_size)
    )
    tokenizer = Tokenizer(tokenizer_file)
    stream, held_out_stream = token_stream(training, tokenizer), token_stream(held_out, tokenizer)

    torch.manual_seed(args.seed)
    model = Llama2(MODEL, get_backend("torch"))
    log = train(model, RandomWindows(stream, config), config, args.work, save_every=100)
    model.bfloat16().float()  # evaluate the weights as they are stored
    record = {
        "run": run_id,
        "command": f"python -m llama2.train.stdlib_checkpoint {command}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sentencepiece": version("sentencepiece"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_config": asdict(config),
        "train": _corpus_record(training, stream),
        "held_out": _corpus_record(held_out, held_out_stream),
        "tokens_seen": log[-1]["tokens"],
        "final_train_loss": fmean(step["loss"] for step in log[-100:]),
        "held_out_bits_per_byte": bits_per_byte(
            model, held_out_stream, _num_bytes(held_out), seq_len=config.seq_len
        ),
        "wall_seconds": log[-1]["seconds"],
    }
    check_held(args.out, run_id)
    _export(model, tokenizer_file.read_bytes(), record, args.out)
    return record


if __name__ == "__main__":
    sys.exit(main())
