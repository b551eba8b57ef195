"""The forward kernel of flash attention for Hopper, warp-specialised.

    out = softmax(scores) v,  lse = log Σ exp(scores)

as `ops/attention/forward.py`, after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). Query
head h reads key/value head h // GROUP_SIZE.

A program owns 64 queries per consumer, of one head, and goes on to further blocks of queries:

    copy warp    queries and, downwards from the last tile that they see, tiles of keys and values
    consumer     multiplies queries with keys of tile i and weights with values of tile i − 1; the
                 softmax of tile i runs under the second product; weights stay in registers
    turns        a consumer issues its products while another one computes its softmax
    out          leaves through shared memory while the next block begins

Tiles that need a mask, on the diagonal and at the end, come first; the long loop applies none.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.ops.attention.hopper.blocks import first_block, lengths_of, next_block, rows_of
from gqa_kernels.ops.attention.hopper.consumer import Results, Shared, consume
from gqa_kernels.ops.attention.hopper.options import Options, seen_tiles
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    allocate_tiles,
    descriptors,
    fill,
    make_ring,
    parts_of,
)
from gqa_kernels.ops.attention.hopper.tiles import Sizes
from gqa_kernels.ops.attention.sequences import num_blocks, query_heads_in_cache
from gqa_kernels.runtime import launch, layout
from gqa_kernels.runtime.hopper_configs import HopperConfig


@gluon.jit
def _copy(q, k, v, shared, sizes, options, GROUP_SIZE: gl.constexpr, CAUSAL: gl.constexpr):
    """The copy warp."""
    NUM_CONSUMERS: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_M: gl.constexpr = NUM_CONSUMERS * CONSUMER_ROWS
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    step = 0
    n = 0  # key tiles so far, of all blocks
    block = first_block(step, sizes, options, BLOCK_M)
    while block.exists:
        queries, keys = rows_of(block, options)
        lengths = lengths_of(block, sizes, options)
        tiles = seen_tiles(block.first_row, lengths, options, BLOCK_M, BLOCK_N, CAUSAL)
        kv_head = block.head // GROUP_SIZE
        last = tiles.first + tiles.count - 1
        # The stages of k and v are free before those of q, which the last block still reads.
        fill(shared.k, n, k, keys, last * BLOCK_N, kv_head)
        for consumer in gl.static_range(NUM_CONSUMERS):
            row = block.first_row + consumer * CONSUMER_ROWS
            fill(shared.q, step * NUM_CONSUMERS + consumer, q, queries, row, block.head)
        fill(shared.v, n, v, keys, last * BLOCK_N, kv_head)
        for i in range(1, tiles.count):
            fill(shared.k, n + i, k, keys, (last - i) * BLOCK_N, kv_head)
            fill(shared.v, n + i, v, keys, (last - i) * BLOCK_N, kv_head)
        n += tiles.count
        step += 1
        block = next_block(block, step, sizes, options, BLOCK_M)


@gluon.jit(
    do_not_specialize=[
        "seq_len_q", "seq_len_kv", "num_heads", "num_row_blocks", "num_batch_heads", "section",
        "num_sequences", "window_left", "window_right",
    ]
)  # fmt: skip
def _forward_kernel(
    q,
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    out,
    out_rest,
    residue_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_kv_ptr,
    num_sequences,
    seq_len_q,
    seq_len_kv,
    num_heads,
    num_row_blocks,
    num_batch_heads,
    section,
    window_left,
    window_right,
    score_unit,
    cap_scale,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
    OWN_OUT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """A program attends from blocks of queries to all the keys that they see.

    Args:
        q_rest, k_rest, v_rest, out_rest: descriptors of the second parts, or None.
    """
    q_ring = make_ring(q.dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM, 1)
    k_ring = make_ring(k.dtype, NUM_STAGES, BLOCK_N, HEAD_DIM, NUM_CONSUMERS)
    v_ring = make_ring(v.dtype, NUM_STAGES, BLOCK_N, HEAD_DIM, NUM_CONSUMERS)
    fence_async_shared()
    staged = q_ring.stages  # without memory of its own, out takes the place of q
    if OWN_OUT:
        staged = allocate_tiles(q.dtype, NUM_CONSUMERS, CONSUMER_ROWS, HEAD_DIM)
    shared = Shared(q_ring, k_ring, v_ring, staged)
    sizes = Sizes(seq_len_q, seq_len_kv, num_heads, num_batch_heads, num_row_blocks, section)
    q, k, v = parts_of(q, q_rest), parts_of(k, k_rest), parts_of(v, v_rest)
    results = Results(parts_of(out, out_rest), residue_ptr, lse_ptr)
    options = Options(
        window_left, window_right, cap_scale, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, num_sequences
    )
    if NUM_CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (results, shared, sizes, options, score_unit, 0, CAUSAL, TURNS, OWN_OUT)),
                (consume, (results, shared, sizes, options, score_unit, 1, CAUSAL, TURNS, OWN_OUT)),
                (_copy, (q, k, v, shared, sizes, options, GROUP_SIZE, CAUSAL)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, COPY_REGISTERS],
        )
    else:
        gl.static_assert(NUM_CONSUMERS == 3)
        gl.warp_specialize(
            [
                (consume, (results, shared, sizes, options, score_unit, 0, CAUSAL, TURNS, OWN_OUT)),
                (consume, (results, shared, sizes, options, score_unit, 1, CAUSAL, TURNS, OWN_OUT)),
                (consume, (results, shared, sizes, options, score_unit, 2, CAUSAL, TURNS, OWN_OUT)),
                (_copy, (q, k, v, shared, sizes, options, GROUP_SIZE, CAUSAL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, COPY_REGISTERS],
        )


_launch = launch.launcher(_forward_kernel)


def launch_forward(
    call: Call,
    config: HopperConfig,
    num_programs: int,
    *,
    need_lse: bool,
    need_residue: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse, residue) of a prepared, non-empty call without options, each of the last two None
    unless needed.

    Args:
        call: has q, k and v, a scale, and window_right None (full) or 0 (causal).
        num_programs: at most one per SM runs at a time.
    Returns:
        As `ops.attention.forward.launch_forward`.
    """
    q, k, v = map(layout.aligned, (call.q, call.k, call.v))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    _, seq_len_kv, num_kv_heads, _ = k.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = residue = None
    if need_residue:
        residue = torch.empty_like(out, dtype=torch.int8)
    if need_lse:
        lse = torch.empty(batch, num_q_heads, seq_len_q, dtype=torch.float32, device=q.device)
    group_size = num_q_heads // num_kv_heads
    num_batch_heads = batch * num_q_heads
    num_row_blocks = num_blocks(
        seq_len_q, call.num_sequences, CONSUMER_ROWS.value * config.num_consumers
    )
    left, right = call.window_left, call.window_right
    causal = (left, right) == (None, 0)
    if causal:
        right = None
    elif left is not None or right is not None:  # one binary for all other windows
        left, right = (2**30 if side is None else side for side in (left, right))
    q_parts, k_parts, v_parts, out_parts = (
        descriptors(x, rows, packed=call.packed)
        for x, rows in (
            *((q, CONSUMER_ROWS.value), (k, config.block_n)),
            *((v, config.block_n), (out, CONSUMER_ROWS.value)),
        )
    )
    _launch(
        (min(num_programs, num_row_blocks * num_batch_heads),),
        q=q_parts[0],
        q_rest=q_parts[1],
        k=k_parts[0],
        k_rest=k_parts[1],
        v=v_parts[0],
        v_rest=v_parts[1],
        out=out_parts[0],
        out_rest=out_parts[1],
        residue_ptr=residue,
        lse_ptr=lse,
        cu_seqlens_q_ptr=call.cu_seqlens_q,
        cu_seqlens_kv_ptr=call.cu_seqlens_kv,
        num_sequences=call.num_sequences,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        num_heads=num_q_heads,
        num_row_blocks=num_row_blocks,
        num_batch_heads=num_batch_heads,
        section=query_heads_in_cache(call),
        window_left=left,
        window_right=right,
        score_unit=call.score_unit,
        cap_scale=None if call.softcap is None else call.softmax_scale / call.softcap,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        NUM_CONSUMERS=config.num_consumers,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        CAUSAL=causal,
        TURNS=config.turns,
        OWN_OUT=config.own_out,
        CONSUMER_REGISTERS=config.consumer_registers,
        COPY_REGISTERS=config.copy_registers,
        num_warps=4,
    )
    return out, lse, residue
