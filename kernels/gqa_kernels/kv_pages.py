"""Where the keys and values of a sequence lie in a cache `[page, slot, head, feature]`.

A contiguous cache is one whose page b holds all of sequence b. Pages are numbered in int64: a page
times its stride needs more than 32 bits in a cache of a few GB.
"""

import triton
import triton.language as tl


@triton.jit
def locate_keys(
    block_table_ptr,
    block_table_strides,
    batch,
    first,
    end,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(page, slot, whether there is such a key) of the keys first … first + BLOCK_N − 1.

    One page for all where a tile cannot cross a page's border: first is a multiple of BLOCK_N and
    below end, the end of the sequence or of its part. Keys from end on, and those of a page outside
    [0, num_pages), are not there.
    """
    keys = first + tl.arange(0, BLOCK_N)
    exists = keys < end
    page, slots = batch, keys
    if block_table_ptr is not None:
        block_table_ptr += batch * block_table_strides[0]
        if PAGE_SIZE >= BLOCK_N:
            page = tl.load(block_table_ptr + (first // PAGE_SIZE) * block_table_strides[1])
        else:
            ptrs = block_table_ptr + (keys // PAGE_SIZE) * block_table_strides[1]
            page = tl.load(ptrs, mask=exists, other=-1)
        page = page.to(tl.int64)
        exists = exists & (page >= 0) & (page < num_pages)
        slots = keys % PAGE_SIZE
    return page, slots, exists


@triton.jit
def load_vectors(ptr, strides, page, slots, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_N, BLOCK_D]`: the keys or values of one head, from a pointer to its first; zero
    where there is none."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = page * strides[0] + slots.to(tl.int64) * strides[1]
    mask = exists[:, None] & (columns < HEAD_DIM)
    return tl.load(ptr + rows[:, None] + columns, mask=mask, other=0.0)


@triton.jit
def load_scales(ptr, strides, page, slots, exists):
    """`[BLOCK_N]`: the scale of each key or value of one head; zero where there is none."""
    rows = page * strides[0] + slots.to(tl.int64) * strides[1]
    return tl.load(ptr + rows, mask=exists, other=0.0)
