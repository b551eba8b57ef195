"""Finds the rows that a program of an attention kernel works on.

Sequences either all have the same length, one per batch entry, or are packed one after another
with their bounds in cu_seqlens. If they are packed, a program finds its sequence on the device: the
host knows only the total number of rows.

A GPU starts the programs of a launch in the order of their ids. Under a causal mask the blocks of a
head differ in work, and a long program that starts last leaves the other SMs idle. Ids therefore
count the heads of a section first, then the blocks, then the sections: the first blocks of all
heads of a section, to which the kernels give the most work, start together. What the programs of a
section read fits the L2 cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gqa_kernels.ops.attention.call import Call
from gqa_kernels.primitives import packed
from gqa_kernels.runtime import configs, layout, target


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
    section,
    BLOCK: tl.constexpr,
):
    """Returns the work of this program.

    num_rows and num_rows_other count the rows of one batch entry. Packed sequences are in batch
    entry 0; the rows after the last one count as a sequence without other rows. A section has
    `section` heads, of any batch entries, and the last one the rest.
    """
    if cu_seqlens_ptr is None:
        num_blocks = tl.cdiv(num_rows, BLOCK)
    else:
        num_blocks = num_rows // BLOCK + num_sequences + 1
    program = tl.program_id(0)
    first_head = program // (section * num_blocks) * section
    heads_here = tl.minimum(section, tl.num_programs(0) // num_blocks - first_head)
    program -= first_head * num_blocks  # within the section
    head = first_head + program % heads_here
    block = program // heads_here
    if cu_seqlens_ptr is None:
        batch = head // num_heads
        return Work(batch, batch, head % num_heads, block, 0, num_rows, 0, num_rows_other)
    else:
        sequence, block = packed.find(cu_seqlens_ptr, num_sequences, num_rows, block, BLOCK)
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


def section_of_queries(call: Call) -> int:
    """The number of heads in a section of programs that own queries, for a prepared call."""
    if call.window_right is None:
        return 1  # the blocks of a head have equal work: one head after another
    return query_heads_in_cache(call)


def query_heads_in_cache(call: Call) -> int:
    """The number of query heads, in whole groups, whose keys and values fit the L2 cache."""
    batch, _, num_heads, _ = call.q.shape
    _, seq_len_kv, num_kv_heads, head_dim = call.k.shape
    num_bytes = 2 * seq_len_kv * head_dim * call.k.element_size()
    return _heads_in_cache(num_bytes, num_heads // num_kv_heads, batch * num_heads)


def section_of_keys(call: Call) -> int:
    """The number of key/value heads in a section of programs that own keys.

    They read queries and dout of one head of their group after another.
    """
    if call.window_right is None:
        return 1
    batch, seq_len_q, _, head_dim = call.q.shape
    num_bytes = 2 * seq_len_q * head_dim * call.q.element_size()
    return _heads_in_cache(num_bytes, 1, batch * call.k.shape[2])


def _heads_in_cache(num_bytes: int, group_size: int, num_batch_heads: int) -> int:
    """The number of heads, in whole groups, whose bytes fit the L2 cache; at least one group.

    Args:
        num_bytes: that the programs of a group read over and over.
        num_batch_heads: heads of all batch entries.
    """
    fitting = configs.section_bytes(target.current().arch) // max(1, num_bytes)
    return min(max(1, fitting) * group_size, num_batch_heads)
