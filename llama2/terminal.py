"""What a command says on stderr: notes that cannot be written stop no work, errors are a line."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

# What a user can cause. Anything else is a defect and keeps its traceback.
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
    """A stream that goes silent for good at the first error of the device, such as a full one."""

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


def complain_of_line(path: Path, number: int, error: Exception) -> None:
    """Says on stderr what is wrong with a line of a file."""
    print(f"{path}:{number}: {' '.join(str(error).split())}", file=sys.stderr)


def discard(stream: TextIO) -> None:
    """What a stream still holds, and gets from now on, goes nowhere; Python flushes it at exit."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Makes stderr one that can be written to, also where it is closed or full, for a while."""
    with contextlib.ExitStack() as opened:
        stream = sys.stderr
        if stream is None:  # closed: print would take stdout instead, and tqdm fail
            stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
            stream.reconfigure(errors="replace")
        opened.enter_context(contextlib.redirect_stderr(_Notes(stream)))
        yield


def complain(program: str, error: BaseException) -> int:
    """Says in a line what a user did wrong, and returns the exit status for it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError) and "memory" in text.lower():
        text = (
            "expected memory for this call; a smaller batch, fewer new tokens, --dtype bfloat16 or "
            f"--kv-cache-dtype fp8 take less, where the command has them. {text}"
        )
    print(f"{program}: {text}", file=sys.stderr)
    return 2


def answered(program: str, run: Callable[[], None]) -> int:
    """Runs a program: 0, 2 after a complaint, or 130 after Ctrl-C."""
    with notes():
        try:
            run()
        except KeyboardInterrupt:
            return 130
        except COMPLAINTS as error:
            return complain(program, error)
    return 0
