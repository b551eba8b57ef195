"""The command `llama2 plot`: draws the training logs of runs in one figure."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.commands.plot_options import SUFFIXES
from llama2.reporting import headless  # noqa: F401  (before matplotlib is imported)
from llama2.reporting.drawing import image
from llama2.reporting.training_curves import Run, draw
from llama2.storage import read_json, replacing
from llama2.terminal import complain_of_line
from llama2.train.ownership import RECORD
from llama2.train.state import LOG, records_so_far

_DEFAULT_FILE = "log.svg"


def run(args: argparse.Namespace) -> int:
    """Draws the logs of all runs, writes the figure and returns 0.

    Raises:
        OSError, ValueError: about the user's input.
    """
    out = args.runs[0] / _DEFAULT_FILE if args.out is None else args.out
    form = out.suffix.lower()
    if form not in SUFFIXES:
        raise ValueError(f"out: expected a file named *{' or *'.join(SUFFIXES)}; got {out}")
    runs = [_read(folder) for folder in args.runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = image(lambda: draw(runs), form.removeprefix("."))
    with replacing(out) as partial:
        partial.write_bytes(drawn)
    print(f"{out}: {', '.join(f'{run.name} ({len(run.records):,} steps)' for run in runs)}")
    return 0


def _read(folder: Path) -> Run:
    log = folder / LOG
    if not log.is_file():
        found = "a directory without it" if folder.is_dir() else "no directory"
        raise ValueError(
            f"run: expected the --work directory of a training run, which holds {LOG}; got "
            f"{folder}, {found}"
        )
    records = records_so_far(log, complain_of_line)
    if not records:
        raise ValueError(f"{log}: expected a record of at least one step; got none")
    record = folder / RECORD
    return Run(str(folder), records, _held_out(record) if record.is_file() else {})


def _held_out(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns, by quantity, (steps done, value) before and after training, if the run measured
    them."""
    record = read_json(file)
    try:
        return {
            name: [(int(steps), float(value)) for steps, value in points]
            for name, points in _points(record).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: expected the record of a training run; {error!r}") from error


def _points(record: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """See the records of pretrain.py, sft.py and reward.py."""
    found = record.get("held_out")
    if not found:
        return {}
    last = record["train_config"]["steps"]
    if "bits_per_byte" in found:
        return {"bits per byte": [(last, found["bits_per_byte"])]}
    if "loss_before" in found:
        return {"loss": [(0, found["loss_before"]), (last, found["loss"])]}
    return {
        name: [(0, found["before"][name]), (last, found["after"][name])]
        for name in ("loss", "accuracy")
    }
