"""Key/value caches that the kernels cannot address as they are, as pages that they can.

A cache is `[num_rows, size, nheads_k, headdim]`; a row holds a page, or all entries of a sequence.
An integer tensor (batch, rows_each) names the rows of each sequence, in the order of its entries.
The kernels address pages of a power of two entries through a block table. Rows of another size,
caches of which a batch uses some rows, and sequences that begin in the middle of a row are all
pages of fewer entries, down to one.
"""

import torch
from torch import Tensor

_MOST_PER_PAGE = 256  # the most entries in a page that is a part of a row


def addressed(
    k_cache: Tensor, v_cache: Tensor, rows: Tensor, *, first: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (k, v, block_table): the caches as pages of a power of two entries, and the pages of
    the sequences.

    The pages are views. Only caches whose rows are no whole number of entries apart in memory, or
    not the same number in both, are copied.

    Args:
        rows: int32 or int64 (batch, rows_each); one that is not in the caches becomes pages that
            are not.
        first: int64 (batch,): which entry of its rows a sequence begins with, from 0 to rows_each ·
            size. The pages then hold one entry each; those after its last entry are not to be
            used.
    Raises:
        NotImplementedError: more pages than int32 can number.
    """
    num_rows, size = k_cache.shape[:2]
    apart = _entries_apart(k_cache)
    if apart is None or apart != _entries_apart(v_cache):
        k_cache, v_cache = (torch.clone(x, memory_format=torch.contiguous_format)
                            for x in (k_cache, v_cache))  # fmt: skip
        apart = size
    page_size = 1
    if first is None and size:
        lowest = size | apart  # its lowest bit is the largest power of two that divides both
        page_size = min(lowest & -lowest, _MOST_PER_PAGE)
    num_pages = ((num_rows - 1) * apart + size) // page_size if k_cache.numel() else 0
    if num_pages > torch.iinfo(torch.int32).max:
        raise NotImplementedError(
            f"k_cache: expected fewer than 2**31 pages of {page_size} entries; got {num_pages}"
        )
    pages = []
    for cache in (k_cache, v_cache):
        entry = cache.stride(1 if size > 1 else 0)
        strides = (page_size * entry, entry, *cache.stride()[2:])
        pages.append(cache.as_strided((num_pages, page_size, *cache.shape[2:]), strides))
    within = torch.arange(size // page_size, device=rows.device)
    table = rows.long()[..., None] * (apart // page_size) + within
    there = (rows >= 0) & (rows < num_rows)
    table = torch.where(there[..., None], table, -1).flatten(1)
    if first is not None:
        capacity = table.shape[1]
        entries = first[:, None] + torch.arange(capacity, device=rows.device)
        table = table.gather(1, entries.clamp(max=capacity - 1))
    return *pages, table.int()


def _entries_apart(cache: Tensor) -> int | None:
    """The distance of two rows in memory, in entries; None if it is no whole number."""
    num_rows, size = cache.shape[:2]
    if num_rows <= 1:
        return size
    if size <= 1:
        return 1
    row, entry = cache.stride()[:2]
    return row // entry if entry and row % entry == 0 else None
