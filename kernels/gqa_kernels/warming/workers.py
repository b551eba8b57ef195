"""Compiles kernels in several processes at once."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import NamedTuple

from gqa_kernels.warming.recording import Kernel


class Outcome(NamedTuple):
    """The result of compiling a kernel."""

    kernel: Kernel
    was_there: bool  # in the cache
    error: str | None


class _Worker:
    """A process of `worker.py`: started on demand, and restarted if it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def compile(self, kernel: Kernel) -> Outcome:
        if self._process is None:
            self._process = _start()
        process = self._process
        try:
            print(json.dumps(kernel), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return Outcome(kernel, **json.loads(line))
        self.stop()
        return Outcome(kernel, False, f"its process ended with status {process.returncode}")

    def stop(self) -> None:
        if self._process is not None:
            with self._process as process:  # closes its pipes and waits for it
                process.terminate()
            self._process = None


def _start() -> subprocess.Popen[str]:
    # A new process with the caller's import path: a fork would break threads and the GPU's context,
    # and multiprocessing's spawn would import the caller's __main__.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    )


def compile_all(kernels: Sequence[Kernel], jobs: int) -> Iterator[Outcome]:
    """Compiles kernels; yields the result of each as soon as it is done.

    Args:
        jobs: the largest number of processes.
    """
    workers = [_Worker() for _ in range(min(jobs, len(kernels)))]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def compile_one(kernel: Kernel) -> Outcome:
        worker = idle.get()
        try:
            return worker.compile(kernel)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(max(len(workers), 1))
    try:
        for future in as_completed([threads.submit(compile_one, kernel) for kernel in kernels]):
            yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()
