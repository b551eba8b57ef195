"""A warp-specialised Gluon kernel, and the faults in it that must be seen."""

import re

import pytest
import torch
from ptx_emulator.driver import emulating
from ptx_emulator.machine import EmulationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def turn(sync: gl.constexpr):
    if sync:
        gl.inline_asm_elementwise(
            "bar.sync 8, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        gl.inline_asm_elementwise(
            "bar.arrive 8, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def multiply(a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    line: gl.constexpr = gl.SliceLayout(0, layout)
    turn(True)
    added = note_s.load(line)  # what the other partition left before its turn
    for i in range(tiles):
        s = i % 2
        mbarrier.wait(full.index(s), (i // 2) & 1)
        zero = gl.zeros([64, 64], gl.float32, layout=layout)
        token = warpgroup_mma(
            a_s.index(s), b_s.index(s).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        product = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(s), count=1)
        tma.store_wait(0)
        c_s.store((product + gl.expand_dims(added, 0)).to(c_s.dtype))
        fence_async_shared()
        _store(c, [i * 64, 0], c_s)
    tma.store_wait(0)


@gluon.jit
def leave_note(a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 64, layout=layout)
    note_s.store(gl.load(note + at))
    turn(False)


@gluon.jit
def bring(a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles):
    for i in range(tiles):
        s = i % 2
        mbarrier.wait(empty.index(s), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(s), 2 * 64 * 64 * 2)
        _load(a, [i * 64, 0], full.index(s), a_s.index(s))
        _load(b, [0, 0], full.index(s), b_s.index(s))


@gluon.jit
def specialised_kernel(a, b, c, note, tiles, extra, LAYOUT: gl.constexpr):
    a_s = gl.allocate_shared_memory(a.dtype, [2, 64, 64], LAYOUT)
    b_s = gl.allocate_shared_memory(a.dtype, [2, 64, 64], LAYOUT)
    c_s = gl.allocate_shared_memory(a.dtype, [64, 64], LAYOUT)
    note_s = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (multiply, (a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles)),
        (leave_note, (a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles)),
        (bring, (a, b, c, note, a_s, b_s, c_s, note_s, full, empty, tiles + extra)),
    ], [4, 1], [232, 40])  # fmt: skip


def run(mutate=None, rows=300, extra=0, **options):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).half() for n in (rows, 64))
    note, c = (
        torch.randn(64, generator=generator),
        torch.full((rows, 64), float("nan"), dtype=torch.half),
    )
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    with emulating("sm_90", mutate=mutate, mbarrier_fence=True, **options) as emulator:
        a_d, b_d, c_d = (
            TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 64], layout)
            for x in (a, b, c)
        )
        specialised_kernel[(1,)](
            a_d, b_d, c_d, note, -(-rows // 64), extra, LAYOUT=layout, num_warps=4
        )
    return c, (a.double() @ b.double().T + note), emulator


@pytest.mark.parametrize("seed", range(6))
def test_schedules(seed):
    c, expected, _ = run(schedule="random" if seed else "lockstep", seed=seed)
    torch.testing.assert_close(c.double(), expected, rtol=2e-3, atol=2e-3)


def without(pattern):
    return lambda name, text: re.sub(pattern, "", text, flags=re.M)


WAIT = r"^\s*mbarrier\.try_wait.*;\n.*bra\.uni \s*waitLoop;"


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        (WAIT, "asynchronous copy"),
        (r"^\s*fence\.proxy\.async[\w:.]*;", "proxy fence|not fenced"),
        (r"bar\.(sync|arrive) 8, 256;", "read after write without barrier"),
        (r"^\s*bar\.sync\s+0, 128;", "without barrier"),
        (r"^\s*cp\.async\.bulk\.wait_group.*;", "bulk store"),
        (r"^\s*cp\.async\.bulk\.commit_group;", "bulk store"),
        (r"^\s*wgmma\.wait_group.*;", "wgmma"),
    ],
)
def test_faults_are_seen(pattern, seen):
    _, _, emulator = run(without(pattern), strict=False)
    assert any(re.search(seen, finding) for finding in emulator.findings), emulator.findings[:3]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"bar\.arrive 8, 256;", "warps 0-3 at barrier 8"),
        (r"@%p\d+ mbarrier\.arrive\.shared.*;", "deadlock.*at the mbarrier"),
        (r"^\s*barrier\.sync\s+1;(?=\n\s*setmaxnreg)", "deadlock"),
    ],
)
def test_deadlocks_are_seen(pattern, says):
    with pytest.raises(EmulationError, match=says):
        run(without(pattern), strict=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_register_may_hold_the_number_of_a_barrier(seed):
    """As Triton 3.8 writes it."""
    changed = []

    def in_register(name, text):
        found = r"^(\s*)bar\.sync\s+(\d+), 128;"
        new = r"\1.reg .b32 %n\2_; mov.b32 %n\2_, \2; bar.sync %n\2_, 128;"
        text, count = re.subn(found, new, text, flags=re.M)
        changed.append(count)
        return text

    c, expected, _ = run(in_register, schedule="random" if seed else "lockstep", seed=seed)
    torch.testing.assert_close(c.double(), expected, rtol=2e-3, atol=2e-3)
    assert changed[0] > 0
    with pytest.raises(EmulationError, match="deadlock"):  # all wait at one barrier
        run(lambda name, text: in_register(name, text).replace(", 128;", ", 256;"), strict=False)


def test_a_copy_that_nobody_takes_is_seen():
    _, _, emulator = run(strict=False, extra=1)
    assert any("nobody waited for" in finding for finding in emulator.findings), emulator.findings[
        :3
    ]
