"""Writing so that nothing is lost: files that are replaced whole, folders that one run holds."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STAGING = ".saving"
_COMPLETE = ".complete"  # in the staging folder, once all that is to move is there


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends.

    `path` holds the old file or the new one, never half of one, whenever the process is killed or
    the machine stops.
    """
    partial = path.with_name(path.name + ".partial")  # a killed process's is written over
    yield partial
    with partial.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is never there in part; UTF-8, line ends as they are."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    """What a file that one of these functions wrote holds.

    Raises:
        ValueError: it is no JSON any more; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON; {error}") from error


@contextmanager
def locked(folder: Path, file: str = ".") -> Iterator[None]:
    """Keeps other processes that lock `folder` out of it; the lock of a killed process is gone.

    Args:
        file: one in `folder` that bears the lock instead: for what does not concern all who do.
    Raises:
        ValueError: another process has it.
    """
    descriptor = os.open(folder / file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: expected no other run there; got one") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged(path: Path, obsolete: str, *, last: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder whose files move into `path` when the block ends, under their own names.

    If the block raises, the files of `path` are as before. If not, files there whose names match
    the regular expression `obsolete` and were not written now, an earlier checkpoint's, go. Killed
    at any moment, `path` holds what it held, or `finish_staged` gives it all of what was written.

    Args:
        last: the files that say what the others are. Those of an earlier checkpoint go before
            anything moves and the new ones come at the end, so that no moment shows a mixture.
    Raises:
        ValueError: another process is writing to `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        finish_staged(path, locking=False)
        for left in path.glob(f"{_STAGING}-*"):  # by versions that gave the folder a random name
            shutil.rmtree(left, ignore_errors=True)
        folder = path / _STAGING
        folder.mkdir()
        try:
            probe = folder / ".mode"
            probe.touch()
            usual_mode = probe.stat().st_mode
            probe.unlink()
            yield folder
            names = sorted(os.listdir(folder), key=lambda name: (name in last, name))
            for name in names:
                # safetensors makes files that their owner alone may read
                os.chmod(folder / name, usual_mode)
                _sync(folder / name)
            plan = {"names": names, "obsolete": obsolete, "last": list(last)}
            write_text(folder / _COMPLETE, json.dumps(plan))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finish_staged(path, locking=False)


def finish_staged(path: Path, *, locking: bool = True) -> bool:
    """Moves into `path` what a killed `staged` had written whole, and clears what it had not.

    Returns:
        whether there was something whole.
    Raises:
        ValueError: another process is writing to `path`.
    """
    if locking:
        if not (path / _STAGING).is_dir():
            return False
        with locked(path):
            return finish_staged(path, locking=False)
    folder = path / _STAGING
    if not (folder / _COMPLETE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return False
    plan = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    names = plan["names"]
    for name in plan["last"]:
        if name not in names or (folder / name).exists():  # then that in `path` is an earlier one's
            (path / name).unlink(missing_ok=True)
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, path / name)
    for name in os.listdir(path):
        if re.fullmatch(plan["obsolete"], name) and name not in names:
            (path / name).unlink()
    _sync(path)
    shutil.rmtree(folder)
    return True


def is_unfinished(path: Path) -> bool:
    """Whether some files of `path` may be an earlier checkpoint's, others the next one's."""
    return (path / _STAGING / _COMPLETE).is_file()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
