"""What the warp-specialised kernels for Hopper share: rings of tiles, turns, descriptors.

A program consists of consumers, groups of four warps that multiply and compute, and one copy warp,
which brings their operands to shared memory by TMA. They meet at barriers only:

    ring     a tile lands in a stage (`full`); its readers have read it (`empty`)
    turns    one consumer issues its products while another computes its softmax

The operations are those of `triton.experimental.gluon`, whose names differ between versions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 renamed both; 3.9 keeps the old names as errors.
start_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
start_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

CONSUMER_ROWS = gl.constexpr(64)  # of a product of four warps


@gluon.constexpr_function
def accumulator_layout(num_columns):
    """The layout of a product of four warps with this many columns, in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, num_columns, 16])


class Ring(NamedTuple):
    """Stages of shared memory, filled by the copy warp and emptied by the consumers in one order.

    Tile n of the program, counted from its start, is in stage n % num_stages. The barriers of a
    stage change their phase with every tile, so the counts of the copy warp and of the consumers
    run on from one block of rows to the next.
    """

    stages: Any  # [num_stages, rows, features]
    full: Any  # a barrier per stage: its tile has landed
    empty: Any  # a barrier per stage: all readers have read its tile


@gluon.jit
def make_ring(
    dtype: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    NUM_ROWS: gl.constexpr,
    NUM_FEATURES: gl.constexpr,
    NUM_READERS: gl.constexpr,
):
    """Allocates a ring; before a copy or a partition uses it, `fence_async_shared` is needed."""
    stages = allocate_tiles(dtype, NUM_STAGES, NUM_ROWS, NUM_FEATURES)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=NUM_READERS)
    return Ring(stages, full, empty)


@gluon.jit
def allocate_tiles(
    dtype: gl.constexpr, COUNT: gl.constexpr, NUM_ROWS: gl.constexpr, NUM_FEATURES: gl.constexpr
):
    """Returns shared memory `[COUNT, NUM_ROWS, NUM_FEATURES]` in the layout of TMA and wgmma."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([NUM_ROWS, NUM_FEATURES], dtype)
    return gl.allocate_shared_memory(dtype, [COUNT, NUM_ROWS, NUM_FEATURES], layout)


@gluon.jit
def fill(ring, n, source, batch, row, head):
    """Copy warp: starts the copy of tile n, from a row of one head on, once its stage is empty.

    Args:
        source: a descriptor of `[batch, row, head, feature]`; what lies outside lands as zeros.
    """
    NUM_STAGES: gl.constexpr = ring.stages.shape[0]
    NUM_ROWS: gl.constexpr = ring.stages.shape[1]
    NUM_FEATURES: gl.constexpr = ring.stages.shape[2]
    stage = n % NUM_STAGES
    mbarrier.wait(ring.empty.index(stage), ((n // NUM_STAGES) & 1) ^ 1)  # the first round: at once
    mbarrier.expect(ring.full.index(stage), NUM_ROWS * NUM_FEATURES * 2)
    tile = ring.stages.index(stage).reshape([1, NUM_ROWS, 1, NUM_FEATURES])
    start_load(source, [batch, row, head, 0], ring.full.index(stage), tile)


@gluon.jit
def landed(ring, n):
    """Consumer: waits for tile n and returns it."""
    NUM_STAGES: gl.constexpr = ring.stages.shape[0]
    stage = n % NUM_STAGES
    mbarrier.wait(ring.full.index(stage), (n // NUM_STAGES) & 1)
    return ring.stages.index(stage)


@gluon.jit
def release(ring, n):
    """Consumer: gives up tile n, which none of its products may still be reading."""
    NUM_STAGES: gl.constexpr = ring.stages.shape[0]
    mbarrier.arrive(ring.empty.index(n % NUM_STAGES), count=1)


# Triton uses the named barriers 0 and 1 and one more per partition.
FIRST_TURN = gl.constexpr(8)


@gluon.jit
def await_turn(CONSUMER: gl.constexpr, TURNS: gl.constexpr):
    """Waits until the consumer before this one has issued its products."""
    if TURNS:
        BARRIER: gl.constexpr = FIRST_TURN + CONSUMER
        gl.inline_asm_elementwise(
            f"bar.sync {BARRIER}, 256; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def pass_turn(CONSUMER: gl.constexpr, NUM_CONSUMERS: gl.constexpr, TURNS: gl.constexpr):
    """Lets the consumer after this one issue its products."""
    if TURNS:
        BARRIER: gl.constexpr = FIRST_TURN + (CONSUMER + 1) % NUM_CONSUMERS
        gl.inline_asm_elementwise(
            f"bar.arrive {BARRIER}, 256; mov.u32 $0, 0;",
            "=r",
            [],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def pin(x):
    """Returns x ≥ 0. ptxas may not move the instructions that x depends on below this point: a
    branch, which is never taken, depends on x < 0."""
    return gl.inline_asm_elementwise(
        "{.reg .pred q; setp.lt.f32 q, $1, 0f00000000; @q bar.warp.sync 0xffffffff;"
        " mov.f32 $0, $1;}",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


def descriptor(x: Tensor, block_rows: int) -> TensorDescriptor:
    """Returns a descriptor of x `[batch, row, head, feature]` for tiles of rows of one head.

    Four dimensions, so that rows beyond the last are not those of the next head.
    """
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    block = [1, block_rows, 1, x.shape[-1]]
    tiles = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, tiles)
