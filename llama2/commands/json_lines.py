"""Files of JSON lines: what is wrong with a line, and results that a killed run goes on with."""

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from llama2.checkpoint.files import require
from llama2.finetune.dialogues import Refuse
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


def read_and_make(
    paths: Sequence[Path],
    read: Callable[[Path, Refuse], Iterable[Any]],
    make: Callable[[Any], Any],
    *,
    kind: str,
    speaks: bool,
) -> tuple[list[Any], Counter[str], int]:
    """What `make` makes of the records of files, how many there are by their source, and how many
    lines are bad, each of which is named on stderr.

    Args:
        read: the records of a file, with their `source`, `file` and `line`.
        make: raises a ValueError for a record that cannot be taken.
        kind: what a record is called.
        speaks: whether this process shows anything.
    Raises:
        ValueError: no record is left.
    """
    made, sources, complaints = [], Counter(), Complaints(speaks=speaks)
    with require("tqdm").tqdm(desc="reading", unit=kind, leave=False, disable=not speaks) as bar:

        def refuse(file: Path, line: int, error: Exception) -> None:
            bar.clear()
            complaints.add(file, line, error)

        for path in paths:
            for record in read(path, refuse):
                bar.update()
                try:
                    made.append(make(record))
                except ValueError as error:
                    refuse(record.file, record.line, error)
                    continue
                sources[record.source] += 1
    if not made:
        raise ValueError(
            f"{paths[0]}: expected at least one {kind}; got none beside {complaints.count} bad "
            "lines"
        )
    return made, sources, complaints.count
