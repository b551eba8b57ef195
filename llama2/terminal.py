"""Messages on stderr: a message that cannot be written never stops the work, and an error is one
line."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

# Errors that a user can cause. Any other error is a defect and keeps its traceback.
COMPLAINTS = (
    OSError,
    ValueError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    MemoryError,
    torch.OutOfMemoryError,
)


class _Notes:
    """A stream that drops all output after the first OSError, for example of a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def counted(count: int, noun: str) -> str:
    """Returns the number and the noun, with an "s" unless the number is 1: `2,000 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def complain_of_line(path: Path, number: int, error: Exception) -> None:
    """Reports a bad line of a file on stderr."""
    print(f"{path}:{number}: {' '.join(str(error).split())}", file=sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirects a stream to the null device, so that Python's flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Replaces stderr during the block by a stream that never fails, even if stderr is closed or
    full."""
    with contextlib.ExitStack() as opened:
        stream = sys.stderr
        if stream is None:  # closed: print would write to stdout, and tqdm would fail
            stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks becomes "?"
            stream.reconfigure(errors="replace")
        opened.enter_context(contextlib.redirect_stderr(_Notes(stream)))
        yield


def complain(program: str, error: BaseException) -> int:
    """Prints a user's error as one line on stderr and returns the exit status, 2."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError) and "memory" in text.lower():
        text = (
            "expected enough memory for this call; a smaller batch, fewer new tokens, --dtype "
            f"bfloat16 or --kv-cache-dtype fp8 need less, if the command has them. {text}"
        )
    print(f"{program}: {text}", file=sys.stderr)
    return 2


def answered(program: str, run: Callable[[], None]) -> int:
    """Runs a program and returns its exit status: 0, 2 after an error, or 130 after Ctrl-C."""
    with notes():
        try:
            run()
        except KeyboardInterrupt:
            return 130
        except COMPLAINTS as error:
            return complain(program, error)
    return 0
