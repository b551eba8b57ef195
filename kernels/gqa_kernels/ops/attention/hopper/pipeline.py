"""What the warp-specialised kernels for Hopper share: rings of tiles, turns, descriptors.

A program consists of consumers, groups of four warps that multiply and compute, and one copy warp,
which brings their operands to shared memory by TMA. They meet at barriers only:

    ring     a tile lands in a stage (`full`); its readers have read it (`empty`)
    turns    one consumer issues its products while another computes its softmax

The sizes of a tensor in Gluon are powers of two. Tiles of 80 or 96 features have two parts, with 64
and 16 or 32 of them; a tile is the tuple of its one or two parts.

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
start_add = getattr(tma, "async_atomic_add", None)  # since 3.8

CONSUMER_ROWS = gl.constexpr(64)  # of a product of four warps


@gluon.constexpr_function
def accumulator_layout(num_columns):
    """The layout of a product of four warps with this many columns, in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, num_columns, 16])


@gluon.constexpr_function
def first_part(num_features):
    """The number of features in the first part of a tile: the largest power of two among them."""
    return 1 << (num_features.bit_length() - 1)


@gluon.jit
def parts_of(first, rest):
    """The parts of a tensor, as descriptors; `rest` is None if there is only one."""
    if rest is None:
        return (first,)
    else:
        return (first, rest)


class Ring(NamedTuple):
    """Stages of shared memory, filled by the copy warp and emptied by the consumers in one order.

    Tile n of the program, counted from its start, is in stage n % num_stages. The barriers of a
    stage change their phase with every tile, so the counts of the copy warp and of the consumers
    run on from one block of rows to the next.
    """

    stages: Any  # (part: [num_stages, rows, features of the part], …)
    full: Any  # a barrier per stage: all parts of its tile have landed
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
        mbarrier.init(full.index(stage), count=len(stages))
        mbarrier.init(empty.index(stage), count=NUM_READERS)
    return Ring(stages, full, empty)


@gluon.jit
def allocate_tiles(
    dtype: gl.constexpr, COUNT: gl.constexpr, NUM_ROWS: gl.constexpr, NUM_FEATURES: gl.constexpr
):
    """Returns shared memory `[COUNT, NUM_ROWS, features]` for each part, as TMA and wgmma expect
    it."""
    FIRST: gl.constexpr = first_part(NUM_FEATURES)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([NUM_ROWS, FIRST], dtype)
    parts = (gl.allocate_shared_memory(dtype, [COUNT, NUM_ROWS, FIRST], layout),)
    if FIRST < NUM_FEATURES:
        parts += allocate_tiles(dtype, COUNT, NUM_ROWS, NUM_FEATURES - FIRST)
    return parts


class Rows(NamedTuple):
    """Those of a packed sequence."""

    first: Any
    length: Any


MANY = gl.constexpr(2**30)  # rows


@gluon.jit
def corner(tensor, batch, row, head, feature):
    """The coordinates of a feature of a row of a head for a descriptor.

    Args:
        batch: the batch entry or, for packed sequences, `Rows`.
    """
    if len(tensor.block_shape) == 4:
        return [batch, row, head, feature]
    else:
        return [MANY, batch.first + batch.length, MANY - batch.length + row, head, feature]


@gluon.jit
def fill(ring, n, source, batch, row, head):
    """Copy warp: starts the copy of tile n, from a row of one head on, once its stage is empty.

    Args:
        source: a descriptor for each part; what lies outside of the tensor or the sequence lands as
            zeros.
        batch: as in `corner`.
    """
    NUM_STAGES: gl.constexpr = ring.stages[0].shape[0]
    stage = n % NUM_STAGES
    mbarrier.wait(ring.empty.index(stage), ((n // NUM_STAGES) & 1) ^ 1)  # the first round: at once
    full = ring.full.index(stage)
    for part in gl.static_range(len(source)):
        stages, tensor = ring.stages[part], source[part]
        mbarrier.expect(full, stages.shape[1] * stages.shape[2] * 2)
        start = corner(tensor, batch, row, head, part * ring.stages[0].shape[2])
        start_load(tensor, start, full, stages.index(stage).reshape(tensor.block_shape))


@gluon.jit
def landed(ring, n):
    """Consumer: waits for tile n and returns its parts."""
    NUM_STAGES: gl.constexpr = ring.stages[0].shape[0]
    stage = n % NUM_STAGES
    mbarrier.wait(ring.full.index(stage), (n // NUM_STAGES) & 1)
    return parts_at(ring.stages, stage)


@gluon.jit
def parts_at(stages, stage):
    """The parts of the tile in a stage."""
    parts = (stages[0].index(stage),)
    for part in gl.static_range(1, len(stages)):
        parts += (stages[part].index(stage),)
    return parts


@gluon.jit
def release(ring, n):
    """Consumer: gives up tile n, which none of its products may still be reading."""
    NUM_STAGES: gl.constexpr = ring.stages[0].shape[0]
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


@gluon.constexpr_function
def _pin_text(count):
    outputs, inputs = ([f"${i}" for i in range(first, first + count)] for first in (0, count))
    ors = [f"or.b32 bits, bits, {x};" for x in inputs]
    moves = [f"mov.b32 {y}, {x};" for y, x in zip(outputs, inputs, strict=True)]
    branch = "setp.lt.s32 never, bits, 0; @never bar.warp.sync 0xffffffff;"
    return " ".join(
        ["{.reg .pred never; .reg .b32 bits; mov.b32 bits, 0;", *ors, branch, *moves, "}"]
    )


@gluon.constexpr_function
def _pin_operands(count):
    return ",".join(["=f"] * count + ["f"] * count)


@gluon.jit
def pin_tile(x):
    """`pin` of all numbers x ≥ 0 of a tile of four warps, with one branch."""
    COUNT: gl.constexpr = x.shape[0] * x.shape[1] // 128  # of a thread
    return gl.inline_asm_elementwise(
        _pin_text(COUNT),
        _pin_operands(COUNT),
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=COUNT,
    )


_DTYPES = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
}


def descriptor(
    x: Tensor, block_rows: int, block_features: int | None = None, *, packed: bool = False
) -> TensorDescriptor:
    """Returns a descriptor of x `[batch, row, head, feature]` for tiles of rows of one head, of all
    features unless it says how many.

    Rows are a dimension of their own, so that those beyond the last are not those of the next head.
    Of packed sequences, in batch entry 0, rows beyond the last one of a sequence are outside too:
    TMA adds up strides modulo 2⁶⁴ bytes, so a dimension of 2³⁰ rows may end at any row
    (`triton.tools.ragged_tma`).
    """
    dtype = _DTYPES[x.dtype]
    shape, strides = list(x.shape), list(x.stride())
    block = [1, block_rows, 1, block_features or x.shape[-1]]
    if packed:
        stride = strides[1]
        shape = [0x7FFF0000, 0x7FFF0000, MANY.value, *shape[2:]]
        strides = [2**34 - stride, stride, *strides[1:]]
        block = [1, *block]
    tiles = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, shape, strides, block, tiles)


def descriptors(
    x: Tensor, block_rows: int, *, packed: bool = False
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Returns a `descriptor` for each part of a tile; None if there is no second part."""
    head_dim = x.shape[-1]
    first = first_part(head_dim)
    rest = descriptor(x, block_rows, head_dim - first, packed=packed) if first < head_dim else None
    return descriptor(x, block_rows, first, packed=packed), rest
