"""A consumer of the forward kernel for Hopper: four warps with 64 queries of each block."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gqa_kernels.ops.attention.hopper.options import score, seen_tiles
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    accumulator_layout,
    await_turn,
    landed,
    pass_turn,
    pin,
    release,
    start_store,
)
from gqa_kernels.ops.attention.hopper.softmax import (
    LOG2_E,
    OF_THREADS,
    Softmax,
    add_weights,
    as_operand,
    sum_of_threads,
    weigh,
)
from gqa_kernels.ops.attention.hopper.tiles import block_of_step, store_rows
from gqa_kernels.primitives.residue import residue_of

LN_2 = gl.constexpr(0.6931471805599453)


class Shared(NamedTuple):
    """The shared memory of a program."""

    q: Any  # a ring with a stage per consumer
    k: Any  # rings of tiles of BLOCK_N keys or values
    v: Any
    out: Any  # [consumer, row, feature]


class Results(NamedTuple):
    """Where the results go."""

    out: Any  # a descriptor
    residue: Any  # a pointer, or None
    lse: Any  # likewise


@gluon.jit
def _walk(
    q,
    shared,
    n,
    num_steps,
    start,
    softmax,
    own_keys,
    seq_len_kv,
    options,
    exponent_scale,
    CONSUMER: gl.constexpr,
    CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
    MASK: gl.constexpr,
    ROUNDED: gl.constexpr,
):
    """Adds num_steps tiles, from tile n of the rings on, to the softmax, which is one tile behind
    with the values; `start` is the first key of the first of these tiles."""
    NUM_CONSUMERS: gl.constexpr = shared.q.stages.shape[0]
    BLOCK_N: gl.constexpr = shared.k.stages.shape[1]
    HEAD_DIM: gl.constexpr = shared.k.stages.shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    OUT: gl.constexpr = accumulator_layout(HEAD_DIM)
    zero = gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, layout=SCORES)
    for i in range(num_steps):
        k = landed(shared.k, n + i)
        await_turn(CONSUMER, TURNS)
        scores_soon = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        v = landed(shared.v, n + i - 1)
        values_soon = warpgroup_mma(softmax.weights, v, softmax.accumulator, is_async=True)
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)
        scores = warpgroup_mma_wait(1, deps=[scores_soon])
        release(shared.k, n + i)
        first_key = start - i * BLOCK_N
        scores = score(scores, own_keys, first_key, seq_len_kv, options, SCORES, CAUSAL, MASK)
        weights, running_max, running_sum, rescale = weigh(
            scores, softmax.running_max, softmax.running_sum, exponent_scale, MASK is not None
        )
        weights = weights.to(v.dtype)
        running_sum = pin(running_sum)
        accumulator, weights = warpgroup_mma_wait(0, deps=[values_soon, weights])
        release(shared.v, n + i - 1)
        rounded_sum = softmax.rounded_sum
        if ROUNDED:  # after the product: before, there are no registers for it
            rounded_sum = add_weights(rounded_sum, rescale, weights.to(gl.float32))
        rescale = gl.convert_layout(rescale, gl.SliceLayout(1, OUT))
        accumulator = accumulator * gl.expand_dims(rescale, 1)
        weights = as_operand(weights, OUT)
        softmax = Softmax(running_max, running_sum, rounded_sum, accumulator, weights)
    return softmax


@gluon.jit
def consume(
    results,
    shared,
    sizes,
    options,
    score_unit,
    CONSUMER: gl.constexpr,
    CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
    OWN_OUT: gl.constexpr,
):
    """A consumer: CONSUMER_ROWS queries of each block."""
    NUM_CONSUMERS: gl.constexpr = shared.q.stages.shape[0]
    BLOCK_M: gl.constexpr = NUM_CONSUMERS * CONSUMER_ROWS
    BLOCK_N: gl.constexpr = shared.k.stages.shape[1]
    HEAD_DIM: gl.constexpr = shared.k.stages.shape[2]
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    OUT: gl.constexpr = accumulator_layout(HEAD_DIM)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROUNDED: gl.constexpr = results.residue is not None
    exponent_scale = score_unit * LOG2_E
    step = 0
    n = 0  # key tiles so far, of all blocks
    if CONSUMER == NUM_CONSUMERS - 1:
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)  # consumer 0 begins
    block = block_of_step(step, sizes, BLOCK_M)
    while block.exists:
        tiles = seen_tiles(block.first_row, sizes, options, BLOCK_M, BLOCK_N, CAUSAL)
        start = (tiles.first + tiles.count - 1) * BLOCK_N
        first_row = block.first_row + CONSUMER * CONSUMER_ROWS
        rows = first_row + gl.arange(0, CONSUMER_ROWS, layout=OF_ROWS)
        own_keys = rows + sizes.seq_len_kv - sizes.seq_len_q

        # The last tile of keys; there are no weights yet that could multiply values meanwhile.
        q = landed(shared.q, step * NUM_CONSUMERS + CONSUMER)
        k = landed(shared.k, n)
        zero = gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, layout=SCORES)
        await_turn(CONSUMER, TURNS)
        scores_soon = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)
        scores = warpgroup_mma_wait(0, deps=[scores_soon])
        release(shared.k, n)
        scores = score(scores, own_keys, start, sizes.seq_len_kv, options, SCORES, CAUSAL, "all")
        nothing = gl.full([CONSUMER_ROWS], -float("inf"), gl.float32, layout=OF_ROWS)
        no_sum = gl.zeros([CONSUMER_ROWS, 4], gl.float32, layout=OF_THREADS)
        weights, running_max, running_sum, rescale = weigh(
            scores, nothing, no_sum, exponent_scale, True
        )
        weights = weights.to(k.dtype)
        rounded_sum = no_sum
        if ROUNDED:
            rounded_sum = add_weights(no_sum, rescale, weights.to(gl.float32))
        accumulator = gl.zeros([CONSUMER_ROWS, HEAD_DIM], gl.float32, layout=OUT)
        weights = as_operand(weights, OUT)
        softmax = Softmax(running_max, running_sum, rounded_sum, accumulator, weights)

        num_masked = tiles.count - 1 - tiles.num_free - tiles.num_left
        if CAUSAL or options.window_left is not None:
            softmax = _walk(
                q, shared, n + 1, num_masked, start - BLOCK_N, softmax,
                own_keys, sizes.seq_len_kv, options, exponent_scale,
                CONSUMER, CAUSAL, TURNS, "window", ROUNDED,
            )  # fmt: skip
        n += tiles.count
        end = n - tiles.num_left
        softmax = _walk(
            q, shared, end - tiles.num_free, tiles.num_free, start, softmax,
            own_keys, sizes.seq_len_kv, options, exponent_scale,
            CONSUMER, CAUSAL, TURNS, None, ROUNDED,
        )  # fmt: skip
        if options.window_left is not None:
            start = (tiles.first + tiles.num_left - 1) * BLOCK_N
            softmax = _walk(
                q, shared, end, tiles.num_left, start, softmax,
                own_keys, sizes.seq_len_kv, options, exponent_scale,
                CONSUMER, CAUSAL, TURNS, "left", ROUNDED,
            )  # fmt: skip
        if OWN_OUT:
            release(shared.q, step * NUM_CONSUMERS + CONSUMER)

        # The values of the first tile; lse is stored meanwhile.
        v = landed(shared.v, n - 1)
        values_soon = warpgroup_mma(softmax.weights, v, softmax.accumulator, is_async=True)
        total = sum_of_threads(softmax.running_sum, OF_ROWS)
        seen = total > 0.0
        if results.lse is not None:
            lse = softmax.running_max + gl.log2(total) * (LN_2 / score_unit)
            lse = gl.where(seen, lse, -float("inf"))
            head = (block.batch * sizes.num_heads + block.head).to(gl.int64)
            gl.store(results.lse + head * sizes.seq_len_q + rows, lse, mask=rows < sizes.seq_len_q)
        inverse = gl.where(seen, 1.0 / total, 0.0)
        inverse = gl.convert_layout(inverse, gl.SliceLayout(1, OUT))
        values = warpgroup_mma_wait(0, deps=[values_soon])
        release(shared.v, n - 1)
        tile = shared.out.index(CONSUMER)
        tma.store_wait(0)  # the last block's store has read the tile
        values = values * gl.expand_dims(inverse, 1)
        rounded = values.to(results.out.dtype)
        tile.store(rounded)
        fence_async_shared()
        tile = tile.reshape([1, CONSUMER_ROWS, 1, HEAD_DIM])
        start_store(results.out, [block.batch, first_row, block.head, 0], tile)
        if ROUNDED:
            rounded_total = sum_of_threads(softmax.rounded_sum, OF_ROWS)
            share = gl.where(seen, total / rounded_total - 1.0, 0.0)
            share = gl.convert_layout(share, gl.SliceLayout(1, OUT))
            lost = values * gl.expand_dims(share, 1) + (values - rounded.to(gl.float32))
            residue = residue_of(lost, rounded)
            store_rows(results.residue, residue, block, first_row, sizes, OUT)
        if not OWN_OUT:
            tma.store_wait(0)
            release(shared.q, step * NUM_CONSUMERS + CONSUMER)
        step += 1
        block = block_of_step(step, sizes, BLOCK_M)
    if CONSUMER == 0:
        await_turn(CONSUMER, TURNS)  # which the last consumer has passed on
    tma.store_wait(0)
