"""Runs test cases in several processes that communicate through gloo, on CPU tensors."""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from budget import SEED


def run(cases: dict[str, Callable[[], None]], world_size: int) -> None:
    """Runs all cases, functions of a module, in order in every rank; raises an AssertionError that
    names the failed cases and their errors.

    The processes start only once for all cases; as separate tests, pytest's workers would
    distribute the cases. They are forked from a server that starts with the first call and has
    imported what most need. The kernels run in Triton's interpreter, also on a machine with a GPU.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["rank_modules"])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the server, before it imports anything
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        arguments = (dict(os.environ), world_size, folder, cases)
        mp.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        reports = [
            json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(Path(folder).glob("*.json"))
        ]
    failures = [f"{name}: {r[name]}" for r in reports for name in r if r[name] != "passed"]
    failures += [f"{name}: not run" for name in cases if not all(name in r for r in reports)]
    assert not failures, "\n".join(failures)


def _rank(
    rank: int,
    environment: dict[str, str],
    world_size: int,
    folder: str,
    cases: dict[str, Callable[[], None]],
) -> None:
    from gqa_kernels import interpreter

    interpreter.enable()
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
    )
    outcomes = {}
    for name, case in cases.items():
        torch.manual_seed(SEED)
        try:
            case()
            outcomes[name] = "passed"
        except (Exception, pytest.fail.Exception):
            outcomes[name] = f"rank {rank}:\n{traceback.format_exc()}"
        everywhere = [None] * world_size
        try:
            dist.all_gather_object(everywhere, outcomes[name])
        except Exception:  # the ranks are no longer in step
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()
    # Skips Python's finalisation, during which a thread of gloo that frees a tensor would abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
