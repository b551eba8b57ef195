"""The error budget itself: the order of sums, the draws, and what a comparison says."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_kernels import accuracy, reference
from gqa_kernels.accuracy import compare, draw, measure_call, widen
from gqa_kernels.spec import OPS
from gqa_kernels.summation import tile_by_tile

LOW_PRECISION = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str
)


def one_after_another(terms: list[float]) -> float:
    total = torch.zeros(())
    for tile in torch.tensor(terms).split(128):
        part = torch.zeros(())
        for term in tile:
            part = part + term
        total = total + part
    return total.item()


@pytest.mark.parametrize("length", (0, 1, 7, 128, 129, 300))
def test_the_order_of_a_sum(length, draw):
    x = draw(length).cpu()
    expected = one_after_another(x.tolist())
    with tile_by_tile():
        assert x.sum().item() == x[:, None].sum(0).item() == expected
        assert (x @ torch.ones(length)).item() == expected
        assert (x[None, None] @ torch.ones(1, length, 1)).item() == expected
        assert x.norm().item() == x.square().sum().sqrt().item()


SUMS = {
    "mm": lambda x: x @ x.mT,
    "bmm": lambda x: x.expand(3, -1, -1) @ x.mT.expand(3, -1, -1),
    "addmm": lambda x: torch.addmm(x[:, :1], x, x.mT, beta=0.5, alpha=2.0),
    "baddbmm": lambda x: torch.baddbmm(x[None, :, :1], x[None], x.mT[None]),
    "linear": lambda x: torch.nn.functional.linear(x, x, x[:, 0]),
    "mv": lambda x: x @ x[0],
    "dot": lambda x: x[0] @ x[1],
    "sum": lambda x: x.sum(),
    "sum of columns": lambda x: x.sum(0, keepdim=True),
    "sum of two dimensions": lambda x: x.expand(2, -1, -1).sum((0, 2)),
    "mean": lambda x: x.mean(),
    "mean of rows": lambda x: x.mean(-1),
    "norm": lambda x: x.norm(dim=1),
    "largest norm": lambda x: torch.linalg.vector_norm(x, math.inf),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "cross entropy": lambda x: torch.nn.functional.cross_entropy(x, torch.arange(len(x))),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x[None], x[None], x[None], x[:, :9] > 0.0
    ),
}


@LOW_PRECISION
@pytest.mark.parametrize("name", SUMS)
def test_it_is_the_same_maths(name, dtype, generator):
    """Forward and backward, within the bound of any order of a sum: n roundings of the terms."""
    x = torch.randn(9, 40, generator=generator).to(dtype)

    def results(x):
        x = x.detach().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = SUMS[name](x)
            return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    with tile_by_tile(), torch.inference_mode(False):
        found = results(x)
    expected = results(x.double())
    for one, truth in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == truth.shape
        bound = 8 * torch.finfo(dtype).eps * truth.abs().max() + 400 * 2**-24 * truth.abs().max()
        assert (one.double() - truth).abs().max() <= bound


class _Seen(TorchDispatchMode):
    """The operations that reach the library."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sums = torch.Tag.reduction in func.tags or "mm" in func.__name__
        # On meta only shapes are asked for; what is counted is exact.
        if sums and args[0].device.type != "meta" and args[0].dtype != torch.bool:
            self.names.add(func.__name__.partition(".")[0])
        return func(*args, **kwargs or {})


@pytest.mark.skipif(not hasattr(torch.Tag, "reduction"), reason="this PyTorch has no such tag")
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_no_sum_of_a_reference_is_left_to_the_library(spec, device, generator):
    for case in spec.test_cases():
        inputs = spec.make_inputs(case, torch.bfloat16, device, generator)
        with _Seen() as seen, tile_by_tile():
            accuracy.run(spec.reference, inputs, spec.wrt)
        assert seen.names <= {"amax", "any", "all", "argmax"}


def test_the_same_bits_under_other_instructions():
    code = (
        "import hashlib, numpy, torch\n"
        "from gqa_kernels import interpreter; interpreter.enable()\n"
        "from gqa_kernels.summation import tile_by_tile\n"
        "x = torch.from_numpy(numpy.random.default_rng(0).random((70, 300), dtype='float32'))\n"
        "with tile_by_tile():\n"
        "    parts = x @ x.mT, x.sum(0), x.mean(), x.bfloat16() @ x.mT.bfloat16()\n"
        "print(hashlib.sha256(b''.join(p.float().numpy().tobytes() for p in parts)).hexdigest())\n"
    )
    found = set()
    for capability, num_threads in (("default", "1"), ("avx2", "2")):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        environment |= {"OMP_NUM_THREADS": num_threads}
        command = [sys.executable, "-c", code]
        found.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 1 and len(found.pop()) > 60


def test_another_order_is_another_draw(draw):
    x = draw(1000).cpu()
    sums = set()
    for seed in range(20):
        with tile_by_tile(torch.Generator().manual_seed(seed)):
            sums.add(x.sum().item())
    assert len(sums) > 3
    assert all(abs(total - x.double().sum()) < 1000 * 2**-24 * x.abs().sum() for total in sums)


@LOW_PRECISION
def test_draws_are_of_inputs_nearby(dtype, generator):
    x = torch.randn(40, generator=generator).to(dtype)
    x[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max])
    given = {"x": x, "nested": [(x.clone(), torch.arange(3))], "eps": 1e-5}
    seen = []
    draws = draw(lambda inputs: seen.append(inputs) or {"y": inputs["x"][6:] * 1.0}, given)
    assert len(draws) == 4  # of 34 values, for 128 of them
    assert seen[0] is given
    assert torch.equal(seen[1]["x"], x.double()) or seen[1]["x"].isnan().any()
    for near in seen[2::2]:
        near, other = near["x"], near["nested"][0]
        assert torch.equal(near[:4], x[:4]) and near[4].isnan()
        assert torch.equal(other[1], torch.arange(3)) and near.dtype == dtype
        assert not torch.equal(near[5:], x[5:]) and not torch.equal(near[5:], other[0][5:])
        ratio = near[5:].double() / x[5:].double()
        assert (ratio <= 1.0).all() and (ratio >= 1.0 - 1 / 64 - torch.finfo(dtype).eps).all()


@pytest.mark.parametrize(("size", "count"), ((1, 32), (8, 16), (16, 8), (128, 2), (4096, 2)))
def test_few_values_have_more_draws(size, count):
    assert len(draw(lambda x: {"y": x, "nothing": x[:0]}, torch.ones(size))) == count


@pytest.mark.parametrize(("times", "count"), ((1, 2), (2, 6), (7, 19), (48, 32)))
def test_repeated_tokens_have_more_draws(times, count, generator):
    """What is rounded alike counts once, and stays alike in every draw."""
    x = torch.randn(-(-48 // times), 80, generator=generator).repeat(times, 1)
    draws = draw(lambda inputs: {"y": inputs["x"] * 1.0}, {"x": x, "weight": torch.ones(80)})
    assert len(draws) == count
    assert all(torch.equal(y["y"], y["y"][: len(x) // times].repeat(times, 1)) for y, _ in draws)


def test_eager_that_happens_to_be_exact_has_a_budget(device):
    """The gradient of a row of one element is what cancellation leaves: chance decides."""
    inputs = {"x": torch.tensor([[3.0]], device=device), "weight": torch.ones(1, device=device)}
    for m in measure_call(reference.rms_norm, reference.rms_norm, inputs, ("x", "weight")):
        assert m.budget > 0.0 and m.ok


def test_comparisons():
    oracle = torch.tensor([1.0, 2.0, torch.nan, -torch.inf, 4.0], dtype=torch.float64)
    exact = oracle.bfloat16()
    assert compare("x", exact, exact, oracle).share == 0.0
    off = exact.clone()
    off[4] += 4.0 * 2**-7  # the largest error: two roundings of the largest value
    assert compare("x", off, exact, oracle).share == pytest.approx(2.0)
    assert compare("x", off, off, oracle).share == pytest.approx(2 / 5)  # of 2 · eager + 1
    # The largest of all draws counts.
    assert compare("x", off, exact, oracle, (off, oracle)).ok
    # In float32 the largest error may be twice as much again.
    m = compare("x", off.float(), off.float(), oracle)
    assert m.dtype == torch.float32 and m.share == pytest.approx(0.5, rel=1e-4)
    # Errors that are small but everywhere are seen by their root mean square.
    truth = torch.ones(1000, dtype=torch.float64)
    eager = truth.bfloat16()
    eager[0] += 3 * 2**-7
    assert not compare("x", (truth + 2**-7).bfloat16(), eager, truth).ok


@pytest.mark.parametrize(
    "actual", ([1.0, torch.inf], [1.0, 2.0], [torch.nan, torch.nan], [1.0, -torch.inf])
)
def test_special_values_are_the_same_or_the_error_is_infinite(actual):
    oracle = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    measured = compare("x", torch.tensor(actual), oracle.float(), oracle)
    assert measured.share == math.inf and not measured.ok


def test_eager_that_overflows_allows_nothing():
    oracle = torch.tensor([1.0, 60000.0], dtype=torch.float64)
    eager = torch.tensor([1.0, torch.inf], dtype=torch.float16)
    assert not compare("x", torch.tensor([1.0, 30000.0]).half(), eager, oracle).ok
    assert compare("x", oracle.half(), eager, oracle).ok


def test_what_cannot_be_compared_is_refused():
    oracle = torch.ones(3).double()
    with pytest.raises(ValueError, match=r"^x: expected shape \[3\]; got \[1\] and \[3\]"):
        compare("x", torch.ones(1), torch.ones(3), oracle)
    with pytest.raises(
        TypeError, match=r"^x: expected eager's .* torch\.float32; got torch\.float16"
    ):
        compare("x", torch.ones(3).half(), torch.ones(3), oracle)
    with pytest.raises(TypeError, match=r"^x: expected a float64 oracle; got torch\.float32"):
        compare("x", torch.ones(3), torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"^actual: expected \['output 0', 'output 1'\]; got"):
        measure_call(lambda x: x, lambda x: (x, x), {"x": torch.ones(3)})


def test_the_oracle_has_the_cotangents_that_were_rounded():
    inputs = {"x": torch.randn(50, 30).bfloat16()}
    for measured in measure_call(lambda x: x * 1, lambda x: x * 1, inputs, ("x",)):
        assert measured.error == 0.0
    other = accuracy.run(lambda x: x * 1, inputs, ("x",), 1)["d x"]
    assert not torch.equal(other, accuracy.run(lambda x: x * 1, inputs, ("x",), 0)["d x"])


@pytest.mark.parametrize("default", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_foreign_defaults_change_no_budget(default, draw, device):
    x = draw(30, 40)

    def budgets():
        inputs = {"x": x, "weight": x[0]}
        measured = measure_call(reference.rms_norm, reference.rms_norm, inputs, ("x", "weight"))
        return [m.budget for m in measured]

    expected = budgets()
    torch.set_default_dtype(default)
    try:
        assert budgets() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_refuses_what_the_library_refuses():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with tile_by_tile():
        for wrong in (
            lambda: a @ b.half(),
            lambda: torch.mm(a[None], b[None]),
            lambda: torch.ones(5).sum(1),
            lambda: torch.ones(5).mean(-2),
            lambda: a @ a,
        ):
            with pytest.raises((RuntimeError, IndexError)):
                wrong()


def test_what_is_special_is_as_in_the_library():
    a, b, c = torch.ones(3, 4), torch.ones(4, 5), torch.full((3, 5), torch.nan)
    rows = torch.tensor([[torch.inf, 1.0, 2.0], [-torch.inf] * 3, [torch.nan, 1.0, 2.0]])
    calls = (
        lambda: torch.addmm(c, a, b, beta=0),
        lambda: torch.baddbmm(c[None], a[None], b[None], beta=0),
        lambda: torch.addmm(c.zero_(), a * torch.nan, b, alpha=0),
        lambda: torch.addmm(torch.ones(5, 3).T, a, b),
        lambda: torch.ones(3, 0).softmax(-1),
        lambda: torch.ones(0, 4).log_softmax(0),
        lambda: torch.ones(2, 3, 4).transpose(0, 1).softmax(0),
        lambda: torch.ones(3, 4).sum(dtype=torch.float64),
        lambda: torch.arange(4).sum(),
        lambda: rows.softmax(-1),
        lambda: rows.log_softmax(-1),
        lambda: rows.logsumexp(-1),
    )
    for call in calls:
        expected = call()
        with tile_by_tile():
            found = call()
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.stride() == expected.stride()


def test_log_softmax_is_as_exact_far_from_zero(draw):
    x = draw(64, 100).cpu()
    for offset in (0.0, 1000.0):
        with tile_by_tile():
            found = (x.double() + offset).float().log_softmax(1)
        truth = (x.double() + offset).float().double().log_softmax(1)
        assert (found - truth).abs().max() < 2e-6


def test_a_nan_uses_more_than_the_budget():
    assert accuracy.Measured("x", math.nan, 1.0).share == math.inf
    assert widen([torch.ones(1), torch.arange(2), 3.0])[0].dtype == torch.float64
