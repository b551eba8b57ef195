"""Finds the rows of a program among packed sequences, whose bounds cu_seqlens are on the device.

The host knows only the total number of tokens, so it launches an upper bound of the programs that
are needed (`num_blocks`); a program finds its sequence by a binary search. A token has ROWS rows, 1
unless query heads that share keys are packed into the rows of a tile too.
"""

import triton
import triton.language as tl


@triton.jit
def _start(cu_seqlens_ptr, index, total):
    """The first token of a sequence, clamped to [0, total]; sequence 0 begins at token 0."""
    start = tl.load(cu_seqlens_ptr + index, mask=index > 0, other=0)
    return tl.minimum(tl.maximum(start, 0), total).to(tl.int32)


@triton.jit
def bounds(cu_seqlens_ptr, sequence, num_sequences, total, rest):
    """(first token, number of tokens) of a sequence; the tokens after the last sequence, up to
    `rest`, count as one more."""
    first = _start(cu_seqlens_ptr, sequence, total)
    last = _start(cu_seqlens_ptr, tl.minimum(sequence + 1, num_sequences), total)
    last = tl.where(sequence < num_sequences, last, rest)
    return first.to(tl.int64), tl.maximum(last - first, 0)


@triton.jit
def find(
    cu_seqlens_ptr, num_sequences, total, program, BLOCK: tl.constexpr, ROWS: tl.constexpr = 1
):
    """(sequence, block) of a program. Sequence b owns the programs from
    cu_seqlens[b] · ROWS // BLOCK + b on: as many as it has blocks of BLOCK rows, or one more."""
    low = program * 0
    high = low + num_sequences
    while low < high:
        middle = (low + high + 1) // 2
        fits = _start(cu_seqlens_ptr, middle, total) * ROWS // BLOCK + middle <= program
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    return low, program - _start(cu_seqlens_ptr, low, total) * ROWS // BLOCK - low


def num_blocks(num_rows: int, num_sequences: int, block: int) -> int:
    """The number of programs that cover the rows of all sequences."""
    return num_rows // block + num_sequences + 1
