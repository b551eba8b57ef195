"""The interpreter's narrow floats have the bits of PyTorch's, and integers do not overflow unseen.

A GPU has nothing to test here.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl

from gqa_kernels import interpreter

pytestmark = pytest.mark.skipif(
    not interpreter.is_enabled(), reason="the kernels run on a GPU, not in the interpreter"
)


@triton.jit
def _cast(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(y_ptr + i, a * b + a)
    tl.store(y_ptr + SIZE + i, tl.maximum(a, b) - tl.where(a < b, a, -b))


@triton.jit
def _dot(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    offsets = i * SIZE + j
    y = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets).T)
    tl.store(y_ptr + offsets, y)


@triton.jit
def _dot_onto(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    offsets = i * SIZE + j
    a, b, y = (tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), tl.load(y_ptr + offsets))
    tl.store(y_ptr + offsets, tl.dot(a, b, y, input_precision="ieee"))


@triton.jit
def _index(x_ptr, y_ptr, stride):
    tl.store(y_ptr, tl.load(x_ptr) * stride)


def test_casts_round_to_nearest_even(generator):
    x = torch.randn(4096, generator=generator)
    x[:8] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-40, 3.3895e38, -0.0, 0.0, 3.4e38])
    narrow = torch.empty(4096, dtype=torch.bfloat16)
    _cast[(1,)](x, narrow, SIZE=4096)
    wanted = x.bfloat16()
    assert narrow[2].isnan()
    rest = torch.arange(4096) != 2
    assert torch.equal(narrow[rest].view(torch.int16), wanted[rest].view(torch.int16))
    back = torch.empty(4096)
    _cast[(1,)](narrow, back, SIZE=4096)
    assert torch.equal(back[rest], wanted.float()[rest])


def test_integers_and_halves_cast_too(generator):
    integers = torch.randint(-1000, 1000, (64,), generator=generator, dtype=torch.int32)
    halves = torch.randn(64, generator=generator).half()
    for x in (integers, halves):
        y = torch.empty(64, dtype=torch.bfloat16)
        _cast[(1,)](x, y, SIZE=64)
        assert torch.equal(y, x.to(torch.float32).bfloat16())


def test_arithmetic_rounds_after_each_operation(generator):
    a, b = (torch.randn(1024, generator=generator).bfloat16() for _ in range(2))
    y = torch.empty(2, 1024, dtype=torch.bfloat16)
    _arithmetic[(1,)](a, b, y, SIZE=1024)
    assert torch.equal(y[0], a * b + a)
    assert torch.equal(y[1], torch.maximum(a, b) - torch.where(a < b, a, -b))


def test_dot_accumulates_in_float32(generator):
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    y = torch.empty(32, 32)
    _dot[(1,)](a, b, y, SIZE=32)
    a, b = a.double(), b.double()
    bound = 32 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs().T)  # of any order of the sum
    assert ((y - a @ b.T).abs() <= bound).all()


def test_a_float32_dot_rounds_every_sum_from_the_accumulator_on(generator):
    """As hardware does, so that what is lost beside a large accumulator is lost here too."""
    a, b = (torch.randn(16, 16, generator=generator) for _ in range(2))
    y = torch.full((16, 16), 1000.0)
    wanted = y.double()
    for k in range(16):
        wanted = (wanted + a[:, k, None].double() * b[k].double()).float().double()
    _dot_onto[(1,)](a, b, y, SIZE=16)
    assert torch.equal(y, wanted.float())
    once = (1000.0 + a.double() @ b.double()).float()
    assert (y != once).any()


@pytest.mark.parametrize("sign", (1, -1))
def test_int32_overflow_is_an_error(sign):
    x, y = torch.tensor([sign * 2**30], dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        _index[(1,)](x, y, 3)
    _index[(1,)](x.long(), y, 3)
    assert y.item() == sign * 3 * 2**30
    _index[(1,)](x, y, 1)
    assert y.item() == sign * 2**30


@triton.jit
def _with_helpers(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + i)) + tl.max(tl.load(x_ptr + i)))


def test_launches_in_threads_and_in_hooks():
    def launch(number):
        x, y = torch.full((8,), float(number)), torch.empty(1)
        _with_helpers[(1,)](x, y, SIZE=8)
        return y.item() == 9 * number

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(launch, range(40)))
    _index.add_pre_run_hook(lambda *_, **__: launch(1))
    try:
        x, y = torch.tensor([5], dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        _index[(1,)](x, y, 2)
        assert y.item() == 10
    finally:
        _index.pre_run_hooks.clear()


def test_enabling_too_late_is_an_error(tmp_path):
    code = "import triton\nfrom gqa_kernels import interpreter\ninterpreter.enable()"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode != 0
    assert "before the first import of triton" in result.stderr


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_every_float8_is_read_as_what_it_is(dtype):
    """Subnormals, both zeros and both NaN too."""
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    y = torch.empty(256, dtype=dtype)
    _cast[(1,)](x, y, SIZE=256)
    wanted = x.to(dtype)
    assert wanted.isnan().sum() == 2
    assert torch.equal(y.isnan(), wanted.isnan())
    exact = ~wanted.isnan()
    assert torch.equal(y[exact].float().signbit(), wanted[exact].float().signbit())
    assert torch.equal(y[exact], wanted[exact])
