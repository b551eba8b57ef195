"""Crash-safe writing: atomic replacement of files, and folders that one run locks."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_STAGING = ".saving"
_MARK = ".mode"  # the first file in the staging folder; without it the folder is not ours
_COMPLETE = ".complete"  # exists once the staging folder is complete


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; when the block ends, that file replaces `path`
    atomically.

    Whenever the process is killed or the machine stops, `path` holds the whole old or the whole new
    file.
    """
    partial = path.with_name(path.name + ".partial")  # one of a killed process is overwritten
    yield partial
    with partial.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8, with line ends unchanged."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON; {error}") from error


@contextmanager
def reading(path: Path, complaint: str) -> Iterator[None]:
    """Converts any error of the block except OSError into a ValueError that names the file: damaged
    bytes can fail anywhere in zip, pickle, headers and mmap.

    Args:
        complaint: the message between the file's name and the error, which says what was expected.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: {complaint} {type(error).__name__}: {error}") from error


@contextmanager
def locked(folder: Path, file: str = ".") -> Iterator[None]:
    """Locks `folder` against other processes that use this function; a killed process loses its
    lock.

    Args:
        file: a file in `folder` to lock instead, for a lock that not every user of `folder` needs.
    Raises:
        ValueError: another process holds the lock.
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
def staged(
    path: Path,
    obsolete: str,
    *,
    last: tuple[str, ...] = (),
    request: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yields a staging folder whose files move into `path` when the block ends.

    If the block raises, the files of `path` stay as they are. Otherwise files in `path` whose names
    match the regular expression `obsolete` and were not written now, those of an earlier
    checkpoint, are removed. If the process is killed, either `path` is as before or `finish_staged`
    completes the move.

    Args:
        last: files that describe the others. The old ones are removed before any file moves and the
            new ones move last, so that `path` never looks like a complete mixture.
        request: the arguments that produced the files, in JSON's types, for `finish_staged`.
    Raises:
        ValueError: another process is writing to `path`, or as `finish_staged`.
    """
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        finish_staged(path, locking=False)
        folder = path / _STAGING
        folder.mkdir()
        mark = folder / _MARK
        mark.touch()
        try:
            yield folder
            names = sorted(os.listdir(folder), key=lambda name: (name in last, name))
            names.remove(_MARK)
            for name in names:
                # safetensors makes files that only their owner can read
                os.chmod(folder / name, mark.stat().st_mode)
                _sync(folder / name)
            plan = {"names": names, "obsolete": obsolete, "last": list(last), "request": request}
            write_text(folder / _COMPLETE, json.dumps(plan))
        except BaseException:
            with suppress(OSError):  # it would hide the first error
                _clear(folder)
            raise
        finish_staged(path, locking=False)


def finish_staged(
    path: Path, *, request: dict[str, Any] | None = None, locking: bool = True
) -> bool:
    """Moves the files of a killed `staged` into `path` if they are complete, and removes them
    otherwise.

    Args:
        request: must equal that of `staged`; None accepts any.
    Returns:
        Whether there were complete files.
    Raises:
        ValueError: another process is writing to `path`; or the complete files are of another
            request, damaged or unknown. Then nothing changes.
    """
    folder = path / _STAGING
    if not folder.is_dir():
        return False
    if locking:
        with locked(path):
            return finish_staged(path, request=request, locking=False)
    if not (folder / _COMPLETE).is_file():
        _clear(folder)
        return False
    plan = _read_plan(folder / _COMPLETE)
    if request is not None:
        _check_request(path, plan.get("request"), request)
    names = plan["names"]
    for name in plan["last"]:
        if name not in names or (folder / name).exists():  # then `path` has an earlier one
            (path / name).unlink(missing_ok=True)
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, path / name)
    for name in os.listdir(path):
        if re.fullmatch(plan["obsolete"], name) and name not in names:
            (path / name).unlink()
    _sync(path)
    _clear(folder)
    return True


def _read_plan(file: Path) -> dict[str, Any]:
    plan = read_json(file)
    try:
        for name in (*plan["names"], *plan["last"]):
            if name in ("", "..") or Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
        re.compile(plan["obsolete"])
        if not isinstance(plan.get("request"), dict | None):
            raise ValueError(f"its request is {plan['request']!r:.60}")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"{file}: expected the plan of an interrupted write to {file.parent.parent}; got "
            f"{error!r}"
        ) from error
    return plan


def _check_request(path: Path, found: dict[str, Any] | None, request: dict[str, Any]) -> None:
    if found is None:
        raise ValueError(
            f"{path}: expected an interrupted write of this command; got one of another command, "
            "which has to finish it"
        )
    for name, value in request.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name}: expected {found.get(name)!r}, to finish the interrupted run in {path}; "
                f"got {value!r}. Remove that directory to start again"
            )


def _clear(folder: Path) -> None:
    """Removes a staging folder, its mark file last."""
    names = os.listdir(folder)
    if names and not {_MARK, _COMPLETE} & set(names):
        raise ValueError(
            f"{folder}: expected files of an interrupted write of this program; got others, such "
            f"as {min(names)}. Move them elsewhere"
        )
    for name in sorted(names, key=lambda name: name == _MARK):
        (folder / name).unlink()
    folder.rmdir()


def is_unfinished(path: Path) -> bool:
    """Returns whether an interrupted `staged` may have left files of two checkpoints in `path`."""
    return (path / _STAGING / _COMPLETE).is_file()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
