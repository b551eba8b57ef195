"""Sweeps the launch configurations of an op on this machine's GPU; prints rows for `configs.py`.

    python bench/tune.py rms_norm-fwd [--budget SECONDS] [--json PATH]

Compiles every candidate (in threads), checks it against the error budget of the package's tests and
times the candidates in alternating rounds. A candidate that does not fit the GPU, or whose results
are wrong, is listed with the reason and never proposed.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import importable

importable.make_importable()

import torch
from ceilings import commit, version
from runner import OpContest
from stub import StubDevice, stand_ins
from sweeps import SWEEPS, Candidate, Sweep, arguments_of, tiny_sweeps
from timing import Call, Clock, Timed
from triton.runtime import JITFunction

from gqa_kernels.runtime import configs


@contextlib.contextmanager
def patched(values: dict[str, Any]) -> Iterator[None]:
    """A context in which `configs` has these values; raises for names that it does not have."""
    before = {name: getattr(configs, name) for name in values}
    try:
        for name, value in values.items():
            setattr(configs, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(configs, name, value)


@contextlib.contextmanager
def compiling_only(executor: ThreadPoolExecutor) -> Iterator[None]:
    """A context in which launches only compile, in the executor's threads; at exit it waits for
    them."""
    from triton.runtime._async_compile import AsyncCompileMode

    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = warm_up
    try:
        # A candidate that does not compile raises again when it is checked.
        with AsyncCompileMode(executor, ignore_errors=True):
            yield
    finally:
        JITFunction.run = run


class Outcome(NamedTuple):
    candidate: Candidate
    seconds: float | None  # None: not proposed
    reason: str


def run_sweep(
    sweep: Sweep, clock: Clock, device: torch.device, *, deadline: float = float("inf")
) -> list[Outcome]:
    """Returns the outcomes of all candidates, the fastest first, those without a time last."""
    contest = OpContest(sweep.workload, device, clock.device.l2_bytes)
    calls: dict[str, Call] = {}
    named = {arguments_of(candidate): candidate for candidate in sweep.candidates}
    outcomes = []

    def prepare(candidate: Candidate) -> Call:
        # The configuration is read at the launch, so the patch has to surround every call.
        with patched(sweep.patch(candidate)):
            call = contest.prepare("triton", "events").call

        def patched_call() -> Any:
            with patched(sweep.patch(candidate)):
                return call()

        return patched_call

    if device.type == "cuda":
        _compile_all(sweep, contest)
    for name, candidate in named.items():
        if time.monotonic() > deadline:
            outcomes.append(Outcome(candidate, None, "budget"))
            continue
        try:
            calls[name] = prepare(candidate)
        except Exception as error:  # too large for the GPU, or wrong: listed with its reason
            outcomes.append(Outcome(candidate, None, f"{type(error).__name__}: {error}"[:200]))
    calls = stand_ins(clock.device, calls)
    for name, result in clock.measure(calls, "events").items():
        if isinstance(result, Timed):
            outcomes.append(Outcome(named[name], result.median, ""))
        else:
            outcomes.append(Outcome(named[name], None, f"{type(result).__name__}: {result}"[:200]))
    contest.close()
    return sorted(outcomes, key=lambda o: float("inf") if o.seconds is None else o.seconds)


def _compile_all(sweep: Sweep, contest: OpContest) -> None:
    inputs = contest.inputs(1)[0]
    with ThreadPoolExecutor() as executor, compiling_only(executor):
        for candidate in sweep.candidates:
            with patched(sweep.patch(candidate)), contextlib.suppress(Exception):
                contest.call("triton", inputs)()


def describe(sweep: Sweep, outcomes: list[Outcome]) -> str:
    """Describes the outcomes: the row to paste, its gain, and the five fastest candidates."""
    timed = [outcome for outcome in outcomes if outcome.seconds is not None]
    lines = [f"# {sweep.workload.group}: {len(timed)} of {len(outcomes)} candidates timed"]
    if timed:
        gain = f", {timed[1].seconds / timed[0].seconds:.3f} × the next" if len(timed) > 1 else ""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "SIMULATED TIMES"
        lines += [
            f"# {gpu}, Triton {version('triton')}, commit {commit()}{gain}",
            sweep.row(timed[0].candidate),
        ]
        lines += [f"#   {o.seconds * 1e6:9.2f} µs  {arguments_of(o.candidate)}" for o in timed[:5]]
    lines += [f"#   not: {arguments_of(o.candidate)}: {o.reason}" for o in outcomes if o.reason]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SWEEPS)}; default: all")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="all outcomes, rewritten after every sweep")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, simulated times")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in SWEEPS:
            parser.error(f"names: expected some of {', '.join(SWEEPS)}; got {name}")
    deadline = time.monotonic() + options.budget
    if options.dry_run:
        device, clock, sweeps = torch.device("cpu"), Clock(StubDevice()), tiny_sweeps()
    else:
        from cuda_device import CudaDevice

        device, clock = torch.device("cuda"), Clock(CudaDevice())
        sweeps = [sweep for name in options.names or SWEEPS for sweep in SWEEPS[name]()]
    record = []
    for sweep in sweeps:
        with torch.no_grad():
            outcomes = run_sweep(sweep, clock, device, deadline=deadline)
        print(describe(sweep, outcomes), flush=True)
        record.append({"group": sweep.workload.group, "outcomes": [o._asdict() for o in outcomes]})
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
