"""Ownership of directories: a run has an id in `--work`, and its checkpoint's directory records
it."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2.storage import locked, write_text

_START = "start.json"  # in --work
_CLAIM = ".claimed"  # in --out, until the checkpoint is written
RECORD = "training.json"  # in --out with the checkpoint, and a copy in --work


def run_id_of(work: Path, init: Path | None = None, *, begun: bool = False) -> str:
    """Returns the id of the run in `work`, which is drawn at its first start.

    The initial weights are recorded with the id, as a state has only its current weights.

    Args:
        begun: the run has a state, which must have begun with this `init`.
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
            raise ValueError(f"{file}: expected the record of a run's start; {error!r}") from error
    if begun and found and found["init"] != start:
        raise ValueError(
            f"{work}: expected --init {found['init']}, with which the run there began; got {start}"
        )
    run_id = found.get("run") or secrets.token_hex(8)
    write_text(file, json.dumps({"init": start, "run": run_id}))
    return run_id


@contextmanager
def claimed(out: Path, run_id: str) -> Iterator[None]:
    """Claims a directory for the checkpoint of a run and locks it against other runs.

    Raises:
        ValueError: it has files that this run did not write, or another run has claimed it.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_free(out, run_id)  # before writing there
    (out / _CLAIM).touch()
    with locked(out, _CLAIM):
        _check_free(out, run_id)
        # In place, as this file carries the lock. A kill may leave it empty; then it has no owner.
        (out / _CLAIM).write_text(json.dumps({"run": run_id}), encoding="utf-8")
        yield


def _check_free(out: Path, run_id: str) -> None:
    """Raises ValueError if `out` has files that this run did not write."""
    if run_id in (_owner(out / _CLAIM), _owner(out / RECORD)):
        return
    # A claim file alone, without a checkpoint or a lock, does not exclude other runs.
    found = sorted(file.name for file in out.iterdir() if not file.name.startswith(_CLAIM))
    if found:
        raise ValueError(
            f"out: expected a new or empty directory, or this run's own; got {out} with {found[0]}"
        )


def _owner(file: Path) -> str | None:
    try:
        return json.loads(file.read_bytes())["run"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def check_held(out: Path, run_id: str) -> None:
    """Raises ValueError if the run has lost its claim to `out`, for example because it was
    cleared."""
    owner = _owner(out / _CLAIM)
    if owner != run_id:
        raise ValueError(
            f"out: expected {out} with this run's {_CLAIM}; got "
            f"{'none' if owner is None else 'that of another run'}. The run is saved: the same "
            "command, or one with another --out, writes the checkpoint"
        )


def finish(out: Path, record: dict[str, Any]) -> None:
    """Writes the record of a run, with its id under "run", to `out` and removes the claim."""
    write_record(out, record)
    (out / _CLAIM).unlink(missing_ok=True)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
