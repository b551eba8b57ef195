"""What a killed run leaves behind and a resumed run picks up: a state and a log."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama2.storage import reading, replacing

LOG = "log.jsonl"  # in a run's folder, a line per step

# What two runs must share for one to resume the other: names and values by their kind.
Identity = dict[str, dict[str, Any]]


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Identity,
) -> None:
    """Writes all that resuming after `step` steps needs; `path` holds the old state or the new one,
    never half of one.

    Raises:
        OSError: it cannot be written, for example as the disk is full.
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
        except RuntimeError as error:  # torch's, of a write that failed
            raise OSError(f"{partial}: expected to write the state; {error}") from error


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity
) -> int:
    """Restores what `save_state` wrote and returns the number of steps done.

    Raises:
        ValueError: the state is of another model, recipe or stream; names the first difference.
            Or the file is damaged, or no state.
    """
    state = read_state(path)
    check_identity(path, state, identity)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; ValueError for a file that is damaged, or no state."""
    with reading(path, "expected a saved state; got"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not state.keys() >= {"step", "model", "optimizer"}:
        raise ValueError(f"{path}: expected a saved state; got another file of torch.save")
    return state


def check_identity(path: Path, found: dict[str, Any], identity: Identity) -> None:
    """Raises a ValueError that names the first difference between two runs, if there is one."""
    values = found if isinstance(found, dict) else {}
    if missing := [kind for kind in identity if not isinstance(values.get(kind), dict)]:
        raise ValueError(
            f"{path}: expected what identifies a run, {', '.join(identity)}; got no {missing[0]}"
        )
    for kind, expected in identity.items():
        for name, value in expected.items():
            if found[kind].get(name) != value:
                raise ValueError(
                    f"{path}: expected the state of a run with {kind} {name}={value!r}; "
                    f"got {found[kind].get(name)!r}. Its own data and options go on with it; "
                    "others need another folder"
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
        record["step"], record["seconds"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"expected a record of a step; {error!r}") from error
    return record


def records_so_far(
    path: Path, complain: Callable[[Path, int, ValueError], None]
) -> list[dict[str, float]]:
    """Returns the records of a log that a run may still be writing.

    A last line without a line end is left out: the run is writing it, or was killed meanwhile.

    Args:
        complain: is called with the path, the number and the error of every other line that is
            not a record; such lines are left out too.
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
    """Keeps the first `count` lines and returns the seconds that the last of them says.

    A killed run may have logged steps that it never saved, the last of them in half a line.

    Raises:
        ValueError: there are less than `count` whole lines.
    """
    found = []
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in found if line.endswith("\n")]
    if len(whole) < count:
        raise ValueError(
            f"{path}: expected the {count} records that come before the saved state; "
            f"got {len(whole)}"
        )
    kept = whole[:count]
    records = _parsed(path, kept)
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
    return records[-1]["seconds"] if records else 0.0
