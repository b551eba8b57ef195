"""`warm_up`: kernels that are compiled without a GPU, and found with one."""

import json
from pathlib import Path

import pytest
import torch
from processes import SUPPORT, compiling

import gqa_kernels
from gqa_kernels import interpreter

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What a function of `warmed.py` returns in a process of its own, with an empty cache at
    first."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def ask(*arguments):
        done = compiling(str(SUPPORT / "warmed.py"), *arguments, folder=BENCH)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def test_what_was_compiled_without_a_gpu_is_found_with_one(asked):
    kernels = ["ops.norm._forward_kernel", "ops.glu._forward_kernel"]
    assert asked("warm_row_ops") == [[kernels, [], []], [[], kernels, []]]
    found = asked("launch_row_ops")
    if found is None:
        pytest.skip("no C compiler, which Triton's launcher needs")
    warmed, other = found
    assert warmed == {"compiled": [], "launches": 2}
    assert other == {"compiled": ["_forward_kernel"] * 2, "launches": 2}


def test_a_kernel_that_does_not_compile_is_named_and_stops_no_other(asked):
    (bad, error), (good, none), (other, death), (again, nothing) = asked("fail")
    assert bad == other == "ops.glu._forward_kernel" and error and "none" in error
    assert good == again == "ops.norm._forward_kernel" and none is nothing is None
    assert death == "its process ended with status 3"


@pytest.mark.skipif(not interpreter.is_enabled(), reason="the kernels are compiled here")
def test_the_interpreter_compiles_nothing():
    with pytest.raises(RuntimeError, match="expected kernels that are compiled"):
        gqa_kernels.warm_up(lambda: torch.zeros(1), arch="sm_90")
