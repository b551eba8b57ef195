"""Tests, benchmarks and tunes the kernels on this machine's GPU, in one command.

    python bench/gpu.py --budget 1800 --out results/

Runs stages, each in a separate process with a share of the time budget (later stages get what
earlier ones leave): correctness on the device, ceilings, our table, the peers, tuning. Results are
written as they are measured: a stage that is cut short, or this command if it is killed, keeps its
results, and the same command run again continues from there. OUT/plan.md says how to read them.
Needs PyTorch, Triton and pytest; the packages of this checkout need not be installed. `--dry-run`
goes through all stages without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import importable
import record
import report

BENCH = Path(__file__).resolve().parent
STOP_EARLY_S = 20  # left for writing and for a last group
GRACE_S = 15  # between SIGINT and SIGKILL to a stage
MIN_STAGE_S = 60  # enough to import PyTorch and report something
_DRY = {
    "ours": "rms_norm-fwd",
    "peers": "swiglu-bwd or attention-fwd or entropy-step or decode_step",
}


@dataclass(frozen=True)
class Stage:
    name: str
    share: float
    question: str

    def command(self, out: Path, seconds: float, dry: bool) -> list[str]:
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        timed = [
            *pytest,
            *map(str, sorted(BENCH.glob("test_bench_*.py"))),
            # In a dry run, each of the two stages runs some ops; together they run all kinds of
            # tests.
            *(["-k", _DRY[self.name]] if dry and self.name in _DRY else []),
            f"--bench-json={out / self.name}.json",
            "--bench-resume",
            f"--bench-budget={max(1.0, seconds - STOP_EARLY_S):.0f}",
            *(["--bench-dry-run"] if dry else []),
        ]
        script = [f"--json={out / self.name}.json", *(["--dry-run"] if dry else [])]
        if self.name == "correctness":
            tests = BENCH.parent / "tests"
            if dry:  # the tests run elsewhere; here it is enough that pytest collects some
                return [*pytest, str(tests / "ops" / "test_ops.py"), "--collect-only"]
            # Tests that compile for other GPUs do not test this one.
            return [*pytest, str(tests), f"--ignore={tests / 'ops' / 'test_compile.py'}"]
        if self.name == "ceilings":
            return [sys.executable, str(BENCH / "ceilings.py"), *script]
        if self.name == "ours":
            return [*timed, "--bench-tier=full", "--bench-backends=triton"]
        if self.name == "peers":
            raw = [f"--benchmark-json={out / 'peers_samples.json'}"]
            return [*timed, "--bench-tier=full", *(raw if find_spec("pytest_benchmark") else [])]
        return [
            sys.executable,
            str(BENCH / "tune.py"),
            *script,
            f"--budget={max(1.0, seconds - STOP_EARLY_S):.0f}",
        ]


STAGES = (
    Stage("correctness", 0.20, "Do the tests pass on this GPU?"),
    Stage("ceilings", 0.02, "What are the device's peak rates?"),
    Stage("ours", 0.15, "Where are we far from the floor?"),
    Stage("peers", 0.45, "Which peers are faster, and where?"),
    Stage("tuning", 0.18, "Which launch configurations are faster?"),
)

_PLAN = """# How to read these files

| stage | its question | answer in | how it went |
| --- | --- | --- | --- |
{table}

1. **correctness.log**: read its last lines. Fix a failure here before you look at any time. The
   other stages check each row again and never time a wrong one.
2. **ceilings.json**: copy bandwidth, read bandwidth and matrix rate. Rates far below the data sheet
   mean that another process uses the GPU or that its clocks are limited: shares of the floor remain
   valid, times do not.
3. **ours/report.html**: the column "% of floor". Row ops and decoding above 85 % have little left
   to gain; work on the lowest shares at the largest shapes next. Rows with `bound: latency` are
   limited by launches: look at their host time.
4. **peers/report.html**: the losses come first. A difference within the noise is a tie. Tuning or a
   better schedule can win against `compile` or a Triton peer; it may not win against `sdpa_cudnn`
   and `fa3` in prefill attention. "Not timed" lists the peers that were absent: nothing is known
   about those.
5. **tuning.log**: rows to paste into `kernels/gqa_kernels/runtime/configs.py`. Ignore gains below
   the noise. Then run `ours` again: `python bench/gpu.py --out {out} --again ours`.

Quote results from these files, losses as plainly as wins.
"""


def _state(out: Path) -> dict[str, Any]:
    file = out / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write(out: Path, state: dict[str, Any]) -> None:
    (out / "stages.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    table = "\n".join(
        f"| {stage.name} | {stage.question} | {_answer(stage)} | "
        f"{state.get(stage.name, {}).get('status', 'not run yet')} |"
        for stage in STAGES
    )
    (out / "plan.md").write_text(_PLAN.format(table=table, out=out.name), encoding="utf-8")


def _answer(stage: Stage) -> str:
    return {
        "correctness": "correctness.log",
        "ceilings": "ceilings.json",
        "ours": "ours/report.html",
        "peers": "peers/report.html",
        "tuning": "tuning.log, tuning.json",
    }[stage.name]


def run_stage(stage: Stage, out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Runs a stage for at most `seconds`; its output goes to OUT/STAGE.log."""
    start = time.monotonic()
    status = "done"
    with (out / f"{stage.name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            stage.command(out, seconds, dry),
            cwd=BENCH.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if dry else {})},
            start_new_session=True,  # so that its children can be stopped with it
        )
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"failed (exit status {code})"
            if code == 0 and _left(stage, out):
                status = "cut short"
        except subprocess.TimeoutExpired:
            status = "cut short"
            stop(process)
        except BaseException:
            stop(process)
            raise
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}


def _left(stage: Stage, out: Path) -> int:
    """How many groups of a timed stage were not measured within the budget."""
    results = out / f"{stage.name}.json"
    if stage.name not in ("ours", "peers") or not results.exists():
        return 0
    return json.loads(results.read_text(encoding="utf-8")).get("groups_left", 0)


def stop(process: subprocess.Popen) -> None:
    """Stops a process that leads a process group, and all processes of the group."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _report(stage: Stage, out: Path) -> None:
    results = out / f"{stage.name}.json"
    if stage.name in ("ours", "peers") and results.exists():
        try:
            report.write(record.read(results), out / stage.name)
        except Exception:  # the result file exists, and later stages must run
            traceback.print_exc()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="time for all stages together; default: %(default)g",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the result files")
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage again although it is done; repeatable: "
        + ", ".join(stage.name for stage in STAGES),
    )
    parser.add_argument("--dry-run", action="store_true", help="every stage, without a GPU")
    options = parser.parse_args(arguments)
    for name in options.again:
        if name not in [stage.name for stage in STAGES]:
            parser.error(f"--again: expected one of the stages; got {name}")
    importable.extend_path()
    if not options.dry_run and not _has_gpu():
        parser.error("no GPU that PyTorch can drive; --dry-run goes through the stages without one")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = _state(out)
    for name in options.again:
        state.pop(name, None)
        (out / f"{name}.json").unlink(missing_ok=True)
    _write(out, state)
    end = time.monotonic() + options.budget
    todo = [s for s in STAGES if state.get(s.name, {}).get("status") != "done"]
    for index, stage in enumerate(todo):
        left = end - time.monotonic()
        share = left * stage.share / sum(later.share for later in todo[index:])
        seconds = max(share, MIN_STAGE_S)
        print(f"{stage.name}: up to {seconds:.0f} s", flush=True)
        state[stage.name] = run_stage(stage, out, seconds, options.dry_run)
        print(f"{stage.name}: {state[stage.name]['status']}", flush=True)
        _report(stage, out)
        _write(out, state)
    print(f"{out / 'plan.md'} says how to read the results")
    return 0 if all(entry["status"] == "done" for entry in state.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
