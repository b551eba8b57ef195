"""A chain of stages in a process of its own, whose output is a file; what is done stays done."""

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
_POLL = 0.5  # seconds between looks at what is done
_PATIENCE = 60.0  # seconds that a chain has to save its state


def folder_of(out: Path, seed: int) -> Path:
    """Where the chain of a seed is."""
    return out / f"seed-{seed}"


def log_of(out: Path, seed: int) -> Path:
    """What the chain of a seed has printed."""
    return folder_of(out, seed) / _LOG


def num_done(preset: Preset, out: Path, seed: int) -> int:
    """Stages of a chain that are done."""
    folder = folder_of(out, seed)
    return sum(Files(folder).done(stage).exists() for stage in stages(preset, seed, folder))


def run_chains(
    preset: Preset, seeds: Sequence[int], out: Path, progress: Callable[[int], None]
) -> list[int]:
    """Runs the chains of all seeds side by side, each in a process with one thread, and returns the
    seeds whose chain failed; the others' are done.

    Stages that are done are not done again; one that was interrupted goes on as its command does.
    Ctrl-C ends the chains once their commands have saved what they can. When this process ends in
    another way, the chains end at once.

    Args:
        progress: is called now and then with the number of stages that are done.
    """
    todo = [seed for seed in seeds if num_done(preset, out, seed) < _num_stages(preset, out, seed)]
    context = get_context("spawn")  # not forked: threads of PyTorch that hold a lock would hold it
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
    """Processes that are started write their progress, which goes to files, every 30 seconds: tqdm
    reads the variable when it is imported, which comes before anything that they are to do."""
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
    """Interrupts those that are still at work."""
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
    """What the process of a chain does."""
    os.setpgrp()  # a terminal's Ctrl-C goes to the first process alone, which passes it on
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
    except KeyboardInterrupt:  # the command has said what it saved
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
    """A stage did not end as it should."""


def run_chain(preset: Preset, seed: int, folder: Path) -> Iterator[Stage]:
    """Runs the stages that are not done, in this process, and gives each when it is.

    Raises:
        ChainError: a command ended with another status than 0, or a stage was done by another one.
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
            raise ChainError(f"{stage.name}: expected the command to end with 0; got {status}")
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
            f"{done}: expected a stage that was done by {' '.join(stage.command)}; got "
            f"{' '.join(found.get('command', []))}. Another chain needs another folder"
        )
