"""The command `llama2 pretrain`: data, model, training, and the checkpoint that it ends in."""

import argparse
import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llama2 import checkpoint
from llama2.accounting import num_parameters
from llama2.checkpoint import meta
from llama2.commands.pretrain_options import given_sizes, model_config, num_steps
from llama2.config import ModelConfig
from llama2.evaluation.bits import bits_per_document
from llama2.model import Llama2
from llama2.placement import Placement, free_bytes, place
from llama2.storage import locked, replacing
from llama2.tokenizer import Tokenizer
from llama2.train.corpora import TOKENIZER, corpora_of, tokenizer_file_of
from llama2.train.data import Document, document_ids, is_within
from llama2.train.execution import STATE, use_threads
from llama2.train.ownership import check_held, claimed, finish, run_id_of
from llama2.train.pretrain import TrainConfig, train
from llama2.train.shards import Mixture

_LAST_STEPS = 100  # whose mean is called the final loss


def run(args: argparse.Namespace) -> int:
    """Trains what the options ask for and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: what a user can cause; the message says what.
        ImportError: a package of the extra `models` is missing.
        FloatingPointError: a loss or gradient is not finite.
    """
    if args.threads is not None:
        use_threads(args.threads)
    placement = place(args.backend, args.device)
    shape = _shape(args)
    config = _train_config(args, shape)
    _check_memory(shape, config, placement.device)
    _check_folders(args)
    for folder in (args.work, args.out):  # what cannot be written is better known before the run
        folder.mkdir(parents=True, exist_ok=True)
    with locked(args.work):
        run_id = run_id_of(args.work, args.init, begun=(args.work / STATE).exists())
        with claimed(args.out, run_id):
            _train(args, placement, shape, config, run_id)
    return 0


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, whose state is then saved; a second one does not."""
    asked = []

    def interrupt(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nstopping after this step; Ctrl-C again does not wait", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # no other gets signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _train(
    args: argparse.Namespace,
    placement: Placement,
    shape: ModelConfig,
    config: TrainConfig,
    run_id: str,
) -> None:
    tokenizer_file = tokenizer_file_of(args)
    sources, held_out = corpora_of(args, tokenizer_file, shape)
    data = Mixture(sources, config, shape.vocab_size)
    if args.backend == "auto" or placement.interpreted:
        placement.announce()
    model = _initial_model(args, shape, placement)
    try:
        with _interrupts() as asked_to_stop:
            log = train(
                model,
                data,
                config,
                args.work,
                save_every=args.save_every,
                asked_to_stop=asked_to_stop,
            )
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"{stopped}; the same command goes on", file=sys.stderr)
        raise

    model.bfloat16().float()  # the held-out figure is of the weights as they are stored
    record = {
        "run": run_id,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "init": None if args.init is None else str(args.init),
        "train_config": asdict(config),
        "tokens_seen": log[-1]["tokens"],
        "sources": {
            name: {"tokens": tokens, "epochs": epochs}
            for name, (tokens, epochs) in data.shares(config.steps).items()
        },
        "final_train_loss": fmean(step["loss"] for step in log[-_LAST_STEPS:]),
        "held_out": _evaluate(model, held_out, tokenizer_file, config) if held_out else None,
        "wall_seconds": log[-1]["seconds"],
    }
    check_held(args.out, run_id)
    _export(model, tokenizer_file, record, args.out)
    _report(record, args.out)


def _shape(args: argparse.Namespace) -> ModelConfig:
    if args.init is None:
        return model_config(args)
    given = ([] if args.shape is None else ["shape"]) + list(given_sizes(args))
    if given:
        raise ValueError(f"init: expected no other shape than the checkpoint's; got {given[0]}")
    return checkpoint.load_config(args.init)


def _train_config(args: argparse.Namespace, shape: ModelConfig) -> TrainConfig:
    config = TrainConfig(
        steps=num_steps(args),
        batch_size=args.batch_size,
        seq_len=shape.max_seq_len if args.seq_len is None else args.seq_len,
        micro_batch_size=args.micro_batch_size,
        peak_lr=args.peak_lr,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        bf16=args.bf16,
        seed=args.seed,
        activation_checkpointing=args.activation_checkpointing,
    )
    if config.seq_len > shape.max_seq_len:
        raise ValueError(
            f"seq_len: expected at most the model's max_seq_len ({shape.max_seq_len}); "
            f"got {config.seq_len}"
        )
    if config.warmup_steps >= config.steps:
        print(
            f"note: the warm-up of {config.warmup_steps} steps does not end in {config.steps}, so "
            "the learning rate never falls",
            file=sys.stderr,
        )
    return config


def _check_memory(shape: ModelConfig, config: TrainConfig, device: torch.device) -> None:
    """What cannot fit is refused before hours are spent on its data."""
    free = free_bytes(device)
    # In float32: weights, gradients and Adam's two moments.
    state = 16 * num_parameters(shape)
    if state > free:
        raise ValueError(
            f"shape: expected one whose training fits in the {free:,} bytes of free memory; got "
            f"{num_parameters(shape):,} parameters, which take {state:,}"
        )
    # Of a forward pass at least its logits in float32; of a step all its ids.
    micro = config.micro_batch_size or config.batch_size
    logits = 4 * micro * config.seq_len * shape.vocab_size
    at_once = "batch_size" if config.micro_batch_size is None else "micro_batch_size"
    ids = 8 * config.batch_size * (config.seq_len + 1)
    for name, size, needed, memory in (
        (at_once, micro, logits, free),
        ("batch_size", config.batch_size, ids, free_bytes(torch.device("cpu"))),
    ):
        if needed > memory:
            raise ValueError(
                f"{name}: expected sequences that fit in the {memory:,} bytes of free memory; got "
                f"{size:,}, which take {needed:,} at least"
            )


def _check_folders(args: argparse.Namespace) -> None:
    """No text may be among those for training and evaluation at once, nor change by the run itself;
    no checkpoint may be lost."""
    texts = [path for path, _ in args.text]
    for one, other in combinations(texts, 2):
        if is_within(one, other) or is_within(other, one):
            raise ValueError(f"text: expected texts outside of {one}; got {other}")
    for name in ("work", "out"):
        for path in (*texts, *([args.held_out] if args.held_out else [])):
            if is_within(getattr(args, name), path):
                raise ValueError(
                    f"{name}: expected a directory outside of the texts {path}, which it would "
                    f"change; got {getattr(args, name)}"
                )
    if args.init is not None and is_within(args.init, args.out) and is_within(args.out, args.init):
        raise ValueError(f"out: expected another directory than --init; got {args.out}")
    if (args.out / meta.CONFIG_FILE).exists():
        raise ValueError(f"out: expected no checkpoint of Meta's layout there; got {args.out}")


def _initial_model(args: argparse.Namespace, shape: ModelConfig, placement: Placement) -> Llama2:
    if args.init is not None:
        options = {"dtype": torch.float32, "device": placement.device}
        return checkpoint.load(args.init, placement.ops, **options)
    torch.manual_seed(args.seed)
    return Llama2(shape, placement.ops).to(placement.device)  # the same draws for every device


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


def _export(model: Llama2, tokenizer_file: Path | None, record: dict[str, Any], out: Path) -> None:
    checkpoint.save_hf(model, out, dtype=torch.bfloat16)
    if tokenizer_file is not None:
        for name, file in (
            (TOKENIZER, tokenizer_file),
            ("tokenizer_config.json", tokenizer_file.with_name("tokenizer_config.json")),
        ):
            if file.is_file():
                with replacing(out / name) as partial:
                    shutil.copyfile(file, partial)
    finish(out, record)


def _report(record: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {record['parameters']:,} parameters after {record['tokens_seen']:,} tokens, "
        f"loss {record['final_train_loss']:.4f} over the last steps"
    )
    for name, share in record["sources"].items():
        print(f"  {name}: {share['tokens']:,} tokens, {share['epochs']:.2f} epochs")
    if record["held_out"]:
        print(
            "  held out: {bits_per_byte:.4f} bits per byte over {documents} documents of {bytes:,} "
            "bytes".format(**record["held_out"])
        )
