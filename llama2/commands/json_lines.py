"""JSON-lines files: reports of bad lines, and result files that a killed run resumes from."""

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
    """Counts bad lines and, with `speaks`, reports each one on stderr."""

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
    """Passes each record of a result file to `take` and returns the size of all whole lines, which
    is where a partial last line begins.

    Args:
        take: called with each record; it raises ValueError, TypeError, KeyError or AttributeError
            for a record that the command did not write.
        is_begun: returns whether a last line without a line end can be the beginning of a record.
        option: the option that names the file.
    Raises:
        ValueError: the file contains something other than results.
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
                    f"{option}: expected results of this command; got another line at "
                    f"{path}:{number}"
                ) from error
            end += len(raw)
    return end


def lock_output(file: IO[Any], *, option: str = "--out") -> None:
    """Locks an output file while it is open, so that two runs do not do the same work.

    Raises:
        ValueError: another run holds the lock.
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
    """Reads the records of files and returns what `make` returns for each, their number by source,
    and the number of bad lines. Reports each bad line on stderr.

    Args:
        read: returns the records of a file, each with `source`, `file` and `line`.
        make: raises ValueError for a record that cannot be used.
        kind: what messages call a record.
        speaks: whether this process prints anything.
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
            f"{paths[0]}: expected at least one {kind}; got none and {complaints.count} bad lines"
        )
    return made, sources, complaints.count
