"""Whose a directory is: a run has an id in `--work`, which the checkpoint's directory names."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2.storage import locked, write_text

_START = "start.json"  # in the folder of the work
_CLAIM = ".claimed"  # in that of the checkpoint, until it is written
RECORD = "training.json"  # with the checkpoint, and a copy in the folder of the work


def run_id_of(work: Path, init: Path | None = None, *, begun: bool = False) -> str:
    """Returns the id of the run in `work`, drawn at its first start.

    A state says which weights it has, not which it began with; that is recorded with the id.

    Args:
        begun: the run has a state, which has to be of this `init`.
    Raises:
        ValueError: the record is damaged, or the state began with other weights.
    """
    file, start = work / _START, None if init is None else str(init.resolve())
    found: dict[str, Any] = {}
    if file.exists():
        try:
            found = json.loads(file.read_bytes())
            found["init"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: expected what a run began with; {error!r}") from error
    if begun and found and found["init"] != start:
        raise ValueError(
            f"{work}: expected the init of the run there, {found['init']}; got {start}"
        )
    run_id = found.get("run") or secrets.token_hex(8)
    write_text(file, json.dumps({"init": start, "run": run_id}))
    return run_id


@contextmanager
def claimed(out: Path, run_id: str) -> Iterator[None]:
    """Takes a directory for the checkpoint of a run, and keeps other runs out of it.

    Raises:
        ValueError: it has files that this run has not written, or another run is on its way there.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_free(out, run_id)  # before anything is written there
    (out / _CLAIM).touch()
    with locked(out, _CLAIM):
        _check_free(out, run_id)
        # In place, as the lock is on this very file. A kill leaves it empty: then it is nobody's.
        (out / _CLAIM).write_text(json.dumps({"run": run_id}), encoding="utf-8")
        yield


def _check_free(out: Path, run_id: str) -> None:
    """Raises ValueError if `out` has files that this run has not written."""
    if run_id in (_owner(out / _CLAIM), _owner(out / RECORD)):
        return
    # A claim without a checkpoint that nobody holds any more keeps nobody out.
    found = sorted(file.name for file in out.iterdir() if not file.name.startswith(_CLAIM))
    if found:
        raise ValueError(
            f"out: expected a new directory, one without files, or this run's own; got {out} with "
            f"{found[0]}"
        )


def _owner(file: Path) -> str | None:
    try:
        return json.loads(file.read_bytes())["run"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def check_held(out: Path, run_id: str) -> None:
    """Raises ValueError if `out` is no longer the run's, as somebody has cleared it meanwhile."""
    owner = _owner(out / _CLAIM)
    if owner != run_id:
        raise ValueError(
            f"out: expected {out} with this run's {_CLAIM}; got "
            f"{'none' if owner is None else 'that of another run'}. The run is saved: the same "
            "command, or one with another --out, writes the checkpoint"
        )


def finish(out: Path, record: dict[str, Any]) -> None:
    """Writes what a run says of its checkpoint, its id under "run", in place of the claim."""
    write_record(out, record)
    (out / _CLAIM).unlink(missing_ok=True)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
