"""Options that the commands that train share."""

import argparse
from pathlib import Path

from llama2.placement import add_options


def add_folders(parser: argparse.ArgumentParser, work: str) -> None:
    """`--work`, `--out` and `--tensorboard`.

    Args:
        work: what else than state and log the first receives.
    """
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help=f"state, log{work}")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the checkpoint at the end, in bfloat16 and Hugging Face's layout",
    )
    add(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="write the numbers of the log to TensorBoard event files too, in DIR, which no other "
        "run uses; needs the extra `tensorboard`",
    )


def add_lines(
    group: argparse._ArgumentGroup, *, form: str, bad: str, held_out: str | None = None
) -> None:
    """`--data`, `--skip-bad-lines` and, if there can be any, `--held-out`.

    Args:
        form: a line of the data.
        bad: what is wrong with lines that are left out.
        held_out: what evaluation takes.
    """
    add = group.add_argument
    add(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help=f"JSON lines {form}: a file, or a directory of *.jsonl; repeatable",
    )
    if held_out is not None:
        add("--held-out", type=Path, metavar="PATH", help=f"{held_out} for evaluation, likewise")
    add(
        "--skip-bad-lines",
        action="store_true",
        help=f"train without lines that {bad}; by default they are named and nothing is trained",
    )


def add_recipe(
    group: argparse._ArgumentGroup,
    *,
    row: str,
    text: str | None = None,
    batch_size: int,
    peak_lr: float,
    warmup_steps: int | None,
    save_every: int,
) -> None:
    """What `train_config` reads, but for the number of steps; defaults are the command's.

    Args:
        row: what a row of a batch is called.
        text: what has `--seq-len` tokens at most, where it is not the row.
        warmup_steps: None means a share of all steps.
    """
    add = group.add_argument
    steps_to_peak = "steps to reach it"
    if warmup_steps is None:
        steps_to_peak += "; default: 3 %% of all, at least 5"
    for name, kind, default, meaning in (
        ("--batch-size", int, batch_size, f"{row}s per step"),
        ("--micro-batch-size", int, None, f"{row}s per forward pass; default: all of a step"),
        ("--seq-len", int, None, f"tokens per {text or row}; default: the model's longest"),
        ("--peak-lr", float, peak_lr, "highest learning rate"),
        ("--warmup-steps", int, warmup_steps, steps_to_peak),
        ("--weight-decay", float, 0.1, "of the matrices"),
        ("--seed", int, 0, "of the data's order, and of weights that are drawn"),
        ("--save-every", int, save_every, "steps between states"),
    ):
        shown = "" if default is None else "; default: %(default)s"
        add(name, type=kind, default=default, metavar="X", help=meaning + shown)
    add_precision(group)


def add_precision(group: argparse._ArgumentGroup) -> None:
    """Of a training step: `--bf16` and `--activation-checkpointing`."""
    add = group.add_argument
    add(
        "--bf16",
        action="store_true",
        help="compute in bfloat16; weights stay float32. With --tp it needs more processes than "
        "share one model",
    )
    add(
        "--activation-checkpointing",
        action="store_true",
        help="compute layers twice instead of keeping their activations; the bits are the same",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    """What `machine` reads."""
    add = group.add_argument
    add("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    add(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="under torchrun, processes that share one model; default: 1. Each such group takes "
        "its part of a batch",
    )
    add_options(group)
