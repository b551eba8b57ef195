"""The blocks of queries of a program of the forward kernel for Hopper, also of packed sequences.

Lengths of packed sequences are known on the device only. The host launches for an upper bound of
their blocks; a program skips those without rows.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gqa_kernels.ops.attention.hopper.pipeline import Rows
from gqa_kernels.ops.attention.hopper.tiles import block_of_step
from gqa_kernels.primitives.packed import bounds, find


class Lengths(NamedTuple):
    """Those of a packed sequence, as `Sizes` has them for all."""

    seq_len_q: Any
    seq_len_kv: Any
    num_heads: Any


class PackedBlock(NamedTuple):
    """A `Block` of a packed sequence."""

    exists: Any
    batch: Any
    head: Any
    first_row: Any  # of the sequence
    step: Any
    queries: Any  # `Rows` of the sequence
    keys: Any


@gluon.jit
def _packed_block(step, sizes, options, NUM_ROWS: gl.constexpr):
    block = block_of_step(step, sizes, NUM_ROWS)
    count = options.num_sequences
    sequence, number = find(
        options.cu_seqlens_q, count, sizes.seq_len_q, block.first_row // NUM_ROWS, NUM_ROWS
    )
    first, length = bounds(options.cu_seqlens_q, sequence, count, sizes.seq_len_q, sizes.seq_len_q)
    first_key, num_keys = bounds(options.cu_seqlens_kv, sequence, count, sizes.seq_len_kv, 0)
    return PackedBlock(
        block.exists,
        block.batch,
        block.head,
        number * NUM_ROWS,
        step,
        Rows(first.to(gl.int32), length),
        Rows(first_key.to(gl.int32), num_keys),
    )


@gluon.jit
def first_block(index, sizes, options, NUM_ROWS: gl.constexpr):
    """The first block of this program that has rows; its index is 0."""
    if options.cu_seqlens_q is None:
        return block_of_step(index, sizes, NUM_ROWS)
    else:
        return _with_rows(_packed_block(index, sizes, options, NUM_ROWS), sizes, options, NUM_ROWS)


@gluon.jit
def next_block(block, index, sizes, options, NUM_ROWS: gl.constexpr):
    """The block after this one, which is the `index`-th of this program that has rows."""
    if options.cu_seqlens_q is None:
        return block_of_step(index, sizes, NUM_ROWS)
    else:
        after = _packed_block(block.step + 1, sizes, options, NUM_ROWS)
        return _with_rows(after, sizes, options, NUM_ROWS)


@gluon.jit
def _with_rows(block, sizes, options, NUM_ROWS: gl.constexpr):
    """The first block with rows from this one on."""
    while block.exists & (block.first_row >= block.queries.length):
        block = _packed_block(block.step + 1, sizes, options, NUM_ROWS)
    return block


@gluon.jit
def rows_of(block, options):
    """(queries, keys) as `pipeline.corner` takes them."""
    if options.cu_seqlens_q is None:
        return block.batch, block.batch
    else:
        return block.queries, block.keys


@gluon.jit
def lengths_of(block, sizes, options):
    """The sizes of the block's sequence."""
    if options.cu_seqlens_q is None:
        return sizes
    else:
        return Lengths(block.queries.length, block.keys.length, sizes.num_heads)


@gluon.jit
def at_sequence(pointer, block, options, row_size):
    """The pointer, moved to the first row of a packed sequence; a row has row_size elements."""
    if options.cu_seqlens_q is not None:
        pointer += block.queries.first.to(gl.int64) * row_size
    return pointer
