"""What the backward kernels for Hopper share whose programs own keys: `dkdv.py` and `fused.py`.

A program owns 64 keys and values of one key/value head for each of its two consumers. Its copy warp
brings those and, of each query head of the group, the tiles of queries and dO that see one of these
keys, with their lse and delta.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    descriptor,
    fill,
    make_ring,
    start_store,
)
from gqa_kernels.ops.attention.hopper.tiles import load_statistics
from gqa_kernels.runtime import layout
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig

NUM_CONSUMERS = gl.constexpr(2)
BLOCK_N = gl.constexpr(128)  # NUM_CONSUMERS * CONSUMER_ROWS


class Shared(NamedTuple):
    """The shared memory of a program."""

    k: Any  # rings with a stage per consumer, filled once
    v: Any
    q: Any  # rings of tiles of BLOCK_M queries, and of dO
    d_out: Any
    lse: Any  # [stage, query], written before `statistics` of the stage completes a phase; free
    delta: Any  # where the stage of d_out is
    statistics: Any  # a barrier per stage


class Sizes(NamedTuple):
    """The sizes of a call."""

    seq_len_q: Any
    seq_len_kv: Any
    num_heads: Any  # of queries


class Work(NamedTuple):
    """The keys of a program, and the tiles of queries, for each head, that see them."""

    batch: Any
    kv_head: Any
    first_key: Any
    first_query: Any
    num_tiles: Any
    num_masked: Any  # of these, which come first


@gluon.jit
def make_shared(
    dtype: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, NUM_STAGES: gl.constexpr
):
    """Allocates it; before a copy or a partition uses it, `fence_async_shared` is needed."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k = make_ring(dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM, 1)
    v = make_ring(dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM, 1)
    q = make_ring(dtype, NUM_STAGES, BLOCK_M, HEAD_DIM, NUM_CONSUMERS)
    d_out = make_ring(dtype, NUM_STAGES, BLOCK_M, HEAD_DIM, NUM_CONSUMERS)
    lse = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_M], LINE)
    delta = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_M], LINE)
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=1)
    return Shared(k, v, q, d_out, lse, delta, ready)


@gluon.jit
def work_of_program(
    sizes, num_batch_heads, GROUP_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr
):
    """The work of this program. The first keys, which most queries see under a causal mask, come
    first."""
    program = gl.program_id(0)
    num_kv_heads = sizes.num_heads // GROUP_SIZE
    batch_head = program % num_batch_heads
    first_key = program // num_batch_heads * BLOCK_N
    end_tile = (sizes.seq_len_q + BLOCK_M - 1) // BLOCK_M
    first_tile = 0
    first_free = 0  # the first tile whose queries all see all of these keys, which all exist
    if CAUSAL:
        own_query = first_key + sizes.seq_len_q - sizes.seq_len_kv
        first_tile = gl.minimum(gl.maximum(own_query, 0) // BLOCK_M, end_tile)
        free_query = gl.maximum(own_query + BLOCK_N - 1, 0)
        first_free = gl.minimum((free_query + BLOCK_M - 1) // BLOCK_M, end_tile)
    elif first_key + BLOCK_N > sizes.seq_len_kv:
        first_free = end_tile
    return Work(
        batch_head // num_kv_heads,
        batch_head % num_kv_heads,
        first_key,
        first_tile * BLOCK_M,
        end_tile - first_tile,
        first_free - first_tile,
    )


@gluon.jit
def copy_operands(
    q, k, v, d_out, statistics, shared, sizes, work, exponent_scale, GROUP_SIZE: gl.constexpr
):  # fmt: skip
    """The copy warp."""
    NUM_STAGES: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_M: gl.constexpr = shared.q.stages[0].shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    for consumer in gl.static_range(NUM_CONSUMERS):
        key = work.first_key + consumer * CONSUMER_ROWS
        fill(shared.k, consumer, k, work.batch, key, work.kv_head)
        fill(shared.v, consumer, v, work.batch, key, work.kv_head)
    for i in range(GROUP_SIZE * work.num_tiles):
        head = work.kv_head * GROUP_SIZE + i // work.num_tiles
        query = work.first_query + i % work.num_tiles * BLOCK_M
        fill(shared.q, i, q, work.batch, query, head)
        fill(shared.d_out, i, d_out, work.batch, query, head)
        queries = query + gl.arange(0, BLOCK_M, layout=LINE)
        lse, delta = load_statistics(statistics, work.batch, head, queries, sizes, exponent_scale)
        shared.lse.index(i % NUM_STAGES).store(lse)
        shared.delta.index(i % NUM_STAGES).store(delta)
        mbarrier.arrive(shared.statistics.index(i % NUM_STAGES), count=1)


@gluon.jit
def store_gradients(dk_out, dv_out, k, v, dk, dv, work, first_key):
    """Consumer: stores the gradients of its keys and values, from where no product reads them any
    more."""
    v.store(dv.to(dv_out.dtype))
    k.store(dk.to(dk_out.dtype))
    fence_async_shared()
    start = [work.batch, first_key, work.kv_head, 0]
    start_store(dv_out, start, v.reshape(dv_out.block_shape))
    start_store(dk_out, start, k.reshape(dk_out.block_shape))
    tma.store_wait(0)


def launch_arguments(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    config: HopperBackwardConfig,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments of either kernel.

    Args:
        call, dout, lse, delta: as in `dq.query_gradient`.
        dk, dv: contiguous, for the results.
    """
    q, k, v, dout = map(layout.aligned, (call.q, call.k, call.v, dout))
    _, seq_len_q, num_q_heads, head_dim = q.shape
    batch, seq_len_kv, num_kv_heads, _ = k.shape
    num_batch_heads = batch * num_kv_heads
    return (layout.cdiv(seq_len_kv, BLOCK_N.value) * num_batch_heads,), {
        "q": descriptor(q, config.block),
        "k": descriptor(k, CONSUMER_ROWS.value),
        "v": descriptor(v, CONSUMER_ROWS.value),
        "d_out": descriptor(dout, config.block),
        "dk": descriptor(dk, CONSUMER_ROWS.value),
        "dv": descriptor(dv, CONSUMER_ROWS.value),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "seq_len_q": seq_len_q,
        "seq_len_kv": seq_len_kv,
        "num_heads": num_q_heads,
        "num_batch_heads": num_batch_heads,
        "softmax_scale": call.score_unit,
        "GROUP_SIZE": num_q_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block,
        "NUM_STAGES": config.num_stages,
        "CAUSAL": call.window_right is not None,
        "CONSUMER_REGISTERS": config.consumer_registers,
        "COPY_REGISTERS": config.copy_registers,
        "num_warps": 4,
    }
