"""A chain of stages in a separate process with its output in a file; finished stages are not
repeated."""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from llama2.align.recipe import Preset
from llama2.align.stages import Files, Stage, stages
from llama2.storage import read_json, write_text

_LOG = "log.txt"
_POLL = 0.5  # seconds between updates of the progress
_PATIENCE = 60.0  # seconds for a chain to save its state


def folder_of(out: Path, seed: int) -> Path:
    """Returns the folder of a seed's chain."""
    return out / f"seed-{seed}"


def log_of(out: Path, seed: int) -> Path:
    """Returns the file with the output of a seed's chain."""
    return folder_of(out, seed) / _LOG


def num_done(preset: Preset, out: Path, seed: int) -> int:
    """Returns the number of finished stages of a chain."""
    folder = folder_of(out, seed)
    return sum(Files(folder).done(stage).exists() for stage in stages(preset, seed, folder))


def run_chains(
    preset: Preset, seeds: Sequence[int], out: Path, progress: Callable[[int], None]
) -> list[int]:
    """Runs the chains of all seeds in parallel, each in a process with one thread, and returns the
    seeds whose chain failed; all others are finished.

    Finished stages are not repeated; an interrupted one resumes as its command does. Ctrl-C ends
    the chains after their commands have saved what they can. If this process ends in another way,
    the chains end at once.

    Args:
        progress: called regularly with the number of finished stages.
    """
    todo = [seed for seed in seeds if num_done(preset, out, seed) < _num_stages(preset, out, seed)]
    context = get_context("spawn")  # not fork, which would copy locks held by PyTorch's threads
    processes = {seed: context.Process(target=_run, args=(preset, seed, out)) for seed in todo}
    try:
        with _rare_progress():
            for process in processes.values():
                process.start()
        while going := [each for each in processes.values() if each.is_alive()]:
            progress(sum(num_done(preset, out, seed) for seed in seeds))
            wait([each.sentinel for each in going], timeout=_POLL)
        progress(sum(num_done(preset, out, seed) for seed in seeds))
    finally:
        _end(list(processes.values()))
    return [seed for seed, process in processes.items() if process.exitcode != 0]


@contextmanager
def _rare_progress() -> Iterator[None]:
    """Makes child processes, whose output goes to files, write their progress only every 30
    seconds: tqdm reads the variable when it is imported, before any of their work."""
    name = "TQDM_MININTERVAL"
    before = os.environ.get(name)
    os.environ[name] = "30"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _num_stages(preset: Preset, out: Path, seed: int) -> int:
    return len(stages(preset, seed, folder_of(out, seed)))


def _end(processes: Sequence[SpawnProcess]) -> None:
    """Interrupts the processes that are still running."""
    begun = [process for process in processes if process.pid is not None]
    for process in begun:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    patience = time.monotonic() + _PATIENCE
    for process in begun:
        process.join(max(patience - time.monotonic(), 0))
        if process.is_alive():
            process.kill()


def _run(preset: Preset, seed: int, out: Path) -> None:
    """Runs a chain; the main function of its process."""
    os.setpgrp()  # so that a terminal's Ctrl-C only reaches the parent, which passes it on
    _end_with_parent()
    folder = folder_of(out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with log_of(out, seed).open("ab", buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    try:
        for _ in run_chain(preset, seed, folder):
            pass
    except KeyboardInterrupt:  # the command has reported what it saved
        sys.exit(130)
    except ChainError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


def _end_with_parent() -> None:
    parent = parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class ChainError(Exception):
    """A stage failed."""


def run_chain(preset: Preset, seed: int, folder: Path) -> Iterator[Stage]:
    """Runs the unfinished stages in this process and yields each when it is finished.

    Raises:
        ChainError: a command ended with a status other than 0, or a stage was done by another
            command.
    """
    torch.set_num_threads(1)
    files = Files(folder)
    for stage in stages(preset, seed, folder):
        done = files.done(stage)
        if done.exists():
            _check_same(done, stage)
            continue
        print(f"\n$ {' '.join(stage.command)}", file=sys.stderr, flush=True)
        began, cpu_began = time.perf_counter(), time.process_time()
        status = _main(stage.command)
        if status == 130:  # after Ctrl-C
            raise KeyboardInterrupt
        if status:
            raise ChainError(f"{stage.name}: expected exit status 0; got {status}")
        record = {
            "command": list(stage.command),
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(time.process_time() - cpu_began, 2),
        }
        done.parent.mkdir(exist_ok=True)
        write_text(done, json.dumps(record) + "\n")
        yield stage


def _main(command: Sequence[str]) -> int:
    """Runs a stage's command in this process, and returns its exit status."""
    program, *words = command
    if program == "llama2":
        module = "llama2.cli"
    else:
        _, module, *words = words  # python -m MODULE
    return importlib.import_module(module).main(words)


def _check_same(done: Path, stage: Stage) -> None:
    found = read_json(done)
    if found.get("command") != list(stage.command):
        raise ChainError(
            f"{done}: expected a stage done by {' '.join(stage.command)}; got "
            f"{' '.join(found.get('command', []))}. Use another folder for another chain"
        )
