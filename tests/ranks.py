"""Runs test cases in several processes that talk through gloo, on CPU tensors."""

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(cases: dict[str, Callable[[], None]], world_size: int) -> dict[str, str]:
    """The outcome of every case, by name: "passed", or what went wrong in some rank.

    All ranks run all cases, functions of a module, in order; processes start once. The kernels run
    in Triton's interpreter, on a machine with a GPU too.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"  # for the children, before they import anything
        try:
            mp.spawn(_rank, args=(world_size, folder, cases), nprocs=world_size)
        except mp.ProcessExitedException as error:
            return dict.fromkeys(cases, str(error))
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        reports = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    return {
        name: next((r[name] for r in reports if r.get(name) not in (None, "passed")), "passed")
        if all(name in r for r in reports)
        else "not run: a case before it failed"
        for name in cases
    }


def _rank(rank: int, world_size: int, folder: str, cases: dict[str, Callable[[], None]]) -> None:
    from gqa_kernels import interpreter

    interpreter.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    outcomes = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
            outcomes[name] = "passed"
        except (Exception, pytest.fail.Exception):
            outcomes[name] = f"rank {rank}:\n{traceback.format_exc()}"
        everywhere = [None] * world_size
        try:
            dist.all_gather_object(everywhere, outcomes[name])
        except Exception:  # the ranks are out of step
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
