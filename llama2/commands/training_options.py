"""Options that the training commands share."""

import argparse
from pathlib import Path

from llama2.placement import add_options


def add_folders(parser: argparse.ArgumentParser, work: str) -> None:
    """Adds `--work`, `--out` and `--tensorboard`.

    Args:
        work: what `--work` receives besides the state and the log.
    """
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help=f"directory for the saved state and the log{work}",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the final checkpoint, in bfloat16 and Hugging Face's layout",
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
    """Adds `--data`, `--skip-bad-lines` and, with `held_out`, `--held-out`.

    Args:
        form: the format of a line of the data.
        bad: what makes a line bad, for example "are too long".
        held_out: what `--held-out` contains.
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
        add(
            "--held-out",
            type=Path,
            metavar="PATH",
            help=f"{held_out} for evaluation, in the same format",
        )
    add(
        "--skip-bad-lines",
        action="store_true",
        help=f"skip lines that {bad}; by default the command names them and does not train",
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
    """Adds the options that `train_config` reads, with the command's defaults.

    Args:
        row: what help texts call a row of a batch.
        text: what `--seq-len` limits, if that is not the row.
        warmup_steps: None means 3 % of all steps, at least 5.
    """
    add = group.add_argument
    steps_to_peak = "steps of linear warm-up to the peak"
    if warmup_steps is None:
        steps_to_peak += "; default: 3 %% of all, at least 5"
    for name, kind, default, meaning in (
        ("--batch-size", int, batch_size, f"{row}s per step"),
        (
            "--micro-batch-size",
            int,
            None,
            f"{row}s per forward pass; default: those of a whole step",
        ),
        ("--seq-len", int, None, f"tokens per {text or row}; default: the model's max_seq_len"),
        ("--peak-lr", float, peak_lr, "peak learning rate"),
        ("--warmup-steps", int, warmup_steps, steps_to_peak),
        ("--weight-decay", float, 0.1, "applied to matrices, not to norms"),
        ("--seed", int, 0, "random seed of the order of the data and of new weights"),
        ("--save-every", int, save_every, "steps between saved states"),
    ):
        shown = "" if default is None else "; default: %(default)s"
        add(name, type=kind, default=default, metavar="X", help=meaning + shown)
    add_precision(group)


def add_precision(group: argparse._ArgumentGroup) -> None:
    """Adds `--bf16` and `--activation-checkpointing`."""
    add = group.add_argument
    add(
        "--bf16",
        action="store_true",
        help="compute in bfloat16; weights stay in float32. Under torchrun it needs more processes "
        "than --tp",
    )
    add(
        "--activation-checkpointing",
        action="store_true",
        help="recompute layers in the backward pass instead of storing activations; results are "
        "bit-identical",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    """Adds the options that `machine` reads."""
    add = group.add_argument
    add("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    add(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="tensor parallelism: under torchrun, the number of processes that share one model; "
        "default: 1. Each such group computes a part of the batch",
    )
    add_options(group)
