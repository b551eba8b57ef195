"""A consumer of the forward kernel for Hopper: four warps with 64 queries of each block."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma_wait,
)

from gqa_kernels.ops.attention.hopper.blocks import (
    at_sequence,
    first_block,
    lengths_of,
    next_block,
    rows_of,
)
from gqa_kernels.ops.attention.hopper.options import score, seen_tiles
from gqa_kernels.ops.attention.hopper.pipeline import (
    CONSUMER_ROWS,
    accumulator_layout,
    await_turn,
    corner,
    landed,
    parts_at,
    pass_turn,
    pin,
    release,
    start_store,
)
from gqa_kernels.ops.attention.hopper.products import (
    await_all,
    scale_rows,
    start_scores,
    start_values,
    zero_rows,
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
from gqa_kernels.ops.attention.hopper.tiles import store_rows
from gqa_kernels.primitives.residue import residue_of

LN_2 = gl.constexpr(0.6931471805599453)


class Shared(NamedTuple):
    """The shared memory of a program."""

    q: Any  # a ring with a stage per consumer
    k: Any  # rings of tiles of BLOCK_N keys or values
    v: Any
    out: Any  # (part: [consumer, row, feature], …)


class Results(NamedTuple):
    """Where the results go."""

    out: Any  # a descriptor for each part
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
    NUM_CONSUMERS: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    NUM_PARTS: gl.constexpr = len(shared.k.stages)
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    OUT: gl.constexpr = accumulator_layout(shared.v.stages[0].shape[2])
    zero = gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, layout=SCORES)
    for i in range(num_steps):
        k = landed(shared.k, n + i)
        await_turn(CONSUMER, TURNS)
        scores_soon = start_scores(q, k, zero)
        v = landed(shared.v, n + i - 1)
        values_soon = start_values(softmax.weights, v, softmax.accumulators)
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)
        scores = warpgroup_mma_wait(NUM_PARTS, deps=[scores_soon])
        release(shared.k, n + i)
        first_key = start - i * BLOCK_N
        scores = score(scores, own_keys, first_key, seq_len_kv, options, SCORES, CAUSAL, MASK)
        weights, running_max, running_sum, rescale = weigh(
            scores, softmax.running_max, softmax.running_sum, exponent_scale, MASK is not None
        )
        rounded = (weights.to(v[0].dtype),)
        running_sum = pin(running_sum)
        done = warpgroup_mma_wait(0, deps=values_soon + rounded)
        release(shared.v, n + i - 1)
        weights = done[NUM_PARTS]
        rounded_sum = softmax.rounded_sum
        if ROUNDED:  # after the product: before, there are no registers for it
            rounded_sum = add_weights(rounded_sum, rescale, weights.to(gl.float32))
        accumulators = scale_rows(done[:NUM_PARTS], rescale)
        weights = as_operand(weights, OUT)
        softmax = Softmax(running_max, running_sum, rounded_sum, accumulators, weights)
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
    NUM_CONSUMERS: gl.constexpr = shared.q.stages[0].shape[0]
    BLOCK_M: gl.constexpr = NUM_CONSUMERS * CONSUMER_ROWS
    BLOCK_N: gl.constexpr = shared.k.stages[0].shape[1]
    NUM_PARTS: gl.constexpr = len(shared.k.stages)
    SCORES: gl.constexpr = accumulator_layout(BLOCK_N)
    FIRST_PART: gl.constexpr = shared.v.stages[0].shape[2]
    HEAD_DIM: gl.constexpr = FIRST_PART + (shared.v.stages[1].shape[2] if NUM_PARTS > 1 else 0)
    OUT: gl.constexpr = accumulator_layout(FIRST_PART)
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    ROUNDED: gl.constexpr = results.residue is not None
    exponent_scale = score_unit * LOG2_E
    step = 0
    n = 0  # key tiles so far, of all blocks
    if CONSUMER == NUM_CONSUMERS - 1:
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)  # consumer 0 begins
    block = first_block(step, sizes, options, BLOCK_M)
    while block.exists:
        queries, _ = rows_of(block, options)
        lengths = lengths_of(block, sizes, options)
        tiles = seen_tiles(block.first_row, lengths, options, BLOCK_M, BLOCK_N, CAUSAL)
        start = (tiles.first + tiles.count - 1) * BLOCK_N
        first_row = block.first_row + CONSUMER * CONSUMER_ROWS
        rows = first_row + gl.arange(0, CONSUMER_ROWS, layout=OF_ROWS)
        own_keys = rows + lengths.seq_len_kv - lengths.seq_len_q

        # The last tile of keys; there are no weights yet that could multiply values meanwhile.
        q = landed(shared.q, step * NUM_CONSUMERS + CONSUMER)
        k = landed(shared.k, n)
        zero = gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, layout=SCORES)
        await_turn(CONSUMER, TURNS)
        scores_soon = start_scores(q, k, zero)
        pass_turn(CONSUMER, NUM_CONSUMERS, TURNS)
        scores = warpgroup_mma_wait(0, deps=[scores_soon])
        release(shared.k, n)
        scores = score(scores, own_keys, start, lengths.seq_len_kv, options, SCORES, CAUSAL, "all")
        nothing = gl.full([CONSUMER_ROWS], -float("inf"), gl.float32, layout=OF_ROWS)
        no_sum = gl.zeros([CONSUMER_ROWS, 4], gl.float32, layout=OF_THREADS)
        weights, running_max, running_sum, rescale = weigh(
            scores, nothing, no_sum, exponent_scale, True
        )
        weights = weights.to(k[0].dtype)
        rounded_sum = no_sum
        if ROUNDED:
            rounded_sum = add_weights(no_sum, rescale, weights.to(gl.float32))
        weights = as_operand(weights, OUT)
        accumulators = zero_rows(shared.v.stages)
        softmax = Softmax(running_max, running_sum, rounded_sum, accumulators, weights)

        num_masked = tiles.count - 1 - tiles.num_free - tiles.num_left
        if CAUSAL or options.window_left is not None:
            softmax = _walk(
                q, shared, n + 1, num_masked, start - BLOCK_N, softmax,
                own_keys, lengths.seq_len_kv, options, exponent_scale,
                CONSUMER, CAUSAL, TURNS, "window", ROUNDED,
            )  # fmt: skip
        n += tiles.count
        end = n - tiles.num_left
        softmax = _walk(
            q, shared, end - tiles.num_free, tiles.num_free, start, softmax,
            own_keys, lengths.seq_len_kv, options, exponent_scale,
            CONSUMER, CAUSAL, TURNS, None, ROUNDED,
        )  # fmt: skip
        if options.window_left is not None:
            start = (tiles.first + tiles.num_left - 1) * BLOCK_N
            softmax = _walk(
                q, shared, end, tiles.num_left, start, softmax,
                own_keys, lengths.seq_len_kv, options, exponent_scale,
                CONSUMER, CAUSAL, TURNS, "left", ROUNDED,
            )  # fmt: skip
        if OWN_OUT:
            release(shared.q, step * NUM_CONSUMERS + CONSUMER)

        # The values of the first tile; lse is stored meanwhile.
        v = landed(shared.v, n - 1)
        values_soon = start_values(softmax.weights, v, softmax.accumulators)
        total = sum_of_threads(softmax.running_sum, OF_ROWS)
        seen = total > 0.0
        if results.lse is not None:
            lse = softmax.running_max + gl.log2(total) * (LN_2 / score_unit)
            lse = gl.where(seen, lse, -float("inf"))
            head = (block.batch * sizes.num_heads + block.head).to(gl.int64)
            of_head = at_sequence(results.lse + head * sizes.seq_len_q, block, options, 1)
            gl.store(of_head + rows, lse, mask=rows < lengths.seq_len_q)
        inverse = gl.where(seen, 1.0 / total, 0.0)
        values = await_all(values_soon)
        release(shared.v, n - 1)
        tile = parts_at(shared.out, CONSUMER)
        tma.store_wait(0)  # the last block's store has read the tile
        values = scale_rows(values, inverse)
        for part in gl.static_range(NUM_PARTS):
            tile[part].store(values[part].to(results.out[part].dtype))
        fence_async_shared()
        for part in gl.static_range(NUM_PARTS):
            to = results.out[part]
            start = corner(to, queries, first_row, block.head, part * FIRST_PART)
            start_store(to, start, tile[part].reshape(to.block_shape))
        if ROUNDED:
            rounded_total = sum_of_threads(softmax.rounded_sum, OF_ROWS)
            share = gl.where(seen, total / rounded_total - 1.0, 0.0)
            lost = scale_rows(values, share)
            pointer = at_sequence(results.residue, block, options, sizes.num_heads * HEAD_DIM)
            for part in gl.static_range(NUM_PARTS):
                rounded = values[part].to(results.out[part].dtype)
                residue = residue_of(lost[part] + (values[part] - rounded.to(gl.float32)), rounded)
                store_rows(
                    pointer + part * FIRST_PART, residue, block, first_row, lengths,
                    HEAD_DIM, accumulator_layout(tile[part].shape[1]),
                )  # fmt: skip
        if not OWN_OUT:
            tma.store_wait(0)
            release(shared.q, step * NUM_CONSUMERS + CONSUMER)
        step += 1
        block = next_block(block, step, sizes, options, BLOCK_M)
    if CONSUMER == 0:
        await_turn(CONSUMER, TURNS)  # which the last consumer has passed on
    tma.store_wait(0)
