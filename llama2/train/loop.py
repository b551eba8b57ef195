"""The training loop: steps are logged and saved, so that a killed run resumes bit for bit."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llama2.train.event_files import scalar_writer
from llama2.train.execution import Execution
from llama2.train.state import LOG, Identity, cut_log, read_log


def run_steps(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: Identity,
    num_steps: int,
    do_step: Callable[[int], dict[str, Any]],
    *,
    save_every: int,
    execution: Execution,
    asked_to_stop: Callable[[], bool] = lambda: False,
    unit: str = "step",
    shown: str = "loss",
    tensorboard: Path | None = None,
) -> list[dict[str, Any]]:
    """Does the remaining steps of a run and returns the records of its log, one per step.

    `folder` receives a state, every `save_every` steps and at the end, and `log.jsonl`, a line per
    step: "step", what `do_step` returns, and "seconds" (so far). If `folder` has a state, the run
    resumes from it.

    Args:
        model, optimizer: all that the steps change.
        identity: what a run must share with the state from which it resumes.
        do_step: does the step of the given number, which must depend only on the number, the model
            and the optimizer. Its errors end the run; nothing of that step is saved.
        execution: the processes; every one of them calls this.
        asked_to_stop: called after each step; if it returns True, the step is saved and the run
            ends.
        unit, shown: the progress bar's name of a step, and the field of the record that it shows.
        tensorboard: a directory for TensorBoard event files, which get the numbers of the log.
    Raises:
        KeyboardInterrupt: `asked_to_stop` returned True; the step is saved.
        ValueError: the state in `folder` is of another run or has more than `num_steps` steps, its
            log is incomplete, or `save_every` is not positive.
    """
    if save_every < 1:
        raise ValueError(f"save_every: expected at least 1; got {save_every}")
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / LOG
    first_step = execution.load(folder, model, optimizer, identity)
    if first_step > num_steps:
        raise ValueError(
            f"{unit}s: expected at least the {first_step} of the run in {folder}; got {num_steps}"
        )
    seconds_before = cut_log(log_path, first_step) if execution.speaks else 0.0
    started = time.perf_counter() - seconds_before
    written = log_path if execution.speaks else Path(os.devnull)
    has_scalars = execution.speaks and first_step < num_steps
    with (
        written.open("a", buffering=1) as log,
        scalar_writer(tensorboard if has_scalars else None, first_step) as scalars,
        tqdm(
            range(first_step, num_steps),
            initial=first_step,
            total=num_steps,
            unit=unit,
            disable=not execution.speaks,
        ) as progress,
    ):
        for step in progress:
            record = {"step": step, **do_step(step)}
            record["seconds"] = round(time.perf_counter() - started, 3)
            log.write(json.dumps(record) + "\n")
            scalars.add(record)
            progress.set_postfix({shown: f"{record[shown]:.3f}"})
            stops = asked_to_stop() and step + 1 < num_steps
            if (step + 1) % save_every == 0 or step + 1 == num_steps or stops:
                if execution.speaks:  # the log must reach the disk before the state
                    os.fsync(log.fileno())
                    scalars.flush()
                execution.save(folder, model, optimizer, step + 1, identity)
            if stops:
                raise KeyboardInterrupt(f"saved after {unit} {step + 1} of {num_steps}")
    return read_log(log_path)
