"""The command `llama2 reward`: trains a reward model on pairs of answers."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama2 import checkpoint
from llama2.checkout import made_with
from llama2.checkpoint import SHIPPED_CHAT, hf
from llama2.commands.json_lines import read_and_make
from llama2.commands.machine import Machine
from llama2.commands.training import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    announce,
    check_lines,
    export,
    final_loss,
    shown_loss,
    text_files,
    train,
    train_config,
    tune,
    with_template,
)
from llama2.config import ModelConfig
from llama2.rlhf.comparisons import Comparison, margin_of, read_comparisons
from llama2.rlhf.reward import (
    Pair,
    PairBatches,
    encode_pair,
    evaluate,
    ranking_loss,
    with_margins,
)
from llama2.scalar_model import ScalarModel
from llama2.taught_format import taught_format
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer, check_fits
from llama2.train.corpora import TOKENIZER
from llama2.train.pretrain import TrainConfig


def run(args: argparse.Namespace) -> int:
    """Trains a reward model on comparisons, writes its checkpoint and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
        ImportError: a package of the extra `models` is missing.
        FloatingPointError: a loss or gradient is not finite.
    """
    args.init = SHIPPED_CHAT if args.init is None else args.init
    if checkpoint.is_scalar(args.init):
        return tune(args, hf.read_config(args.init, hf.SCALAR), _tune)
    return tune(args, checkpoint.load_config(args.init), _tune)


def _tune(
    args: argparse.Namespace,
    computer: Machine,
    shape: ModelConfig,
    limits: TrainConfig,
    run_id: str,
) -> None:
    tokenizer = Tokenizer(args.init / TOKENIZER)
    check_fits(tokenizer, shape.vocab_size, args.init)
    form = taught_format(args.init)
    files = text_files(args.init / TOKENIZER, args.init)
    files[TOKENIZER_CONFIG] = with_template(files.get(TOKENIZER_CONFIG), form)
    del files[GENERATION_CONFIG]  # a reward model generates nothing
    settings = {"form": form, "seq_len": limits.seq_len, "speaks": computer.execution.speaks}
    asked = args.margins or "none"
    pairs, sources, num_bad = _read(args.data, tokenizer, **settings, margins=asked)
    held_out, held_out_sources, bad = [], Counter(), 0
    if args.held_out:
        # Evaluated without margins, so that runs with different ones can be compared.
        held_out, held_out_sources, bad = _read([args.held_out], tokenizer, **settings)
    check_lines(args, num_bad + bad)
    margins = args.margins or ("small" if all(pair.rating for pair in pairs) else "none")
    pairs = with_margins(pairs, margins)
    data = PairBatches(pairs, batch_size=limits.batch_size, epochs=args.epochs, seed=limits.seed)
    config = train_config(args, shape, data.steps)
    unrated = sum(pair.rating is None for pair in pairs)
    told = f"margins: {margins}"
    if args.margins is None and 0 < unrated < len(pairs):
        told += f" ({unrated:,} without a rating)"
    announce(args, computer, config, f"{counted(len(pairs), 'comparison')}, {told}")
    model = computer.sharded(_initial_model(args, computer), config)
    before = _evaluated(computer, model, held_out, config)
    log = train(args, computer, model, data, config, ranking_loss, counts_tokens=False)
    record = {
        "run": run_id,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "init": str(args.init),
        "format": form,
        "train_config": asdict(config),
        "epochs": args.epochs,
        "margins": margins,
        "comparisons": len(pairs),
        "bad_lines": num_bad + bad,
        "ratings": Counter(pair.rating or "unrated" for pair in pairs),
        "sources": sources,
        "final_train_loss": final_loss(log),
        "held_out": None,
        "wall_seconds": log[-1]["seconds"],
        "made_with": made_with(args),
    }
    if before is not None:
        after = _evaluated(computer, model, held_out, config)
        record["held_out"] = {"sources": held_out_sources, "before": before, "after": after}
    export(args, computer, model, record, files)
    if computer.execution.speaks:
        _report(record, args.out)


def _read(
    paths: list[Path],
    tokenizer: Tokenizer,
    *,
    form: str,
    seq_len: int,
    speaks: bool,
    margins: str = "none",
) -> tuple[list[Pair], Counter[str], int]:
    """Returns the pairs, their number by source and the number of bad lines; each is reported on
    stderr."""

    def encode(comparison: Comparison) -> Pair:
        margin_of(comparison.rating, margins)
        return encode_pair(tokenizer, comparison, form, seq_len)

    return read_and_make(paths, read_comparisons, encode, kind="comparison", speaks=speaks)


def _initial_model(args: argparse.Namespace, computer: Machine) -> ScalarModel:
    ops = computer.placement.ops
    options = {"dtype": torch.float32, "device": computer.placement.device}
    if checkpoint.is_scalar(args.init):
        return checkpoint.load_scalar(args.init, ops, **options)
    return ScalarModel.from_decoder(checkpoint.load(args.init, ops, **options), ops, seed=args.seed)


def _evaluated(
    computer: Machine, model: ScalarModel, pairs: Sequence[Pair], config: TrainConfig
) -> dict[str, Any] | None:
    if not pairs:
        return None
    execution = computer.execution
    rows = config.micro_batch_size or config.batch_size // execution.num_parts
    return evaluate(model, pairs, batch_size=rows, execution=execution)


def _report(record: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {counted(record['comparisons'], 'comparison')}, epochs: {record['epochs']:g}, "
        f"margins: {record['margins']}, {shown_loss(record)}"
    )
    if not record["held_out"]:
        return
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    print(
        f"  held out: accuracy {before['accuracy']:.1%} on {counted(before['pairs'], 'pair')} "
        f"before, {after['accuracy']:.1%} after; loss {before['loss']:.4f} before, "
        f"{after['loss']:.4f} after"
    )
    for rating, counts in after["by_rating"].items():
        print(
            f"    {rating}: {counts['correct']:,} of {counts['pairs']:,} right, mean score "
            f"difference {counts['mean_difference']:.3f}"
        )
