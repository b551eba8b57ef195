"""The gradients of keys and values of flash attention for Hopper, warp-specialised.

Formulas in `ops/attention/backward.py`, whose delta it takes. A program owns 64 keys and values of
one key/value head for each of its two consumers, and sums over the query heads of the group:

    copy warp    keys, values and, of each head, the tiles of queries and dO that see one of these
                 keys, with their lse and delta
    consumer     Sᵀ = K Qᵀ and dPᵀ = V dOᵀ of a tile; Pᵀ and dSᵀ stay in registers and multiply dO
                 and the queries

No product is transposed. The tiles that need a mask, the first ones of each head, come first.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.ops.attention.hopper.keys import (
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
    landed,
    release,
)
from gqa_kernels.ops.attention.hopper.softmax import LOG2_E, as_operand
from gqa_kernels.ops.attention.hopper.tiles import Statistics, hide_keys
from gqa_kernels.runtime import launch
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig


@gluon.jit
def _walk(
    k,
    v,
    shared,
    n,
    work,
    keys,
    first_own_key,
    exponent_scale,
    dk,
    dv,
    CAUSAL: gl.constexpr,
):
    """Adds the tiles of a head, from tile n of the rings on, to dk and dv; returns both.

    Args:
        first_own_key: the key that the first query of tile n is aligned with.
    """
    NUM_STAGES: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_M: gl.constexpr = shared.q.stages[0].shape[1]
    HEAD_DIM: gl.constexpr = shared.q.stages[0].shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_M)
    GRADIENT: gl.constexpr = accumulator_layout(HEAD_DIM)
    OF_QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    zero = gl.zeros([CONSUMER_ROWS, BLOCK_M], gl.float32, layout=SCORES)
    for i in range(work.num_tiles):
        stage = (n + i) % NUM_STAGES
        q = landed(shared.q, n + i)[0]
        scores_soon = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        d_out = landed(shared.d_out, n + i)[0]
        d_weights_soon = warpgroup_mma(v, d_out.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(shared.statistics.index(stage), ((n + i) // NUM_STAGES) & 1)
        lse = shared.lse.index(stage).load(OF_QUERIES)
        scores = warpgroup_mma_wait(1, deps=[scores_soon])
        # A branch: two loops, with and without the mask, need more registers.
        if CAUSAL:  # noqa: SIM102, a constant
            if i < work.num_masked:
                first = first_own_key + i * BLOCK_M
                scores = hide_keys(scores, keys, first, SCORES, CAUSAL)
        weights = gl.exp2(scores * exponent_scale - gl.expand_dims(lse, 0))
        rounded = as_operand(weights.to(q.dtype), GRADIENT)
        dv_soon = warpgroup_mma(rounded, d_out, dv, is_async=True)
        delta = shared.delta.index(stage).load(OF_QUERIES)
        d_weights = warpgroup_mma_wait(1, deps=[d_weights_soon])
        d_scores = weights * (d_weights - gl.expand_dims(delta, 0))
        d_scores = as_operand(d_scores.to(q.dtype), GRADIENT)
        dk_soon = warpgroup_mma(d_scores, q, dk, is_async=True)
        dv, _ = warpgroup_mma_wait(1, deps=[dv_soon, rounded])
        release(shared.d_out, n + i)
        dk, _ = warpgroup_mma_wait(0, deps=[dk_soon, d_scores])
        release(shared.q, n + i)
    return dk, dv


@gluon.jit
def _consume(
    dk_out,
    dv_out,
    shared,
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
    own_key = work.first_query + sizes.seq_len_kv - sizes.seq_len_q
    dk = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=GRADIENT)
    dv = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=GRADIENT)
    k = landed(shared.k, CONSUMER)[0]
    v = landed(shared.v, CONSUMER)[0]
    for head in range(GROUP_SIZE):
        n = head * work.num_tiles
        dk, dv = _walk(k, v, shared, n, work, keys, own_key, exponent_scale, dk, dv, CAUSAL)
    store_gradients(dk_out, dv_out, k, v, dk * softmax_scale, dv, work, first_key)


@gluon.jit(do_not_specialize=["seq_len_q", "seq_len_kv", "num_heads", "num_batch_heads"])
def _dkdv_kernel(
    q,
    k,
    v,
    d_out,
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
    """A program sums the gradients of BLOCK_N keys and values over all heads of a group."""
    shared = make_shared(q.dtype, HEAD_DIM, BLOCK_M, NUM_STAGES)
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
                    dk, dv, shared, sizes, work, softmax_scale, exponent_scale,
                    0, GROUP_SIZE, CAUSAL,
                ),
            ),
            (
                _consume,
                (
                    dk, dv, shared, sizes, work, softmax_scale, exponent_scale,
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


_launch = launch.launcher(_dkdv_kernel)


def key_value_gradients(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, config: HopperBackwardConfig
) -> tuple[Tensor, Tensor]:
    """(dk, dv) of a prepared, non-empty call without options.

    Args:
        call, dout, lse, delta: as in `dq.query_gradient`.
    """
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.k, call.v))
    grid, arguments = launch_arguments(call, dout, lse, delta, dk, dv, config)
    _launch(grid, **arguments)
    return dk, dv
