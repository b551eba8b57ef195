"""The command `llama2 sft`: fine-tunes a model on dialogues."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama2 import checkpoint
from llama2.accounting import num_parameters
from llama2.checkout import made_with
from llama2.checkpoint import SHIPPED
from llama2.commands.json_lines import Complaints
from llama2.commands.machine import Machine
from llama2.commands.training import (
    TOKENIZER_CONFIG,
    announce,
    check_lines,
    export,
    final_loss,
    shown_loss,
    text_files,
    train,
    tune,
    with_template,
)
from llama2.config import ModelConfig
from llama2.finetune.dialogues import Dialogue, read_dialogues
from llama2.finetune.encoding import Encoded
from llama2.finetune.packing import PackedDialogues, answer_loss
from llama2.finetune.sft import Dialogues, encode_within, held_out_loss, taken
from llama2.model import Llama2
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer, check_fits
from llama2.train.care import Care, described
from llama2.train.corpora import TOKENIZER
from llama2.train.pretrain import TrainConfig


def run(args: argparse.Namespace) -> int:
    """Fine-tunes a model on dialogues, writes its checkpoint and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
        ImportError: a package of the extra `models` is missing.
        FloatingPointError: a loss or gradient is not finite.
    """
    args.init = SHIPPED if args.init is None else args.init
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
    files = text_files(args.init / TOKENIZER, args.init)
    files[TOKENIZER_CONFIG] = with_template(files.get(TOKENIZER_CONFIG), args.format)
    speaks = computer.execution.speaks
    care = Care(args.exclude, args.redact, args.drop_near_duplicates)
    settings = {"form": args.format, "seq_len": limits.seq_len, "speaks": speaks}
    training, num_bad = _read(args.data, tokenizer, care, **settings)
    held_out, bad = Dialogues(), 0
    if args.held_out:
        held_out, bad = _read([args.held_out], tokenizer, care, **settings, held_out=True)
    if speaks:
        care.report_unused()
    check_lines(args, num_bad + bad)
    sizes = {"seq_len": limits.seq_len, "batch_size": limits.batch_size}
    data = PackedDialogues(training.encoded, **sizes, epochs=args.epochs, seed=limits.seed)
    config = replace(limits, steps=data.steps)
    summary = (
        f"{counted(len(training.encoded), 'dialogue')} in {counted(data.num_rows, 'row')} of "
        f"{config.seq_len} tokens, {data.waste:.1%} of them padding"
    )
    announce(args, computer, config, summary)
    options = {"dtype": torch.float32, "device": computer.placement.device}
    model = checkpoint.load(args.init, computer.placement.ops, **options)
    model = computer.sharded(model, config)
    before = _loss(computer, model, held_out, config)
    log = train(args, computer, model, data, config, answer_loss)
    record = {
        "run": run_id,
        "parameters": num_parameters(shape),
        "init": str(args.init),
        "format": args.format,
        "train_config": asdict(config),
        "epochs": args.epochs,
        "dialogues": len(training.encoded),
        "bad_lines": num_bad + bad,
        "rows": data.num_rows,
        "waste": data.waste,
        "answer_tokens": data.num_predictions,
        "sources": training.record(),
        "care": care.described(),
        "final_train_loss": final_loss(log),
        "held_out": None,
        "wall_seconds": log[-1]["seconds"],
        "made_with": made_with(args),
    }
    if before is not None:
        record["held_out"] = {
            "dialogues": len(held_out.encoded),
            "sources": held_out.record(),
            "loss_before": before,
            "loss": _loss(computer, model, held_out, config),
        }
    export(args, computer, model, record, files)
    if speaks:
        _report(record, args.out)


def _read(
    paths: list[Path],
    tokenizer: Tokenizer,
    care: Care,
    *,
    form: str,
    seq_len: int,
    speaks: bool,
    held_out: bool = False,
) -> tuple[Dialogues, int]:
    """Returns the dialogues and the number of lines that are bad or too long; each is reported on
    stderr."""
    found, complaints = Dialogues(), Complaints(speaks=speaks)

    def encode(dialogue: Dialogue) -> Encoded:
        return encode_within(tokenizer, dialogue, form, seq_len)

    with tqdm(desc="reading", unit="dialogue", leave=False, disable=not speaks) as progress:
        for path in paths:
            for dialogue in read_dialogues(path, complaints.add):
                progress.update()
                counts = found.counts[dialogue.source]
                try:
                    encoded = taken(care, dialogue, counts, encode, held_out=held_out)
                except ValueError as error:
                    complaints.add(dialogue.file, dialogue.line, error)
                    continue
                if encoded is not None:
                    found.add(dialogue, encoded)
    if not found.encoded:
        left_out = sum(counts.excluded + counts.near_duplicates for counts in found.counts.values())
        raise ValueError(
            f"{paths[0]}: expected at least one dialogue; got {complaints.count} bad lines and "
            f"{left_out} dialogues that are excluded or near-duplicates"
        )
    return found, complaints.count


def _loss(
    computer: Machine, model: Llama2, held_out: Dialogues, config: TrainConfig
) -> float | None:
    if not held_out.encoded:
        return None
    execution = computer.execution
    rows = config.micro_batch_size or config.batch_size // execution.num_parts
    sizes = {"seq_len": config.seq_len, "batch_size": rows}
    return held_out_loss(model, held_out.encoded, **sizes, execution=execution)


def _report(record: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {counted(record['dialogues'], 'dialogue')}, epochs: {record['epochs']:g}, "
        f"{shown_loss(record)}"
    )
    for source, counts in record["sources"].items():
        line = f"  {source}: {counted(counts['documents'], 'dialogue')}"
        line += f", {counted(counts['answer_tokens'], 'token')} of answers"
        print("; ".join(filter(None, (line, described(counts)))))
    if held_out := record["held_out"]:
        print(
            f"  held out: {held_out['loss_before']:.4f} nats per token of an answer before, "
            f"{held_out['loss']:.4f} after, over {counted(held_out['dialogues'], 'dialogue')}"
        )
