"""Where the keys and values of a sequence are in a cache `[page, slot, head, feature]`.

In a contiguous cache, page b holds all of sequence b. Page numbers are int64: a page times its
stride needs more than 32 bits in a cache of a few GB.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pages(NamedTuple):
    """The pages of one sequence."""

    batch: Any
    table_ptr: Any  # of the sequence; None in a contiguous cache
    table_stride: Any
    num_pages: Any  # of the cache


class Entries(NamedTuple):
    """Where some keys are: `[BLOCK_N]` each; the page may be one scalar for all."""

    page: Any
    slots: Any
    exist: Any


class Cached(NamedTuple):
    """The cached keys, values or scales of one head."""

    ptr: Any  # to page 0, slot 0
    page_stride: Any
    slot_stride: Any


@triton.jit
def locate_keys(pages, first, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the entries of the keys first … first + BLOCK_N − 1.

    `first` is a multiple of BLOCK_N and below `end`, the end of the sequence or of its split, so
    all keys are in one page if PAGE_SIZE ≥ BLOCK_N. Keys from `end` on, and those of a page outside
    [0, num_pages), do not exist.
    """
    keys = first + tl.arange(0, BLOCK_N)
    exists = keys < end
    page, slots = pages.batch, keys
    if pages.table_ptr is not None:
        if PAGE_SIZE >= BLOCK_N:
            page = tl.load(pages.table_ptr + (first // PAGE_SIZE) * pages.table_stride)
        else:
            ptrs = pages.table_ptr + (keys // PAGE_SIZE) * pages.table_stride
            page = tl.load(ptrs, mask=exists, other=-1)
        page = page.to(tl.int64)
        exists = exists & (page >= 0) & (page < pages.num_pages)
        slots = keys % PAGE_SIZE
    return Entries(page, slots, exists)


@triton.jit
def _rows(cached, entries):
    """The offsets of the entries, `[BLOCK_N]`."""
    return entries.page * cached.page_stride + entries.slots.to(tl.int64) * cached.slot_stride


@triton.jit
def load_vectors(cached, entries, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads keys or values, `[BLOCK_N, BLOCK_D]`; 0 for entries that do not exist."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    rows = _rows(cached, entries)
    mask = entries.exist[:, None] & (columns < HEAD_DIM)
    return tl.load(cached.ptr + rows[:, None] + columns, mask=mask, other=0.0)


@triton.jit
def load_scales(cached, entries):
    """Loads the scale of each key or value, `[BLOCK_N]`; 0 for entries that do not exist."""
    return tl.load(cached.ptr + _rows(cached, entries), mask=entries.exist, other=0.0)
