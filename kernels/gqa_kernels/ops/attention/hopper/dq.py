"""The gradient of queries of flash attention for Hopper, warp-specialised.

Formulas in `ops/attention/backward.py`, whose delta it takes. A program owns 64 queries of one head
for each of its two consumers:

    copy warp    queries, dO and, downwards from the last tile that they see, tiles of keys, values
    consumer     S = Q Kᵀ and dP = dO Vᵀ of a tile, dS from both, which stays in registers and
                 multiplies the keys

The tiles that need a mask come first. The products of one consumer run while the other one computes
dS; nothing but the ring binds them to an order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    accumulator_layout,
    descriptor,
    fill,
    landed,
    make_ring,
    pin_tile,
    release,
    start_store,
)
from gqa_kernels.ops.attention.hopper.softmax import LOG2_E, as_operand
from gqa_kernels.ops.attention.hopper.tiles import (
    Sizes,
    Statistics,
    block_of_step,
    hide,
    key_tiles,
    load_statistics,
)
from gqa_kernels.ops.attention.sequences import query_heads_in_cache
from gqa_kernels.runtime import launch, layout
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig

NUM_CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # NUM_CONSUMERS * CONSUMER_ROWS


class Shared(NamedTuple):
    """The shared memory of a program."""

    q: Any  # rings with a stage per consumer, filled once
    d_out: Any
    k: Any  # rings of tiles of BLOCK_N keys or values
    v: Any


class Rows(NamedTuple):
    """What a consumer knows of its queries."""

    q: Any
    d_out: Any
    own_keys: Any  # that they are aligned with
    lse: Any  # as an exponent of 2
    delta: Any


@gluon.jit
def _copy(q, k, v, d_out, shared, sizes, GROUP_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """The copy warp."""
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    block = block_of_step(0, sizes, BLOCK_M)
    num_tiles, _ = key_tiles(block.first_row, sizes, BLOCK_M, BLOCK_N, CAUSAL)
    for consumer in gl.static_range(NUM_CONSUMERS):
        row = block.first_row + consumer * CONSUMER_ROWS
        fill(shared.q, consumer, q, block.batch, row, block.head)
        fill(shared.d_out, consumer, d_out, block.batch, row, block.head)
    for i in range(num_tiles):
        key = (num_tiles - 1 - i) * BLOCK_N
        fill(shared.k, i, k, block.batch, key, block.head // GROUP_SIZE)
        fill(shared.v, i, v, block.batch, key, block.head // GROUP_SIZE)


@gluon.jit
def _walk(
    rows,
    shared,
    n,
    num_steps,
    num_tiles,
    dq,
    seq_len_kv,
    exponent_scale,
    CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Adds num_steps of the num_tiles tiles, from the n-th on, to dq; returns dq."""
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    HEAD_DIM: gl.constexpr = shared.k.stages[0].shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    GRADIENT: gl.constexpr = accumulator_layout(HEAD_DIM)
    zero = gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, layout=SCORES)
    for i in range(n, n + num_steps):
        k = landed(shared.k, i)[0]
        scores_soon = warpgroup_mma(rows.q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        v = landed(shared.v, i)[0]
        d_weights_soon = warpgroup_mma(
            rows.d_out, v.permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(1, deps=[scores_soon])
        if MASKED:
            start = (num_tiles - 1 - i) * BLOCK_N
            scores = hide(scores, rows.own_keys, start, seq_len_kv, SCORES, CAUSAL)
        weights = gl.exp2(scores * exponent_scale - gl.expand_dims(rows.lse, 1))
        weights = pin_tile(weights)  # under the second product
        d_weights = warpgroup_mma_wait(0, deps=[d_weights_soon])
        release(shared.v, i)
        d_scores = weights * (d_weights - gl.expand_dims(rows.delta, 1))
        d_scores = as_operand(d_scores.to(k.dtype), GRADIENT)
        dq_soon = warpgroup_mma(d_scores, k, dq, is_async=True)
        dq, _ = warpgroup_mma_wait(0, deps=[dq_soon, d_scores])
        release(shared.k, i)
    return dq


@gluon.jit
def _consume(
    dq_out,
    statistics,
    shared,
    sizes,
    softmax_scale,
    CONSUMER: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A consumer: CONSUMER_ROWS queries."""
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    HEAD_DIM: gl.constexpr = shared.k.stages[0].shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    block = block_of_step(0, sizes, BLOCK_M)
    num_tiles, num_free = key_tiles(block.first_row, sizes, BLOCK_M, BLOCK_N, CAUSAL)
    exponent_scale = softmax_scale * LOG2_E
    first_row = block.first_row + CONSUMER * CONSUMER_ROWS
    queries = first_row + gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, SCORES))
    lse, delta = load_statistics(
        statistics, block.batch, block.head, queries, sizes, exponent_scale
    )
    q = landed(shared.q, CONSUMER)[0]
    d_out = landed(shared.d_out, CONSUMER)[0]
    rows = Rows(q, d_out, queries + sizes.seq_len_kv - sizes.seq_len_q, lse, delta)
    dq = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=accumulator_layout(HEAD_DIM))
    num_masked = num_tiles - num_free
    dq = _walk(
        rows, shared, 0, num_masked, num_tiles, dq,
        sizes.seq_len_kv, exponent_scale, CAUSAL, True,
    )  # fmt: skip
    dq = _walk(
        rows, shared, num_masked, num_free, num_tiles, dq,
        sizes.seq_len_kv, exponent_scale, CAUSAL, False,
    )  # fmt: skip
    q.store((dq * softmax_scale).to(dq_out.dtype))  # where no product reads any more
    fence_async_shared()
    start = [block.batch, first_row, block.head, 0]
    start_store(dq_out, start, q.reshape(dq_out.block_shape))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "seq_len_q", "seq_len_kv", "num_heads", "num_row_blocks", "num_batch_heads", "section",
    ]
)  # fmt: skip
def _dq_kernel(
    q,
    k,
    v,
    d_out,
    dq,
    lse_ptr,
    delta_ptr,
    seq_len_q,
    seq_len_kv,
    num_heads,
    num_row_blocks,
    num_batch_heads,
    section,
    softmax_scale,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """A program sums the gradient of BLOCK_M queries of one head over the keys that they see."""
    q_ring = make_ring(q.dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM, 1)
    d_out_ring = make_ring(q.dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM, 1)
    k_ring = make_ring(k.dtype, NUM_STAGES, BLOCK_N, HEAD_DIM, NUM_CONSUMERS)
    v_ring = make_ring(v.dtype, NUM_STAGES, BLOCK_N, HEAD_DIM, NUM_CONSUMERS)
    fence_async_shared()
    shared = Shared(q_ring, d_out_ring, k_ring, v_ring)
    sizes = Sizes(seq_len_q, seq_len_kv, num_heads, num_batch_heads, num_row_blocks, section)
    statistics = Statistics(lse_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (_consume, (dq, statistics, shared, sizes, softmax_scale, 0, CAUSAL)),
            (_consume, (dq, statistics, shared, sizes, softmax_scale, 1, CAUSAL)),
            (_copy, ((q,), (k,), (v,), (d_out,), shared, sizes, GROUP_SIZE, CAUSAL)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )


_launch = launch.launcher(_dq_kernel)


def query_gradient(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, config: HopperBackwardConfig
) -> Tensor:
    """dq of a prepared, non-empty call without options.

    Args:
        call: has q, k and v, a scale, and window_right None (full) or 0 (causal).
        dout: of q's shape.
        lse, delta: float32 `[batch, num_q_heads, seq_len_q]`; lse in score units.
    """
    q, k, v, dout = map(layout.aligned, (call.q, call.k, call.v, dout))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    _, seq_len_kv, num_kv_heads, _ = k.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    group_size = num_q_heads // num_kv_heads
    num_batch_heads = batch * num_q_heads
    num_row_blocks = layout.cdiv(seq_len_q, BLOCK_M.value)
    _launch(
        (num_row_blocks * num_batch_heads,),
        q=descriptor(q, CONSUMER_ROWS.value),
        k=descriptor(k, config.block),
        v=descriptor(v, config.block),
        d_out=descriptor(dout, CONSUMER_ROWS.value),
        dq=descriptor(dq, CONSUMER_ROWS.value),
        lse_ptr=lse,
        delta_ptr=delta,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_q_heads,
        num_row_blocks=num_row_blocks,
        num_batch_heads=num_batch_heads,
        section=query_heads_in_cache(call),
        softmax_scale=call.score_unit,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_N=config.block,
        NUM_STAGES=config.num_stages,
        CAUSAL=call.window_right is not None,
        CONSUMER_REGISTERS=config.consumer_registers,
        COPY_REGISTERS=config.copy_registers,
        num_warps=4,
    )
    return dq
