"""The command `llama2 pretrain`: trains a model on texts and writes its checkpoint."""

import argparse
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from llama2 import checkpoint
from llama2.accounting import num_parameters
from llama2.commands.machine import Machine, machine
from llama2.commands.pretrain_options import given_sizes, model_config, num_steps
from llama2.commands.training import (
    check_folders,
    check_memory,
    export,
    final_loss,
    note_warm_up,
    owned,
    shown_loss,
    text_files,
    train,
    train_config,
)
from llama2.config import ModelConfig
from llama2.evaluation.bits import bits_per_document
from llama2.model import Llama2
from llama2.placement import Placement
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer
from llama2.train.card import card, write_card
from llama2.train.care import described
from llama2.train.corpora import corpora_of, tokenizer_file_of
from llama2.train.data import Document, document_ids, is_within
from llama2.train.pretrain import TrainConfig
from llama2.train.shards import Mixture


def run(args: argparse.Namespace) -> int:
    """Trains a model as the options specify, writes its checkpoint and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
        ImportError: a package of the extra `models` is missing.
        FloatingPointError: a loss or gradient is not finite.
    """
    with machine(args) as computer:
        shape = _shape(args)
        config = train_config(args, shape, num_steps(args))
        note_warm_up(config)
        computer.check(config)
        check_memory(shape, config, computer, predicts_all=True)
        _check_texts(args)
        with owned(args, computer) as run_id:
            _train(args, computer, shape, config, run_id)
    return 0


def _train(
    args: argparse.Namespace,
    computer: Machine,
    shape: ModelConfig,
    config: TrainConfig,
    run_id: str,
) -> None:
    tokenizer_file = tokenizer_file_of(args)
    files = text_files(tokenizer_file, args.init)
    with computer.writer_first():
        corpora = corpora_of(args, tokenizer_file, shape)
    data = Mixture(corpora.sources, config, shape.vocab_size, corpora.digests)
    if args.backend == "auto" or computer.placement.interpreted:
        computer.placement.announce()
    model = computer.sharded(_initial_model(args, shape, computer.placement), config)
    log = train(args, computer, model, data, config)
    record = {
        "run": run_id,
        "parameters": num_parameters(shape),
        "init": None if args.init is None else str(args.init),
        "train_config": asdict(config),
        "tokens_seen": log[-1]["tokens"],
        "sources": corpora.record(data.shares(config.steps)),
        "care": corpora.care,
        "final_train_loss": final_loss(log),
        "held_out": _evaluate(model, corpora.held_out, tokenizer_file, config)
        if corpora.held_out
        else None,
        "wall_seconds": log[-1]["seconds"],
        "command": vars(args).get("command_line"),
    }
    export(args, computer, model, record, files)
    if computer.execution.speaks:
        write_card(args.out, card(args.out.resolve().name, "`llama2 pretrain`", record), run_id)
        _report(record, args.out)


def _shape(args: argparse.Namespace) -> ModelConfig:
    if args.init is None:
        return model_config(args)
    given = ([] if args.shape is None else ["shape"]) + list(given_sizes(args))
    if given:
        raise ValueError(
            f"init: expected no option that changes the checkpoint's shape; got {given[0]}"
        )
    return checkpoint.load_config(args.init)


def _check_texts(args: argparse.Namespace) -> None:
    """Checks that no text is used twice, and the folders as `check_folders`."""
    texts = [path for path, _ in args.text]
    for one, other in combinations(texts, 2):
        if is_within(one, other) or is_within(other, one):
            raise ValueError(f"text: expected no text inside another, {one}; got {other}")
    check_folders(args, [*texts, *([args.held_out] if args.held_out else [])])


def _initial_model(args: argparse.Namespace, shape: ModelConfig, placement: Placement) -> Llama2:
    if args.init is not None:
        options = {"dtype": torch.float32, "device": placement.device}
        return checkpoint.load(args.init, placement.ops, **options)
    torch.manual_seed(args.seed)
    # Made on the CPU, so that the weights do not depend on the device.
    return Llama2(shape, placement.ops).to(placement.device)


def _evaluate(
    model: Llama2, documents: list[Document], tokenizer_file: Path, config: TrainConfig
) -> dict[str, float]:
    tokenizer = Tokenizer(tokenizer_file)
    ids = [document_ids(document, tokenizer) for document in documents]
    num_bytes = sum(document.num_bytes for document in documents)
    batch_size = config.micro_batch_size or config.batch_size  # which fits in memory
    bits = sum(bits_per_document(model, ids, config.seq_len, batch_size))
    figures = {"documents": len(documents), "bytes": num_bytes, "tokens": sum(map(len, ids))}
    return figures | {"bits_per_byte": bits / num_bytes}


def _report(record: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: checkpoint with {record['parameters']:,} parameters after "
        f"{record['tokens_seen']:,} tokens; {shown_loss(record)}"
    )
    for name, share in record["sources"].items():
        done = described(share) if "documents" in share else ""
        line = f"  {name}: {share['tokens']:,} tokens, {share['epochs']:.2f} epochs"
        print(f"{line}; {done}" if done else line)
    if held_out := record["held_out"]:
        print(
            f"  held out: {held_out['bits_per_byte']:.4f} bits per byte over "
            f"{counted(held_out['documents'], 'document')} of {held_out['bytes']:,} bytes"
        )
