"""Writing so that nothing is lost: files that are replaced whole, folders that one run holds."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_STAGING = ".saving"
_MARK = ".mode"  # the first file in the staging folder: without it, the others are a stranger's
_COMPLETE = ".complete"  # there once all that is to move is


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
def reading(path: Path, complaint: str) -> Iterator[None]:
    """Whatever damaged bytes raise inside becomes a ValueError that names the file; bad bytes can
    fail anywhere in zip, pickle, headers and mmap. An OSError stays as it is.

    Args:
        complaint: what was expected, up to the error's own words.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: {complaint} {type(error).__name__}: {error}") from error


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
def staged(
    path: Path,
    obsolete: str,
    *,
    last: tuple[str, ...] = (),
    request: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """A folder whose files move into `path` when the block ends, under their own names.

    If the block raises, the files of `path` are as before. If not, files there whose names match
    the regular expression `obsolete` and were not written now, an earlier checkpoint's, go. Killed
    at any moment, `path` holds what it held, or `finish_staged` gives it all of what was written.

    Args:
        last: the files that say what the others are. Those of an earlier checkpoint go before
            anything moves and the new ones come at the end, so that no moment shows a mixture.
        request: what the files were made from, in JSON's types, for `finish_staged`.
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
                # safetensors makes files that their owner alone may read
                os.chmod(folder / name, mark.stat().st_mode)
                _sync(folder / name)
            plan = {"names": names, "obsolete": obsolete, "last": list(last), "request": request}
            write_text(folder / _COMPLETE, json.dumps(plan))
        except BaseException:
            with suppress(OSError):  # which would hide the reason
                _clear(folder)
            raise
        finish_staged(path, locking=False)


def finish_staged(
    path: Path, *, request: dict[str, Any] | None = None, locking: bool = True
) -> bool:
    """Moves into `path` what a killed `staged` had written whole, and clears what it had not.

    Args:
        request: that must have been `staged`'s; None takes any.
    Returns:
        whether there was something whole.
    Raises:
        ValueError: another process is writing to `path`; what is whole there was asked for by
            another request, is damaged or a stranger's: then nothing changes.
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
        if name not in names or (folder / name).exists():  # then that in `path` is an earlier one's
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
                raise ValueError(f"{name!r} is no file's name")
        re.compile(plan["obsolete"])
        if not isinstance(plan.get("request"), dict | None):
            raise ValueError(f"its request is {plan['request']!r:.60}")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"{file}: expected what an interrupted writer of {file.parent.parent} has left; "
            f"got {error!r}"
        ) from error
    return plan


def _check_request(path: Path, found: dict[str, Any] | None, request: dict[str, Any]) -> None:
    if found is None:
        raise ValueError(
            f"{path}: expected what this command has left; got a checkpoint that another command "
            "wrote and has to finish"
        )
    for name, value in request.items():
        if found.get(name) != value:
            raise ValueError(
                f"{name}: expected {found.get(name)!r} to finish what an interrupted run has left "
                f"in {path}; got {value!r}. Without that directory, all begins anew"
            )


def _clear(folder: Path) -> None:
    """Removes a staging folder, its mark at the end."""
    names = os.listdir(folder)
    if names and not {_MARK, _COMPLETE} & set(names):
        raise ValueError(
            f"{folder}: expected the files of an interrupted writer of this program; got others, "
            f"such as {min(names)}: move them to another place"
        )
    for name in sorted(names, key=lambda name: name == _MARK):
        (folder / name).unlink()
    folder.rmdir()


def is_unfinished(path: Path) -> bool:
    """Returns whether some files of `path` may be an earlier checkpoint's, others the next
    one's."""
    return (path / _STAGING / _COMPLETE).is_file()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
