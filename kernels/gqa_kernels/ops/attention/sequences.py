"""Which rows a program of an attention kernel works on.

Sequences either have all the same length, one per batch entry, or are packed one after another
with their bounds in cu_seqlens. Packed, a program finds its sequence on the device: nothing but the
total number of rows is known where it is launched.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.runtime import layout


class Work(NamedTuple):
    """What a program owns: a block of rows of one head of one sequence.

    Its own side is that of its rows, queries or keys; the sequence has rows on the other side too.
    """

    sequence: Any
    batch: Any  # the batch entry, of packed sequences 0
    head: Any
    block: Any  # of the sequence's rows
    first_row: Any  # of the sequence
    num_rows: Any
    first_other_row: Any
    num_other_rows: Any


@triton.jit
def _start(cu_seqlens_ptr, index, total):
    """Row at which a sequence begins, in [0, total] whatever the memory holds; the first at 0."""
    start = tl.load(cu_seqlens_ptr + index, mask=index > 0, other=0)
    return tl.minimum(tl.maximum(start, 0), total).to(tl.int32)


@triton.jit
def _bounds(cu_seqlens_ptr, sequence, num_sequences, total, rest):
    """(first row, number of rows) of a sequence; `rest` ends the one after the last."""
    first = _start(cu_seqlens_ptr, sequence, total)
    last = _start(cu_seqlens_ptr, tl.minimum(sequence + 1, num_sequences), total)
    last = tl.where(sequence < num_sequences, last, rest)
    return first.to(tl.int64), tl.maximum(last - first, 0)


@triton.jit
def _find(cu_seqlens_ptr, num_sequences, total, program, BLOCK: tl.constexpr):
    """(sequence, block) of a program: sequence b owns those from cu_seqlens[b] // BLOCK + b on,
    which are as many as its blocks or one more."""
    low = program * 0
    high = low + num_sequences
    while low < high:
        middle = (low + high + 1) // 2
        fits = _start(cu_seqlens_ptr, middle, total) // BLOCK + middle <= program
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    return low, program - _start(cu_seqlens_ptr, low, total) // BLOCK - low


@triton.jit
def locate(
    cu_seqlens_ptr,
    cu_seqlens_other_ptr,
    num_sequences,
    num_heads,
    num_rows,
    num_rows_other,
    BLOCK: tl.constexpr,
):
    """The work of this program.

    num_rows and num_rows_other are those of one batch entry. Packed sequences lie in batch entry 0;
    the rows after the last of them are a sequence that has no rows on the other side.
    """
    program = tl.program_id(0)
    if cu_seqlens_ptr is None:
        num_blocks = tl.cdiv(num_rows, BLOCK)
        batch = program // num_blocks // num_heads
        head = program // num_blocks % num_heads
        block = program % num_blocks
        return Work(batch, batch, head, block, 0, num_rows, 0, num_rows_other)
    else:
        num_blocks = num_rows // BLOCK + num_sequences + 1
        head = program // num_blocks
        sequence, block = _find(
            cu_seqlens_ptr, num_sequences, num_rows, program % num_blocks, BLOCK
        )
        first, length = _bounds(cu_seqlens_ptr, sequence, num_sequences, num_rows, num_rows)
        first_other, length_other = _bounds(
            cu_seqlens_other_ptr, sequence, num_sequences, num_rows_other, 0
        )
        sequence = tl.minimum(
            sequence, num_sequences - 1
        )  # whatever is kept per sequence ends there
        return Work(sequence, program * 0, head, block, first, length, first_other, length_other)


def num_blocks(num_rows: int, num_sequences: int | None, block: int) -> int:
    """Programs per head and batch entry that cover the rows, packed if num_sequences is given."""
    if num_sequences is None:
        return layout.cdiv(num_rows, block)
    return num_rows // block + num_sequences + 1
