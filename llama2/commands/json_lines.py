"""Files of JSON lines: what is wrong with a line, and results that a killed run goes on with."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from llama2.terminal import complain_of_line

_NOT_OURS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class Complaints:
    """Says on stderr what is wrong with a line, unless it is silent, and counts."""

    def __init__(self, *, speaks: bool = True) -> None:
        self.count, self._speaks = 0, speaks

    def add(self, path: Path, number: int, error: Exception) -> None:
        self.count += 1
        if self._speaks:
            complain_of_line(path, number, error)


def resume(
    path: Path,
    take: Callable[[Any], None],
    is_begun: Callable[[bytes], bool],
    *,
    option: str = "--out",
) -> int:
    """Hands over the records of a file of results and returns where a half-written last line
    begins: the size of all that are whole.

    Args:
        take: is called with each record; it raises a ValueError, TypeError, KeyError or
            AttributeError for one that the command did not write.
        is_begun: whether a last line without an end can be the beginning of such a record.
        option: that names the file.
    Raises:
        ValueError: the file holds something else than results.
    """
    if not path.exists():
        return 0
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n") and is_begun(raw):
                break
            try:
                if not raw.endswith(b"\n"):
                    raise ValueError
                take(json.loads(raw))
            except _NOT_OURS as error:
                raise ValueError(
                    f"{option}: expected results of this command; got something else in line "
                    f"{number} of {path}"
                ) from error
            end += len(raw)
    return end


def lock_output(file: IO[Any], *, option: str = "--out") -> None:
    """For as long as the file is open: two runs would both do what is missing.

    Raises:
        ValueError: another run has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{option}: expected a file that no other run writes to; got {file.name}"
        ) from error
