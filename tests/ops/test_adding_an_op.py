"""An op that is added by the steps of CONTRIBUTING.md gets the table's tests, its compile check and
its rows in the benchmarks, without a word about it elsewhere.

The op, y = max(x, 0)², is added to a copy of the package, in which the tests of this folder and the
benchmarks then run, in processes of their own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gqa_kernels

ROOT = Path(__file__).parents[2]
PYTEST = (str(Path(sys.executable).with_name("pytest")), "-q", "-p", "no:cacheprovider")
REFERENCE = '''

def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², in float32, rounded once."""
    return wide(x).clamp(min=0).square().to(x.dtype)
'''
KERNEL = '''
"""Squared ReLU: y = max(x, 0)². One program owns a row. Saved for backward: x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.runtime import checks, launch, layout, library, target


@triton.jit
def _kernel(x_ptr, dy_ptr, out_ptr, x_stride, dy_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes one row of y or, given dy, of dx = 2 · max(x, 0) · dy."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    positive = tl.where(x <= 0.0, 0.0, x)
    out = positive * positive
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        out = 2.0 * positive * dy
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


_launch_kernel = launch.launcher(_kernel)


def _launch(x: Tensor) -> Tensor:
    return _backward(None, x)


def _backward(dy: Tensor | None, x: Tensor) -> Tensor:
    width = x.shape[-1]
    x_rows, x_stride = layout.rows_and_stride(x)
    dy_rows, dy_stride = (None, 0) if dy is None else layout.rows_and_stride(dy)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with target.device_of(x):
        _launch_kernel(
            (x.numel() // width,),
            x_ptr=x_rows,
            dy_ptr=dy_rows,
            out_ptr=out,
            x_stride=x_stride,
            dy_stride=dy_stride,
            WIDTH=width,
            BLOCK=layout.power_of_2(width),
            num_warps=4,
        )
    return out


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_BACKWARD = library.Op("relu_squared_backward", _backward, lambda dy, x: x.new_empty(x.shape))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _BACKWARD(dy, *ctx.saved_tensors)


_OP = library.Op(
    "relu_squared",
    _launch,
    _fake,
    check=lambda x: checks.tensor("x", x),
    setup_context=_setup_context,
    backward=lambda ctx, dy: (_differentiate(ctx, dy),),
)


def relu_squared(x: Tensor) -> Tensor:
    return _OP(x)
'''
ROW = """
def _relu_cost(case, dtype):
    elements = case.sizes["num_tokens"] * case.sizes["width"]
    return Cost(elements * dtype.itemsize, elements * dtype.itemsize, 2 * elements)


def _relu_backward_cost(case, dtype):
    elements = case.sizes["num_tokens"] * case.sizes["width"]
    return Cost(2 * elements * dtype.itemsize, elements * dtype.itemsize, 3 * elements)


OPS += (
    OpSpec(
        "relu_squared",
        reference.relu_squared,
        fused.relu_squared,
        (
            Case({"num_tokens": 3, "width": 33}, "odd width", test=True),
            Case({"num_tokens": 128, "width": 4096}, "nanochat"),
        ),
        lambda case, *context: {"x": Draw(case, *context)(*case.sizes.values())},
        _relu_cost,
        {"num_tokens": 3, "width": 8},
        ("x",),
        _relu_backward_cost,
    ),
)
"""
# What the benchmarks know of the op: its workloads, and who takes part in its backward pass.
BENCH = """
import sys
sys.path.insert(0, "bench")
import peers, grid
for work in (*grid.GRID, *grid.TINY):
    if work.op == "relu_squared":
        having = [name for name, x in peers.BY_NAME.items() if not x.lacks(work.op, work.pass_)]
        print(work.group, work.cost.flops, *having, sep=", ")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """In which the package is a copy with the op."""
    folder = tmp_path_factory.mktemp("added")
    package = folder / "gqa_kernels"
    shutil.copytree(Path(gqa_kernels.__file__).parent, package)

    def edit(file, change):
        path = package / file
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    (package / "ops" / "relu_squared.py").write_text(KERNEL.lstrip(), encoding="utf-8")
    edit("reference/rows.py", lambda text: text + REFERENCE)
    edit(
        "reference/__init__.py",
        lambda text: text.replace("rms_norm, swiglu\n", "relu_squared, rms_norm, swiglu\n").replace(
            '    "swiglu",\n', '    "relu_squared",\n    "swiglu",\n'
        ),
    )
    edit(
        "fused.py",
        lambda text: text.replace(
            '    "swiglu",\n', '    "relu_squared",\n    "swiglu",\n'
        ).replace(
            "from gqa_kernels.ops.rope",
            "from gqa_kernels.ops.relu_squared import relu_squared\nfrom gqa_kernels.ops.rope",
        ),
    )
    edit(
        "__init__.py",
        lambda text: text.replace('    "swiglu",\n', '    "swiglu",\n    "relu_squared",\n'),
    )
    edit("spec/rows.py", lambda text: text + ROW)
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def output_of(command, environment):
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_tables_tests_take_it_up(environment):
    files = [f"tests/ops/test_{name}.py" for name in ("ops", "autograd", "library")]
    out = output_of((*PYTEST, *files, "-k", "relu_squared or signatures"), environment)
    passed = int(re.search(r"(\d+) passed", out)[1])
    assert passed >= 30, out


def test_it_is_compiled_and_timed(environment):
    environment = {k: v for k, v in environment.items() if k != "TRITON_INTERPRET"}
    out = output_of(("bench/compiled.py", "--op", "relu_squared", "--arch", "sm_90"), environment)
    assert len(re.findall(r"^\| relu_squared", out, re.MULTILINE)) >= 2, out  # forward, backward
    options = ("--count", "--op", "relu_squared", "--arch", "sm_90")
    counted = json.loads(output_of(("bench/compiled.py", *options), environment))["sm_90"]
    assert counted and all(of_one == of_all for of_one, of_all in counted.values()), counted
    lines = output_of(("-c", BENCH), environment).splitlines()
    ours = "triton, eager, compile"
    flops = 128 * 4096
    assert lines == [
        f"relu_squared|fwd|nanochat: num_tokens=128-width=4096, {2 * flops}, {ours}",
        f"relu_squared|bwd|nanochat: num_tokens=128-width=4096, {3 * flops}, {ours}",
        f"relu_squared|fwd|tiny, {2 * 24}, {ours}",
        f"relu_squared|bwd|tiny, {3 * 24}, {ours}",
    ]
