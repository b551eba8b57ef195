"""Small Triton kernels, emulated, against torch; and small faults, which must be seen."""

import re

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.driver import emulating
from ptx_emulator.machine import EmulationError
from ptx_emulator.mutations import apply, sites
from triton.tools.tensor_descriptor import TensorDescriptor

ARCHS = ("sm_80", "sm_90")
pytestmark = pytest.mark.parametrize("arch", ARCHS)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        y = tl.load(y_ptr + at, mask=at < n, other=0.0)
        tl.store(out_ptr + at, x + y, mask=at < n)
    else:
        tl.store(out_ptr + at, tl.load(x_ptr + at) + tl.load(y_ptr + at))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("n", (1, 100, 256, 1000))
def test_add(arch, dtype, n):
    x, y = draw(n, dtype=dtype), draw(n, dtype=dtype, seed=1)
    out = torch.full_like(x, float("nan"))
    with emulating(arch):
        add_kernel[(triton.cdiv(n, 128),)](x, y, out, n, 128, True)
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)


def test_a_missing_mask_is_out_of_bounds(arch):
    x, y, out = draw(100), draw(100), torch.empty(100)
    with emulating(arch), pytest.raises(EmulationError, match="out of bounds"):
        add_kernel[(1,)](x, y, out, 100, 128, False)


@triton.jit
def integers_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, a // b)
    tl.store(out_ptr + BLOCK + at, a % b)
    tl.store(out_ptr + 2 * BLOCK + at, (a << 3) ^ (b >> 1))
    tl.store(out_ptr + 3 * BLOCK + at, tl.minimum(a, b) + tl.maximum(a, -b) * 7)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_integers(arch, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(10**6), 10**6, (128,), generator=generator).to(dtype)
    b = torch.randint(1, 999, (128,), generator=generator).to(dtype)
    b[::3] *= -1
    out = torch.empty(512, dtype=dtype)
    with emulating(arch):
        integers_kernel[(1,)](a, b, out, 128)
    quotient = torch.div(a, b, rounding_mode="trunc")
    expected = [quotient, a - quotient * b, (a << 3) ^ (b >> 1)]
    expected.append(torch.minimum(a, b) + torch.maximum(a, -b) * 7)
    torch.testing.assert_close(out, torch.cat(expected))


@triton.jit
def rows_kernel(x_ptr, out_ptr, sums_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at).to(tl.float32)
    top = tl.max(x, 1)
    e = tl.exp(x - top[:, None])
    tl.store(out_ptr + at, e / tl.sum(e, 1)[:, None])
    tl.store(sums_ptr + tl.arange(0, COLUMNS), tl.sum(x, 0))


@pytest.mark.parametrize("shape", ((4, 64), (32, 32), (1, 1024), (128, 4)))
@pytest.mark.parametrize("schedule", ("lockstep", "random"))
def test_softmax(arch, shape, schedule):
    x = draw(*shape)
    out, sums = torch.empty(shape), torch.empty(shape[1])
    with emulating(arch, schedule=schedule):
        rows_kernel[(1,)](x, out, sums, *shape)
    torch.testing.assert_close(out, x.softmax(1))
    torch.testing.assert_close(sums, x.sum(0))


@triton.jit
def floats_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.sigmoid(x))
    tl.store(out_ptr + BLOCK + at, tl.log(tl.abs(x) + 1) + tl.sqrt(tl.abs(x)))
    tl.store(out_ptr + 2 * BLOCK + at, tl.exp2(x) * tl.rsqrt(tl.abs(x) + 1))
    tl.store(
        out_ptr + 3 * BLOCK + at, x.to(tl.float16).to(tl.float32) + x.to(tl.bfloat16).to(tl.float32)
    )
    tl.store(out_ptr + 4 * BLOCK + at, tl.where(x > 0, tl.floor(x), x.to(tl.int32).to(tl.float32)))


def test_floats(arch):
    x = draw(256) * 3
    x[0], x[1] = 0.0, 65519.0
    out = torch.empty(5, 256)
    with emulating(arch):
        floats_kernel[(1,)](x, out, 256)
    y = x.abs()
    expected = [
        x.sigmoid(), (y + 1).log() + y.sqrt(), x.exp2() * (y + 1).rsqrt(),
        x.half().float() + x.bfloat16().float(), torch.where(x > 0, x.floor(), x.trunc()),
    ]  # fmt: skip
    torch.testing.assert_close(out, torch.stack(expected), rtol=2e-6, atol=1e-6)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        a = tl.load(
            a_ptr + m[:, None] * K + start + k[None, :],
            mask=(m[:, None] < M) & inside[None, :], other=0.0,
        )  # fmt: skip
        if TRANSPOSED:  # b is [N, K]
            b = tl.load(
                b_ptr + n[:, None] * K + start + k[None, :],
                mask=(n[:, None] < N) & inside[None, :], other=0.0,
            ).T  # fmt: skip
        else:
            b = tl.load(
                b_ptr + (start + k[:, None]) * N + n[None, :],
                mask=inside[:, None] & (n[None, :] < N), other=0.0,
            )  # fmt: skip
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


MATMULS = [
    (dtype, transposed, blocks, warps)
    for dtype in (torch.float16, torch.bfloat16)
    for transposed in (False, True)
    for blocks, warps in (
        ((64, 64, 64), 4),
        ((128, 64, 32), 8),
        ((128, 32, 128), 4),
        ((32, 32, 16), 2),
    )
] + [(torch.float32, False, (32, 32, 16), 4)]


def run_matmul(arch, dtype, transposed, blocks, warps, stages=3, **options):
    M, N, K = 144, 80, 208
    a = draw(M, K, dtype=dtype)
    b = draw(*((N, K) if transposed else (K, N)), dtype=dtype, seed=1)
    c = torch.full((M, N), float("nan"))
    grid = (triton.cdiv(M, blocks[0]), triton.cdiv(N, blocks[1]))
    with emulating(arch, **options) as emulator:
        matmul_kernel[grid](a, b, c, M, N, K, transposed, *blocks, stages, num_warps=warps)
    expected = a.double() @ (b.T if transposed else b).double()
    return c, expected.float(), emulator


@pytest.mark.parametrize(("dtype", "transposed", "blocks", "warps"), MATMULS)
def test_matmul(arch, dtype, transposed, blocks, warps):
    c, expected, _ = run_matmul(arch, dtype, transposed, blocks, warps)
    torch.testing.assert_close(c, expected, rtol=1e-4, atol=1e-4)


def test_matmul_with_the_warps_in_random_order(arch):
    c, expected, _ = run_matmul(
        arch, torch.float16, True, (64, 64, 64), 4, schedule="random", ctas="random"
    )
    torch.testing.assert_close(c, expected, rtol=1e-4, atol=1e-4)


def without(pattern):
    return lambda name, text: re.sub(pattern, "", text, flags=re.M)


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        (r"^\s*bar\.sync\s+0;", "without barrier"),
        (r"^\s*cp\.async\.wait_group\s+\d+;", "before its wait"),
        (r"^\s*cp\.async\.commit_group;", "before its wait"),
    ],
)
def test_faults_of_a_pipeline_are_seen(arch, pattern, seen):
    _, _, emulator = run_matmul(
        arch, torch.float16, False, (64, 64, 64), 4, strict=False, mutate=without(pattern)
    )
    assert any(seen in finding for finding in emulator.findings), emulator.findings[:3]


def test_faults_of_wgmma_are_seen(arch):
    if arch != "sm_90":
        pytest.skip("sm_90 alone has wgmma")
    c, expected, _ = run_matmul(
        arch, torch.float16, False, (64, 64, 64), 4, strict=False,
        mutate=without(r"^\s*wgmma\.wait_group\.sync\.aligned \d+;"),
    )  # fmt: skip
    assert not torch.allclose(c, expected, rtol=1e-3, atol=1e-3)
    _, _, emulator = run_matmul(
        arch, torch.float16, False, (64, 64, 64), 4, strict=False,
        mutate=without(r"^\s*fence\.proxy\.async[\w:.]*;"),
    )  # fmt: skip
    assert any("proxy fence" in finding for finding in emulator.findings)


@triton.jit
def chain_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    product = tl.dot(x, y)
    tl.store(out_ptr + at, tl.dot((product * 0.5).to(x.dtype), y, product * 2))


@pytest.mark.parametrize(
    ("dropped", "seen"),
    [(None, None), (0, "before any wgmma.fence"), (1, "write to an? .* without wgmma.fence")],
)
def test_a_missing_wgmma_fence_is_seen(arch, dropped, seen):
    if arch != "sm_90":
        pytest.skip("sm_90 alone has wgmma")

    def mutate(name, text):
        kind = "drop wgmma.fence"
        return text if dropped is None else apply(text, kind, sites(text, kind)[dropped])

    x, y = draw(64, 64, dtype=torch.float16), draw(64, 64, dtype=torch.float16, seed=1)
    out = torch.empty(64, 64)
    with emulating(arch, strict=False, mutate=mutate) as emulator:
        chain_kernel[(1,)](x, y, out, 64)
    product = x.float() @ y.float()
    torch.testing.assert_close(
        out, (product * 0.5).half().float() @ y.float() + product * 2, rtol=1e-3, atol=1e-2
    )
    if seen:
        assert any(re.search(seen, finding) for finding in emulator.findings), emulator.findings
    else:
        assert not emulator.findings, emulator.findings[:3]


@triton.jit
def descriptor_kernel(a, b, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for start in tl.range(0, K, BK, num_stages=3):
        x = a.load([0, start])
        y = b.load([0, start])
        total = tl.dot(x, y.T, total)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize("block_k", (16, 32, 64, 128))
@pytest.mark.parametrize("drop", (False, True))
def test_descriptors(arch, block_k, drop):
    M, N, K = 50, 40, 300 // 8 * 8
    a, b = draw(M, K, dtype=torch.bfloat16), draw(N, K, dtype=torch.bfloat16, seed=1)
    c = torch.full((M, N), float("nan"))
    mutate = without(r"^\s*mbarrier\.try_wait.*;\n.*bra\.uni \s*waitLoop;") if drop else None
    with emulating(arch, strict=False, mutate=mutate) as emulator:
        descriptor_kernel[(1,)](
            TensorDescriptor.from_tensor(a, [64, block_k]),
            TensorDescriptor.from_tensor(b, [64, block_k]), c, M, N, K, 64, 64, block_k,
        )  # fmt: skip
    if drop and arch == "sm_90":
        assert emulator.findings
        return
    assert not emulator.findings, emulator.findings[:3]
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-4, atol=1e-4)


@triton.jit
def last_kernel(x_ptr, partial_ptr, count_ptr, out_ptr, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Sums per program; whoever comes last adds them."""
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * BLOCK + at, tl.load(x_ptr + program * BLOCK + at) * 2)
    if ORDER:
        tl.debug_barrier()
        before = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    else:
        before = tl.atomic_add(count_ptr, 1, sem="relaxed")
    if before == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for i in range(0, tl.num_programs(0)):
            total += tl.load(partial_ptr + i * BLOCK + at)
        tl.store(out_ptr + at, total)


@pytest.mark.parametrize("ctas", ("forward", "backward", "random", "interleaved"))
def test_the_last_program(arch, ctas):
    x, partial, out = draw(5, 128), torch.empty(5, 128), torch.empty(128)
    for seed in range(3):
        count = torch.zeros(1, dtype=torch.int32)
        with emulating(arch, ctas=ctas, seed=seed):
            last_kernel[(5,)](x, partial, count, out, True, 128)
        torch.testing.assert_close(out, 2 * x.sum(0))


def test_a_relaxed_counter_is_a_race(arch):
    x, partial, out = draw(5, 128), torch.empty(5, 128), torch.empty(128)
    count = torch.zeros(1, dtype=torch.int32)
    with emulating(arch, strict=False) as emulator:
        last_kernel[(5,)](x, partial, count, out, False, 128)
    assert any("without acquire" in finding for finding in emulator.findings)


@triton.jit
def overlap_kernel(out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, at)


def test_programs_that_write_the_same_element(arch):
    out = torch.empty(192, dtype=torch.int32)
    with emulating(arch), pytest.raises(EmulationError, match="another program's"):
        overlap_kernel[(2,)](out, 128)


@triton.jit
def collision_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at // 2, tl.load(x_ptr + at))


def test_threads_that_store_different_values_to_one_address(arch):
    with emulating(arch), pytest.raises(EmulationError, match="different values"):
        collision_kernel[(1,)](draw(128), torch.empty(64), 128)
