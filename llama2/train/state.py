"""The saved state and the log of a run, from which a killed run resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama2.storage import reading, replacing

LOG = "log.jsonl"  # in a run's folder; a line per step

# What two runs must share for one to resume the other: values by kind and name.
Identity = dict[str, dict[str, Any]]


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Identity,
) -> None:
    """Writes all that resuming after `step` steps needs, atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    state = {
        **identity,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # PyTorch's error for a failed write
            raise OSError(f"{partial}: expected to write the state; {error}") from error


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity
) -> int:
    """Restores what `save_state` wrote and returns the number of steps done.

    Raises:
        ValueError: the state is of another model, recipe or stream, with the first difference; or
            the file is damaged or not a state.
    """
    state = read_state(path)
    check_identity(path, state, identity)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_state(path: Path) -> dict[str, Any]:
    """Returns what `save_state` wrote, on the CPU; raises ValueError for a damaged or other
    file."""
    with reading(path, "expected a saved state; got"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= {"step", "model", "optimizer"}:
        raise ValueError(f"{path}: expected a saved state; got another file of torch.save")
    return state


def check_identity(path: Path, found: dict[str, Any], identity: Identity) -> None:
    """Raises ValueError with the first difference between two runs, if there is one."""
    values = found if isinstance(found, dict) else {}
    if missing := [kind for kind in identity if not isinstance(values.get(kind), dict)]:
        raise ValueError(
            f"{path}: expected a run's identity ({', '.join(identity)}); got no {missing[0]}"
        )
    for kind, expected in identity.items():
        for name, value in expected.items():
            if found[kind].get(name) != value:
                raise ValueError(
                    f"{path}: expected the state of a run with {kind} {name}={value!r}; got "
                    f"{found[kind].get(name)!r}. Resume it with its own data and options, or use "
                    "another folder"
                )


def read_log(path: Path) -> list[dict[str, float]]:
    """Returns the records of a JSON-lines log."""
    return _parsed(path, path.read_text(encoding="utf-8").splitlines())


def _parsed(path: Path, lines: list[str]) -> list[dict[str, float]]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


def _record(line: str) -> dict[str, float]:
    try:
        record = json.loads(line)
        step, seconds = record["step"], record["seconds"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"expected a record of a step; {error!r:.200}") from error
    if type(step) is not int or type(seconds) not in (int, float):
        raise ValueError(
            f"expected a record of a step; got step {step!r:.40} and seconds {seconds!r:.40}"
        )
    return record


def records_so_far(
    path: Path, complain: Callable[[Path, int, ValueError], None]
) -> list[dict[str, float]]:
    """Returns the records of a log that a run may still be writing.

    A last line without a line end is left out: the run is writing it, or was killed meanwhile.

    Args:
        complain: called with the path, the number and the error of every other line that is not a
            record; such lines are left out too.
    """
    records = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            records.append(_record(line))
        except ValueError as error:
            complain(path, number, error)
    return records


def cut_log(path: Path, count: int) -> float:
    """Truncates the log to its first `count` lines and returns the "seconds" of the last one.

    A killed run may have logged steps that it did not save, the last one as a partial line.

    Raises:
        ValueError: there are fewer than `count` whole lines.
    """
    found = []
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in found if line.endswith("\n")]
    if len(whole) < count:
        raise ValueError(
            f"{path}: expected the {count} records before the saved state; got {len(whole)}"
        )
    kept = whole[:count]
    records = _parsed(path, kept)
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
    return records[-1]["seconds"] if records else 0.0
