"""All gradients of flash attention for Hopper in one kernel, with five products instead of seven.

Formulas in `ops/attention/backward.py`, whose delta it takes. As `dkdv.py`, but for the gradient of
queries, to which each program adds what its keys contribute:

    consumer     Sᵀ, dPᵀ and the gradients of keys and values as there; leaves dSᵀ in shared memory,
                 where it meets that of the other consumer, and multiplies both with half of the
                 features of all keys of the program
    TMA          adds this part of dQ, in float32, to what other programs have added

The order of these additions differs from run to run, and with it the last bits of dQ. Needs
Triton 3.8, which has additions by TMA.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.ops.attention.hopper.keys import (
    NUM_CONSUMERS,
    Sizes,
    copy_operands,
    launch_arguments,
    make_shared,
    store_gradients,
    work_of_program,
)
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    accumulator_layout,
    allocate_tiles,
    descriptor,
    landed,
    pin_tile,
    release,
    start_add,
)
from gqa_kernels.ops.attention.hopper.softmax import LOG2_E, as_operand
from gqa_kernels.ops.attention.hopper.tiles import Statistics, hide_keys
from gqa_kernels.runtime import launch
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig


class Exchange(NamedTuple):
    """The shared memory by which the consumers make dQ."""

    d_scores: Any  # [consumer, key, query]
    written: Any  # a barrier: both consumers have written theirs of a tile
    read: Any  # a barrier: the products of both with these have ended
    dq: Any  # [consumer, query, feature]: its half of the features, in float32


@gluon.jit
def _walk(
    k,
    v,
    shared,
    exchange,
    dq_out,
    n,
    work,
    head,
    keys,
    last_key,
    exponent_scale,
    dk,
    dv,
    CONSUMER: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Adds the tiles of a head, from tile n of the rings on, to dk and dv, and what they contribute
    to dq_out; returns dk and dv.

    Args:
        last_key: that the first query of tile n sees.
    """
    NUM_STAGES: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_M: gl.constexpr = shared.q.stages[0].shape[1]
    HEAD_DIM: gl.constexpr = shared.q.stages[0].shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_M)
    GRADIENT: gl.constexpr = accumulator_layout(HEAD_DIM)
    OF_QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    HALF: gl.constexpr = HEAD_DIM // NUM_CONSUMERS
    zero = gl.zeros([CONSUMER_ROWS, BLOCK_M], gl.float32, layout=SCORES)
    zero_dq = gl.zeros([BLOCK_M, HALF], gl.float32, layout=accumulator_layout(HALF))
    for i in range(work.num_tiles):
        stage = (n + i) % NUM_STAGES
        q = landed(shared.q, n + i)[0]
        scores_soon = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        d_out = landed(shared.d_out, n + i)[0]
        d_weights_soon = warpgroup_mma(v, d_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(shared.statistics.index(stage), ((n + i) // NUM_STAGES) & 1)
        lse = shared.lse.index(stage).load(OF_QUERIES)
        scores = warpgroup_mma_wait(1, deps=[scores_soon])
        if i < work.num_masked:
            seen = last_key
            if CAUSAL:
                seen += i * BLOCK_M
            scores = hide_keys(scores, keys, seen, SCORES, CAUSAL)
        weights = gl.exp2(scores * exponent_scale - gl.expand_dims(lse, 0))
        weights = pin_tile(weights)  # under the second product
        delta = shared.delta.index(stage).load(OF_QUERIES)
        d_weights = warpgroup_mma_wait(0, deps=[d_weights_soon])
        d_scores = (weights * (d_weights - gl.expand_dims(delta, 0))).to(q.dtype)
        mbarrier.wait(exchange.read, ((n + i) & 1) ^ 1)  # for the first tile: at once
        exchange.d_scores.index(CONSUMER).store(d_scores)
        fence_async_shared()
        mbarrier.arrive(exchange.written, count=1)
        rounded = as_operand(weights.to(q.dtype), GRADIENT)
        dv_soon = warpgroup_mma(rounded, d_out, dv, is_async=True)
        d_scores = as_operand(d_scores, GRADIENT)
        mbarrier.wait(exchange.written, (n + i) & 1)
        dq_soon = zero_dq
        for other in gl.static_range(NUM_CONSUMERS):
            dq_soon = warpgroup_mma(
                exchange.d_scores.index(other).permute((1, 0)),
                shared.k.stages[0].index(other).slice(CONSUMER * HALF, HALF, dim=1),
                dq_soon,
                use_acc=other > 0,
                is_async=True,
            )
        dk_soon = warpgroup_mma(d_scores, q, dk, is_async=True)
        dv, _ = warpgroup_mma_wait(3, deps=[dv_soon, rounded])
        release(shared.d_out, n + i)
        dq = warpgroup_mma_wait(1, deps=[dq_soon])
        mbarrier.arrive(exchange.read, count=1)
        tma.store_wait(0)  # the addition of the last tile has read it
        exchange.dq.index(CONSUMER).store(dq)
        fence_async_shared()
        start_add(
            dq_out,
            [work.batch, work.first_query + i * BLOCK_M, head, CONSUMER * HALF],
            exchange.dq.index(CONSUMER).reshape(dq_out.block_shape),
        )
        dk, _ = warpgroup_mma_wait(0, deps=[dk_soon, d_scores])
        release(shared.q, n + i)
    return dk, dv


@gluon.jit
def _consume(
    dq_out,
    dk_out,
    dv_out,
    shared,
    exchange,
    sizes,
    work,
    softmax_scale,
    exponent_scale,
    CONSUMER: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A consumer: CONSUMER_ROWS keys."""
    BLOCK_M: gl.constexpr = shared.q.stages[0].shape[1]
    HEAD_DIM: gl.constexpr = shared.q.stages[0].shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_M)
    GRADIENT: gl.constexpr = accumulator_layout(HEAD_DIM)
    first_key = work.first_key + CONSUMER * CONSUMER_ROWS
    keys = first_key + gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, SCORES))
    last_key = sizes.seq_len_kv - 1
    if CAUSAL:
        last_key = work.first_query + sizes.seq_len_kv - sizes.seq_len_q
    dk = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=GRADIENT)
    dv = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=GRADIENT)
    landed(shared.k, 1 - CONSUMER)
    k = landed(shared.k, CONSUMER)[0]
    v = landed(shared.v, CONSUMER)[0]
    for i in range(GROUP_SIZE):
        dk, dv = _walk(
            k, v, shared, exchange, dq_out, i * work.num_tiles, work, work.kv_head * GROUP_SIZE + i,
            keys, last_key, exponent_scale, dk, dv, CONSUMER, CAUSAL,
        )  # fmt: skip
    # The other consumer's products read these keys, too.
    mbarrier.wait(exchange.read, ((GROUP_SIZE * work.num_tiles) & 1) ^ 1)
    store_gradients(dk_out, dv_out, k, v, dk * softmax_scale, dv, work, first_key)


@gluon.jit(do_not_specialize=["seq_len_q", "seq_len_kv", "num_heads", "num_batch_heads"])
def _fused_kernel(
    q,
    k,
    v,
    d_out,
    dq,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    seq_len_q,
    seq_len_kv,
    num_heads,
    num_batch_heads,
    softmax_scale,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """A program sums the gradients of BLOCK_N keys and values over all heads of a group, and adds
    what these contribute to the gradients of queries."""
    shared = make_shared(q.dtype, HEAD_DIM, BLOCK_M, NUM_STAGES)
    exchange = Exchange(
        allocate_tiles(q.dtype, NUM_CONSUMERS, CONSUMER_ROWS, BLOCK_M)[0],
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0),
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0),
        allocate_tiles(gl.float32, NUM_CONSUMERS, BLOCK_M, HEAD_DIM // NUM_CONSUMERS)[0],
    )
    mbarrier.init(exchange.written, count=NUM_CONSUMERS)
    mbarrier.init(exchange.read, count=NUM_CONSUMERS)
    fence_async_shared()
    sizes = Sizes(seq_len_q, seq_len_kv, num_heads)
    statistics = Statistics(lse_ptr, delta_ptr)
    work = work_of_program(sizes, num_batch_heads, GROUP_SIZE, BLOCK_M, CAUSAL)
    exponent_scale = softmax_scale * LOG2_E
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    dq, dk, dv, shared, exchange, sizes, work, softmax_scale, exponent_scale,
                    0, GROUP_SIZE, CAUSAL,
                ),
            ),
            (
                _consume,
                (
                    dq, dk, dv, shared, exchange, sizes, work, softmax_scale, exponent_scale,
                    1, GROUP_SIZE, CAUSAL,
                ),
            ),
            (
                copy_operands,
                (
                    (q,), (k,), (v,), (d_out,), statistics, shared, sizes, work, exponent_scale,
                    GROUP_SIZE,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


_launch = launch.launcher(_fused_kernel)


def gradients(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, config: HopperBackwardConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a prepared, non-empty call without options.

    Args:
        call, dout, lse, delta: as in `dq.query_gradient`.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in call[:3])
    total = torch.zeros_like(dq, dtype=torch.float32)
    grid, arguments = launch_arguments(call, dout, lse, delta, dk, dv, config)
    half = call.q.shape[-1] // NUM_CONSUMERS.value
    _launch(grid, dq=descriptor(total, config.block, half), **arguments)
    return torch.mul(total, call.score_unit, out=dq), dk, dv
