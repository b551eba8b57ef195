"""Finds the rows that a program of an attention kernel works on.

Sequences either all have the same length, one per batch entry, or are packed one after another
with their bounds in cu_seqlens. If they are packed, a program finds its sequence on the device: the
host knows only the total number of rows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.primitives import packed
from gqa_kernels.runtime import layout


class Work(NamedTuple):
    """What a program owns: a block of rows, queries or keys, of one head of one sequence. "Other"
    rows are the sequence's keys if the program owns queries, and the reverse."""

    sequence: Any
    batch: Any  # the batch entry; 0 for packed sequences
    head: Any
    block: Any  # index of the block within the sequence
    first_row: Any  # of the sequence
    num_rows: Any
    first_other_row: Any
    num_other_rows: Any


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
    """Returns the work of this program.

    num_rows and num_rows_other count the rows of one batch entry. Packed sequences are in batch
    entry 0; the rows after the last one count as a sequence without other rows.
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
        sequence, block = packed.find(
            cu_seqlens_ptr, num_sequences, num_rows, program % num_blocks, BLOCK
        )
        first, length = packed.bounds(cu_seqlens_ptr, sequence, num_sequences, num_rows, num_rows)
        first_other, length_other = packed.bounds(
            cu_seqlens_other_ptr, sequence, num_sequences, num_rows_other, 0
        )
        sequence = tl.minimum(
            sequence, num_sequences - 1
        )  # tensors with one entry per sequence end there
        return Work(sequence, program * 0, head, block, first, length, first_other, length_other)


def num_blocks(num_rows: int, num_sequences: int | None, block: int) -> int:
    """The number of programs per head and batch entry that cover the rows, which are packed if
    num_sequences is given."""
    if num_sequences is None:
        return layout.cdiv(num_rows, block)
    return packed.num_blocks(num_rows, num_sequences, block)
