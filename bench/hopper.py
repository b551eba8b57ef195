"""Checks and races the attention kernels for Hopper on this machine's GPU, in one command.

    python bench/hopper.py --out results/hopper.json [--minutes 13]

Runs jobs, each in a process of its own with a time limit, because a kernel with a wrong barrier
hangs: a small call of each pass under Triton's concurrency sanitizer; random calls of the portable
kernels and of each variant (`hopper_variants.py`), held to the error budget, each made twice; races
of the variants that passed, forward or backward, beside the portable kernels, cuDNN and
FlashAttention 2 through PyTorch, and FlashAttention 3 where it is installed. The plan gives every
job its seconds; what decides about the tables comes first, and a race that is short of time goes on
when the other jobs of the tables are done. Every result is written at once: the same command goes
on where an interrupted one stopped. Prints, and writes beside OUT as Markdown, the results and the
rows for `kernels/gqa_kernels/runtime/hopper_configs.py` (`hopper_report.py`). Needs PyTorch, Triton
and pytest; the packages of this checkout need not be installed. `--dry-run` goes through all kinds
of jobs without a GPU.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import importable

importable.extend_path()

import hopper_report
import hopper_variants as variants
import record
from hopper_variants import Job
from record import Record, Row

from llama2.storage import write_text

CHILD = Path(__file__).with_name("hopper_child.py")
LEAST_S = 25.0  # a job is not started with less; enough to import PyTorch and report something
REPORTING_S = 10.0  # a race begins no shape that late before its end
TURNS = 3  # how often a race that is short of time gets its seconds before less important jobs
END = "end"  # the pass of the row that says how a job ended


class CutError(Exception):
    """A job was stopped because the time of the whole command was up."""


def command_of(job: Job, results: Record, dry: bool, seconds: float = math.inf) -> list[str]:
    raced = [row["shape"] for row in results.content["rows"] if row.get("job") == job.name]
    found = [sys.executable, str(CHILD), job.kind, *([job.what] if job.what else [])]
    if job.kind == "check":
        found += [f"--run={job.run}"]
    if job.kind == "race":
        found += [f"--seconds={seconds}", f"--skip={','.join(dict.fromkeys(raced))}"]
        found += [f"--ceilings={json.dumps(results.content['ceilings'])}"]
    return [*found, *(["--dry-run"] if dry else [])]


def environment_of(job: Job, dry: bool) -> dict[str, str]:
    found = dict(os.environ)
    if dry:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    elif job.kind == "consan":
        found["TRITON_INSTRUMENTATION_MODE"] = "consan"
    return found


def run_child(
    command: list[str],
    environment: dict[str, str],
    seconds: float,
    log: TextIO,
    add: Callable[[dict[str, Any]], None],
) -> str:
    """Runs a process for at most `seconds` and hands over each of its results as it comes.

    Returns:
        "" or why it failed.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # so that its children end with it
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end, last = time.monotonic() + seconds, ""
    try:
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            if line.startswith("@"):
                add(json.loads(line[1:]))
            else:
                log.write(line)
                log.flush()
                last = line.strip()
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        return f"still running after {seconds:.0f} s, a deadlock perhaps; last: {last or 'nothing'}"
    finally:
        _end(process)
    return "" if code == 0 else f"exit status {code}; last: {last or 'nothing'}"


@contextlib.contextmanager
def compiling_beside(jobs: Iterable[Job], log: TextIO, dry: bool) -> Iterator[None]:
    """A context beside which the sanitizer's kernels are compiled, which takes Triton 3.6 minutes:
    its jobs find them in Triton's cache."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(CHILD), "compile", job.what],
            env=environment_of(job, dry),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for job in jobs
        if job.kind == "consan" and not dry
    ]
    try:
        yield
    finally:
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its children. One that waits for a GPU heeds no other signal."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(results: Record, log: TextIO, dry: bool) -> None:
    """Writes to the results what they are measured on, with its ceilings.

    Raises:
        ValueError: they were begun on something else; or the process failed.
    """
    job = variants.DESCRIPTION
    found: dict[str, Any] = {}
    environment = environment_of(job, dry)
    failure = run_child(command_of(job, results, dry), environment, job.limit, log, found.update)
    if failure or not found:
        raise ValueError(f"{log.name}: expected a description of the GPU; {failure}")
    before, now = (
        {name: content["environment"].get(name) for name in ("gpu", "torch", "triton", "commit")}
        for content in (results.content, found)
    )
    if results.content["ceilings"] is None:
        results.content |= found
        results.write()
    elif before != now:
        raise ValueError(f"{results.path}: expected results of {now}; got some of {before}")


def run_job(job: Job, results: Record, seconds: float, log: TextIO, dry: bool) -> Row:
    """Runs a job and returns the row that says how it ended.

    Raises:
        CutError: its time, or the time that was left, less than its limit, did not suffice.
    """
    complaints: list[str] = []
    figures: dict[str, Any] = {}

    def add(result: dict[str, Any]) -> None:
        if "rows" in result:  # of one shape, together
            results.content["rows"] += [row | {"job": job.name} for row in result["rows"]]
            complaints.extend(
                f"{row['backend']}: {row['reason']}"
                for row in result["rows"]
                if row["status"] == "fail" and row["backend"] in variants.OURS
            )
        else:
            figures.update(result)
            complaints.extend(result["complaints"])
        results.write()

    start = time.monotonic()
    command = command_of(job, results, dry, min(job.planned, seconds - REPORTING_S))
    failure = run_child(command, environment_of(job, dry), min(seconds, job.limit), log, add)
    taken = time.monotonic() - start
    if figures.get("left") or (failure.startswith("still running") and seconds < job.limit):
        raise CutError(job.name)
    reason = failure or "; ".join(complaints)
    return Row("fail" if reason else "ok", {**_head(job), "seconds": taken, **figures}, reason)


def _head(job: Job) -> dict[str, Any]:
    return {"op": job.name, "pass": END, "shape": "", "what": job.what}


def unended(results: Record, jobs: Iterable[Job]) -> list[Job]:
    ended = {row["op"] for row in results.content["rows"] if row["pass"] == END}
    return [job for job in jobs if job.name not in ended]


def run_jobs(
    jobs: Iterable[Job], results: Record, deadline: float, log: TextIO, dry: bool
) -> list[Job]:
    """Runs the jobs that have not ended before; returns those for which no time was left.

    Args:
        deadline: of time.monotonic().
    """
    left = []
    for job in unended(results, jobs):
        ends = {row["op"]: row for row in results.content["rows"] if row["pass"] == END}
        if job.kind == "race" or job.run > 1:
            check = ends.get(variants.check_job(job.what).name)
            if check is None:
                left.append(job)
                continue
            if check["status"] != "ok":
                results.add(Row("skip", _head(job), "its check failed"))
                continue
        seconds = deadline - time.monotonic()
        if seconds < min(LEAST_S, job.planned):
            left.append(job)
            continue
        print(f"{job.name}: up to {min(seconds, job.limit):.0f} s", flush=True)
        log.write(f"--- {job.name}\n")
        log.flush()
        try:
            row = run_job(job, results, seconds, log, dry)
        except CutError:
            print(f"{job.name}: cut short", flush=True)
            left.append(job)
            continue
        results.add(row)
        write_page(results)
        print(f"{job.name}: {row.reason or 'ok'}", flush=True)
    return left


def write_page(results: Record) -> str:
    page = hopper_report.markdown(results.content)
    write_text(results.path.with_suffix(".md"), page)
    return page


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="result file; continued if it exists"
    )
    parser.add_argument("--minutes", type=float, default=13.0, help="default: %(default)g")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, without a GPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:  # NaN, too
        parser.error(f"--minutes: expected a positive number; got {options.minutes}")
    if options.out.suffix in (".md", ".log"):
        parser.error(f"--out: expected another suffix than .md and .log; got {options.out}")
    if not options.dry_run and not _has_gpu():
        parser.error("expected a GPU of compute capability 9.0; --dry-run needs none")
    out = options.out.resolve()
    kind = record.DRY_RUN if options.dry_run else record.MEASUREMENT
    results = Record(out, kind, {"gpu": None})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        before = record.read(out) if out.exists() else results.content
        log = out.with_suffix(".log").open("a", encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    with log:
        if before["kind"] != kind:
            parser.error(f"--out: expected a file of a {kind}; got one of a {before['kind']}")
        results.content = before
        deadline = time.monotonic() + 60 * options.minutes
        try:
            describe(results, log, options.dry_run)
        except ValueError as error:
            parser.error(str(error))
        left, plan = [], variants.plan(options.dry_run)
        with compiling_beside(unended(results, plan[0]), log, options.dry_run):
            for jobs in plan:
                for _ in range(TURNS):
                    jobs = run_jobs(jobs, results, deadline, log, options.dry_run)
                left += jobs
    print(write_page(results))
    for job in left:
        print(f"no time was left for {job.name}: the same command goes on with it")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
