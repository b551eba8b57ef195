"""Direct launches have the same binary, arguments, device and stream as Triton's.

In this process kernels run in the interpreter, which has no direct launches. The checks are those
of `launching.py`, in a process of their own with a GPU that does nothing; and the emulator executes
kernels that are launched directly.
"""

import ast
import json
from pathlib import Path

import pytest
import torch
import triton
from processes import SUPPORT, compiling

from gqa_kernels import ops
from gqa_kernels.runtime import layout

BENCH = Path(__file__).parents[2] / "bench"
CHECKS = [
    line.partition("(")[0].removeprefix("def check_")
    for file in ("launching.py", "launch_keys.py")
    for line in (SUPPORT / file).read_text(encoding="utf-8").splitlines()
    if line.startswith("def check_")
]


def outcomes(*options):
    done = compiling(str(SUPPORT / "launching.py"), *options, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("no C compiler, which Triton's launcher needs too")
    return found


@pytest.fixture(scope="module")
def found():
    return outcomes()


@pytest.mark.parametrize("check", CHECKS)
def test_over_an_idle_gpu(check, found):
    assert found[check] is None, found[check]


@pytest.mark.machine_code
def test_all_ops_over_an_idle_gpu():
    assert not [outcome for outcome in outcomes("--all").values() if outcome]


# Every case runs twice: the first launch compiles, the second is direct.
TWICE = """
import sys
from gqa_kernels.runtime import launch

launch._LAUNCHERS.add("ptx_emulator.driver._Launcher")
by_triton, asked = launch._Launcher._by_triton, []

def counted(self, *given):
    asked.append(self._kernel)
    return by_triton(self, *given)

launch._Launcher._by_triton = counted
from ptx_emulator import check

check.main()
assert asked
asked.clear()
check.main()
assert not asked, asked
"""


@pytest.mark.parametrize(
    "options",
    (
        pytest.param(("--op", "rms_norm", "--op", "flash_attention", "--case", "0"), id="two"),
        pytest.param((), id="all", marks=pytest.mark.machine_code),
    ),
)
def test_direct_launches_compute_the_same(options):
    """In execution every argument, tuples and descriptors included, reaches its parameter."""
    done = compiling("-c", TWICE, "--arch", "sm_90", "--dtype", "bfloat16", *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count(" 0 failed") == 2


def test_every_kernel_is_launched_so():
    """No op launches a kernel by kernel[grid](…)."""
    files = list(Path(ops.__file__).parent.rglob("*.py"))
    calls = [
        (path.name, node.lineno)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert len(files) > 15 and not calls


def test_rows_and_their_stride():
    """Contiguous rows are used in place; others are as `layout.rows` returns them."""
    x = torch.arange(48.0, dtype=torch.float32).view(2, 3, 8)
    for view, stride in (
        (x, 8),
        (x[1:, :1], 8),
        (x[..., :4], 8),
        (x.expand(2, 3, 8)[:, 0], 24),
        (x[0, 0].expand(4, 8), 0),
        (x.transpose(0, 1), 8),  # copied
        (x[..., ::2], 4),  # copied
        (x[:, :, :1], 8),
    ):
        memory, found = layout.rows_and_stride(view)
        rows = memory.as_strided((view.numel() // view.shape[-1], view.shape[-1]), (found, 1))
        assert found == stride
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))


def test_sizes_are_rounded_as_triton_rounds_them():
    for size in (*range(1, 70), 4095, 4096, 4097):
        assert layout.power_of_2(size) == triton.next_power_of_2(size)
        for block in (1, 3, 64):
            assert layout.cdiv(size, block) == triton.cdiv(size, block)
