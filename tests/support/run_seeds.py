"""Runs the tests of error budgets with many seeds and settings; summarises the largest errors.

    python tests/support/run_seeds.py [--every-combination] [--runs DIR] [--out FILE]

- every test that measures an error budget with 3 seeds, with each instruction set to which PyTorch,
  MKL, oneDNN and OpenBLAS can be limited, and with 1, 2 and 8 threads: each pair of instruction set
  and threads with one of the seeds, or with every seed;
- the small cases of the op table with 20 seeds, with these settings in turn.

Each run writes a file of JSON lines to a folder of DIR that is named after a hash of the sources.
Runs whose file exists are skipped, so an interrupted command resumes. FILE gets the summary: the
settings, what failed, and the largest part of a budget that any error used, for each op and dtype.
It takes hours.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from llama2.checkout import commit_of

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
TABLE_SEEDS = range(20)
SEEDS = range(3)
THREADS = (1, 2, 8)
# The switches of PyTorch's own kernels, of MKL, oneDNN and OpenBLAS.
INSTRUCTION_SETS = {
    "default": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "AVX-512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
}
TABLE_TEST = "tests/ops/test_ops.py::test_within_budget"


class Run(NamedTuple):
    """One run of pytest."""

    instructions: str
    num_threads: int
    seed: int
    table: bool  # only the op table

    @property
    def name(self) -> str:
        what = "table" if self.table else "all"
        return f"{what}-{self.instructions}-{self.num_threads}-threads-seed-{self.seed}"


FIRST = Run("default", 1, 0, False)


def all_runs(every_combination: bool) -> list[Run]:
    """Returns all runs; the first one finds out which tests measure a budget."""
    tests = [
        Run(instructions, num_threads, seed, False)
        for seed in SEEDS
        for i, instructions in enumerate(INSTRUCTION_SETS)
        for j, num_threads in enumerate(THREADS)
        if every_combination or j == (i + seed) % len(THREADS)
    ]
    settings = itertools.cycle((run.instructions, run.num_threads) for run in tests)
    return tests + [Run(*next(settings), seed, True) for seed in TABLE_SEEDS]


def budget_tests(folder: Path) -> list[str]:
    """The tests that measure a budget, except the op table, as found by the first run; before it,
    their files."""
    found = folder / f"{FIRST.name}.jsonl"
    if found.exists():
        tests = {record["test"] for record in read(found) if "test" in record}
        return sorted(test for test in tests if not test.startswith(f"{TABLE_TEST}["))
    files = [
        file
        for file in sorted(TESTS.rglob("test_*.py"))
        if "from budget" in file.read_text(encoding="utf-8")
    ]
    return [str(file.relative_to(ROOT)) for file in files]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def perform(run: Run, folder: Path) -> None:
    """Performs a run; writes NAME.jsonl, a record of every error, then of the outcome."""
    report, done = folder / f"{run.name}.partial", folder / f"{run.name}.jsonl"
    report.unlink(missing_ok=True)
    chosen = [TABLE_TEST] if run.table else budget_tests(folder)
    arguments = folder / f"{run.name}.tests"
    arguments.write_text("\n".join(chosen), encoding="utf-8")
    environment = os.environ | INSTRUCTION_SETS[run.instructions]
    environment |= {"TEST_SEED": str(run.seed), "BUDGET_REPORT": str(report.resolve())}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(run.num_threads))
    command = [
        str(Path(sys.executable).with_name("pytest")),
        "-p",
        "no:cacheprovider",
        "-q",
        "-n",
        "auto",
        "-m",
        "not matrix and not machine_code and not mutants",
    ]
    command += ["--maxprocesses", "4", f"@{arguments.resolve()}"]
    with (folder / f"{run.name}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
    if code not in (0, 1):
        raise SystemExit(f"{run.name}: pytest ended with {code}; see {log.name}")
    lines = (folder / f"{run.name}.log").read_text(encoding="utf-8").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    with report.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"passed": code == 0, "failed": failed}) + "\n")
    report.rename(done)


def op_of(test: str) -> str:
    """The op of a case of the table; the file of any other test."""
    file, _, name = test.rpartition("/")[2].partition("::")
    return name.partition("[")[2].partition("-")[0] if file == "test_ops.py" else file


def sources() -> str:
    """A hash of everything on which the results depend."""
    folders = [ROOT / name for name in ("kernels", "llama2", "tests")]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def summary(runs: list[Run], num_runs: int, folder: Path) -> str:
    nearest: dict[str, dict[str, float]] = defaultdict(dict)
    rows, num_errors = [], 0
    for run in runs:
        records = read(folder / f"{run.name}.jsonl")
        errors, outcome = records[:-1], records[-1]
        num_errors += len(errors)
        worst = max(errors, key=lambda error: error["share"])
        rows.append(
            f"| {'op table' if run.table else 'all'} | {run.instructions} | {run.num_threads} "
            f"| {run.seed} | {len(errors)} | {worst['share']:.2f} | {len(outcome['failed'])} |"
        )
        for error in errors:
            shares = nearest[op_of(error["test"])]
            dtype = error["dtype"].removeprefix("torch.")
            shares[dtype] = max(shares.get(dtype, 0.0), error["share"])
    dtypes = ("float32", "float16", "bfloat16")
    table = [
        f"| {name} | "
        + " | ".join(f"{shares[d]:.2f}" if d in shares else "–" for d in dtypes)
        + " |"
        for name, shares in sorted(nearest.items())
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy"))
    return "\n".join(
        [
            "# How near errors come to their budgets",
            "",
            f"Made by `make test-seeds` on {processor()} with {versions}, Python "
            f"{platform.python_version()}: {num_errors} errors in {len(runs)} of {num_runs} "
            f"runs of commit {commit_of(Path(__file__))}. `kernels/gqa_kernels/accuracy.py` "
            "derives a budget; 1.00 would use all of it.",
            "",
            "## The largest part of a budget that an error used",
            "",
            "Of an op: over all cases of the op table. Of a file: over all its tests.",
            "",
            f"| op or file | {' | '.join(dtypes)} |",
            "|---|---|---|---|",
            *table,
            "",
            "## Runs",
            "",
            "| tests | instructions | threads | seed | errors | largest part | failed tests |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--every-combination",
        action="store_true",
        help="every setting with every seed: 47 runs instead of 29",
    )
    parser.add_argument(
        "--summary-only", action="store_true", help="summarise existing runs without running others"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / ".seeds", metavar="DIR", help="default: .seeds"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results" / "error_budgets.md",
        metavar="FILE",
        help="file to overwrite; default: bench/results/error_budgets.md",
    )
    options = parser.parse_args()
    folder = options.runs / sources()
    folder.mkdir(parents=True, exist_ok=True)
    runs = all_runs(options.every_combination)
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        print("This processor has no AVX-512: those settings are left out.")
        runs = [run for run in runs if run.instructions != "AVX-512"]
    for run in tqdm(runs, unit="run"):
        if not options.summary_only and not (folder / f"{run.name}.jsonl").exists():
            perform(run, folder)
    done = [run for run in runs if (folder / f"{run.name}.jsonl").exists()]
    staged = options.out.with_suffix(".partial")
    staged.write_text(summary(done, len(runs), folder), encoding="utf-8")
    staged.replace(options.out)
    print(f"{options.out} has the summary.")
    failed = [run.name for run in done if not read(folder / f"{run.name}.jsonl")[-1]["passed"]]
    if failed:
        raise SystemExit("Tests failed in: " + ", ".join(failed))


if __name__ == "__main__":
    main()
