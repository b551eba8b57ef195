"""The command of modules that check a kernel by random calls and by faults put into it."""

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import ptx_faults
import torch

from gqa_kernels.runtime import target

PTX_SEEDS = 3  # interleavings in which a fault in the PTX may be noticed


def complaints(
    measure: Callable[[Any, int, Any, str], list[Any]],
    case: Any,
    seed: int,
    attend: Callable[..., Any],
    device: str = "cpu",
) -> list[str]:
    """What goes wrong in a call, or which results are beyond their error budget.

    Args:
        measure: returns an `accuracy.Measured` of each result.
    """
    try:
        measured = measure(case, seed, attend, device)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return [str(m) for m in measured if not m.ok]


def how_noticed(
    complaints: Callable[[Any, int, Any], list[str]],
    as_written: Callable[[Any, int, Any], Any],
    shapes: Callable[[], Iterable[Any]],
    fault: Any,
) -> str | None:
    """What the first call that notices a fault says; None if none does."""
    for seed, case in enumerate(shapes()):
        if found := complaints(case, seed, as_written(case, seed, fault.apply)):
            return found[0]
    return None


def command(
    description: str,
    draw_case: Callable[[random.Random], Any],
    runs: Mapping[str, Callable[[Any, int], Any]],
    complaints: Callable[[Any, int, Any, str], list[str]],
    faults: Callable[[], Iterable[Any]],
    how_noticed: Callable[[Any], str | None],
    ptx_families: Iterable[tuple[Any, ...]],
    ptx_implied: Container[str],
) -> None:
    """Runs what the command line asks for; exits with status 1 if a call was wrong or a fault was
    not noticed.

    Args:
        runs: by "written", "ptx" and "gpu", a function of (case, seed) that returns what
            `complaints(case, seed, …, device)` judges.
        how_noticed: returns what the first call that notices a fault says; None if none does.
        ptx_families, ptx_implied: of `ptx_faults.faults`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=0, help="random calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true", help="break the kernel, or its PTX")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="of faults: K of N"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ptx", action="store_true", help="run random calls as compiled")
    where.add_argument("--gpu", action="store_true", help="run random calls on a GPU")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: expected a GPU; PyTorch finds none")
    torch.set_num_threads(1)
    started, failed, numbers = time.time(), 0, random.Random(options.seed)
    run = runs["gpu" if options.gpu else "ptx" if options.ptx else "written"]
    device = "cuda" if options.gpu else "cpu"
    if run is runs["written"]:  # for which launches are planned as for an H200
        target.current = lambda: target.Target("sm_90", 132, True, 32)
    for number in range(options.cases):
        case, seed = draw_case(numbers), number + 10**6 * options.seed
        for complaint in complaints(case, seed, run(case, seed), device):
            failed += 1
            print(f"failed {number} {case}: {complaint}", flush=True)
    if options.cases:
        print(f"{options.cases} calls, {failed} complaints, {time.time() - started:.0f} s")
    if options.faults and options.ptx:
        faults = functools.partial(
            ptx_faults.faults, ptx_families, ptx_implied, run, complaints, options.part
        )
        how_noticed = functools.partial(ptx_faults.how_noticed, complaints, run, PTX_SEEDS)
    for fault in faults() if options.faults else ():
        found = how_noticed(fault)
        failed += found is None
        print(f"{'seen  ' if found else 'MISSED'} {fault} | {(found or '')[:110]}", flush=True)
    sys.exit(failed > 0)
