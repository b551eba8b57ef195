"""Which tiles the kernels for Hopper process, in which order; their masks and stores."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Sizes(NamedTuple):
    """The sizes of a call."""

    seq_len_q: Any
    seq_len_kv: Any
    num_heads: Any
    num_batch_heads: Any
    num_row_blocks: Any  # of a head
    section: Any  # `block_of_step`, `sequences.query_heads_in_cache`


class Block(NamedTuple):
    """The work of a step: a block of rows of one head. After the last one, `exists` is false."""

    exists: Any
    batch: Any
    head: Any
    first_row: Any


@gluon.jit
def block_of_step(step, sizes, NUM_ROWS: gl.constexpr):
    """The block of NUM_ROWS rows that this program processes at a step.

    The blocks with the most keys under a causal mask, those of the last rows, come first. They are
    dealt to the programs there and back again, so that each gets heavy and light ones alike. Heads
    follow each other in sections, whose keys and values fit the L2 cache; every other section, from
    the last but one, begins with the light blocks, so that work changes little from step to step.
    """
    num_programs = gl.num_programs(0)
    program = gl.program_id(0)
    if step % 2 == 1:
        program = num_programs - 1 - program
    number = step * num_programs + program
    section = number // (sizes.section * sizes.num_row_blocks)
    first_head = section * sizes.section
    heads_here = gl.maximum(gl.minimum(sizes.section, sizes.num_batch_heads - first_head), 1)
    rest = number - first_head * sizes.num_row_blocks
    batch_head = first_head + rest % heads_here
    row_block = rest // heads_here
    if ((sizes.num_batch_heads - 1) // sizes.section - section) % 2 == 0:
        row_block = sizes.num_row_blocks - 1 - row_block
    return Block(
        number < sizes.num_row_blocks * sizes.num_batch_heads,
        batch_head // sizes.num_heads,
        batch_head % sizes.num_heads,
        row_block * NUM_ROWS,
    )


@gluon.jit
def key_tiles(first_row, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(number of key tiles that BLOCK_M queries see, number of those that need no mask).

    One tile at least is walked with a mask, so that rows without keys become 0 and −inf.
    """
    num_seen = sizes.seq_len_kv
    num_free = sizes.seq_len_kv
    if CAUSAL:
        own_key = first_row + sizes.seq_len_kv - sizes.seq_len_q  # of the first row
        num_seen = gl.minimum(num_seen, own_key + BLOCK_M)
        num_free = gl.maximum(own_key + 1, 0)
    num_tiles = gl.maximum(num_seen + BLOCK_N - 1, BLOCK_N) // BLOCK_N
    return num_tiles, gl.minimum(num_free // BLOCK_N, num_tiles - 1)


@gluon.jit
def hide(scores, own_keys, start, seq_len_kv, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """Sets scores `[row, key]` of keys that a row does not see to −inf.

    Args:
        own_keys: the key that each row is aligned with.
        start: the first key of the tile.
    """
    BLOCK_N: gl.constexpr = scores.shape[1]
    keys = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    if CAUSAL:  # no row has its own key after the last one
        return gl.where(keys <= gl.expand_dims(own_keys - start, 1), scores, -float("inf"))
    else:
        return gl.where(keys < seq_len_kv - start, scores, -float("inf"))


@gluon.jit
def store_rows(
    pointer, tile, block, first_row, sizes, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr
):
    """Stores features of the rows of a head that exist to a contiguous `[batch, row, head,
    feature]`, where `pointer` is that of the first of these features."""
    NUM_ROWS: gl.constexpr = tile.shape[0]
    NUM_FEATURES: gl.constexpr = tile.shape[1]
    rows = first_row + gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    features = gl.arange(0, NUM_FEATURES, layout=gl.SliceLayout(0, LAYOUT))
    row = block.batch.to(gl.int64) * sizes.seq_len_q + rows
    offsets = (row * sizes.num_heads + block.head) * HEAD_DIM
    pointers = pointer + gl.expand_dims(offsets, 1) + gl.expand_dims(features, 0)
    gl.store(pointers, tile, mask=gl.expand_dims(rows < sizes.seq_len_q, 1))


@gluon.jit
def hide_keys(scores, keys, last_key, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """Sets scores `[key, query]` of keys that a query does not see to −inf.

    Args:
        last_key: that the first query sees; the next query sees one more if CAUSAL.
    """
    NUM_QUERIES: gl.constexpr = scores.shape[1]
    beyond = gl.expand_dims(keys - last_key, 1)
    if CAUSAL:
        queries = gl.arange(0, NUM_QUERIES, layout=gl.SliceLayout(0, LAYOUT))
        return gl.where(beyond <= gl.expand_dims(queries, 0), scores, -float("inf"))
    else:
        return gl.where(beyond <= 0, scores, -float("inf"))


@gluon.jit
def load_statistics(statistics, batch, head, rows, sizes, exponent_scale):
    """Returns (lse as an exponent of 2, delta) of rows of a head; rows that do not exist or see no
    key get +inf and with it weights of 0."""
    exists = rows < sizes.seq_len_q
    first = (batch * sizes.num_heads + head).to(gl.int64) * sizes.seq_len_q
    lse = gl.load(statistics.lse + first + rows, mask=exists, other=-float("inf"))
    lse = gl.where(lse == -float("inf"), float("inf"), lse * exponent_scale)
    return lse, gl.load(statistics.delta + first + rows, mask=exists, other=0.0)


class Statistics(NamedTuple):
    """Pointers to float32 `[batch, head, query]`: lse in score units, and delta."""

    lse: Any
    delta: Any
