"""A paged key/value cache, in which sequences with the same prefix share pages.

Token t of a sequence is in page `block_table[row, t // page_size]` at t % page_size. Kwon et al.
2023, arXiv:2309.06180.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llama2.cache.kv_cache import CacheStep, KeyValues, Stored
from llama2.cache.page_pool import PagePool, page_digests
from llama2.cache.transfer import to_device
from llama2.config import ModelConfig


@dataclass
class _Sequence:
    pages: list[int]  # enough for all tokens
    digests: list[bytes] = field(default_factory=list)  # of the full pages that have been written


class PagedKVCache(Stored):
    """Key/value cache of up to `max_batch` sequences in pages of `page_size` tokens.

    A sequence has a row from `admit` or `fork` until `free`. Its tokens are pending until a batch
    with them has gone through the model:

        row = cache.admit(prompt)
        batch = cache.prefill(row)
        states = model.hidden_states(batch.tokens, batch)
        cache.extend(row, [next_token])
        batch = cache.decode([row])
        states = model.hidden_states(batch.tokens, batch)[row]
        …

    Methods raise ValueError for a row that is not in use. A row may also `grow` by a token whose id
    is so far only on the device; `tell` passes the id to the cache later.

    Forks share pages, and so do sequences with the same prefix, as far as it fills pages. A shared
    page is copied before a sequence writes to it. Full pages of freed sequences are reused until
    pages run out; the least recently used is dropped first. Reuse needs one model with unchanged
    weights: `serve` checks that by `computed_with`; other callers must call `forget` after a
    change.

    All bookkeeping is on the host and never waits for the device, which works in order.

    Attributes:
        stored: `[num_layers, num_pages, page_size, …]`.
        block_table: int32 `[max_batch, max_pages]` on the device; −1 for unused entries.
        seq_lens: int32 `[max_batch]` on the device: the lengths in the latest batch of `decode`,
            pending tokens included; 0 for rows that are not in it.
    Args:
        dtype: as for `KVCache`.
    Raises:
        ValueError: a size is below 1, or page_size is not a power of two.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int = 16,
        max_batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size: expected a power of two; got {page_size}")
        for name, size in (("max_batch", max_batch), ("num_pages", num_pages)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1; got {size}")
        self.page_size, self.num_pages, self.max_batch = page_size, num_pages, max_batch
        self.max_seq_len = min(config.max_seq_len, num_pages * page_size)
        self.stored = KeyValues.zeros(config, (num_pages, page_size), dtype, device)
        self._table = np.full((max_batch, self.pages_for(self.max_seq_len)), -1, dtype=np.int32)
        self.block_table = torch.full(self._table.shape, -1, dtype=torch.int32, device=device)
        self._table_is_sent = True  # whether block_table on the device is up to date
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, _Sequence] = {}
        self._ids = np.zeros((max_batch, self.max_seq_len), dtype=np.int64)
        self._lengths = np.zeros(max_batch, dtype=np.int64)  # pending tokens included
        self._num_known = np.zeros(max_batch, dtype=np.int64)  # tokens with ids known here
        self._num_cached = np.zeros(max_batch, dtype=np.int64)  # tokens that have been written
        self._batch: PagedBatch | None = None  # the latest one, until rows change
        self._config: ModelConfig | None = None  # with _weights: the model that fills the cache
        self._weights: Tensor | None = None

    @property
    def num_free_pages(self) -> int:
        """Pages that can be taken, including those whose contents would be dropped."""
        return self._pool.num_free

    @property
    def num_free_rows(self) -> int:
        return self.max_batch - len(self._sequences)

    def num_tokens(self, row: int) -> int:
        """Returns the number of tokens of a sequence, pending ones included."""
        self._sequence(row)
        return int(self._lengths[row])

    def num_pending(self, row: int) -> int:
        """Returns the number of tokens of a sequence that have not gone through the model."""
        return self.num_tokens(row) - int(self._num_cached[row])

    def pages_for(self, num_tokens: int) -> int:
        """Returns the number of pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.page_size)

    def pages_to_admit(self, tokens: Sequence[int]) -> int:
        """Returns how many free pages `admit` would take."""
        _, shared = self._shared(tokens)
        return self.pages_for(len(tokens)) - len(shared) + self._pool.num_taken(shared)

    def admit(self, tokens: Sequence[int]) -> int:
        """Returns a row for a new sequence. Its tokens are pending, except those in shared pages;
        the last token is always pending, as its output is needed.

        Raises:
            ValueError: there are no tokens or more than `max_seq_len`, or no row is free.
            OutOfPages: too few are free. Nothing was changed.
        """
        if not 1 <= len(tokens) <= self.max_seq_len:
            raise ValueError(f"tokens: expected from 1 to {self.max_seq_len}; got {len(tokens)}")
        row = self._free_row()
        digests, shared = self._shared(tokens)
        self._pool.refer(shared)  # first, so that `take` cannot return them
        try:
            pages = [*shared, *self._pool.take(self.pages_for(len(tokens)) - len(shared))]
        except Exception:
            self._pool.release(shared)
            raise
        self._add(row, _Sequence(pages, digests), tokens, len(shared) * self.page_size)
        return row

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Adds pending tokens to a sequence, and pages if needed.

        Raises:
            ValueError: more than `max_seq_len` tokens in all.
            OutOfPages: too few are free. Nothing was changed.
        """
        self._check_told(row)
        length = self._lengths[row]
        self._make_room(np.array([row]), len(tokens))
        self._ids[row, length : self._lengths[row]] = tokens
        self._num_known[row] = self._lengths[row]

    def grow(self, rows: Sequence[int] | np.ndarray) -> None:
        """Adds to each of `rows` a pending token whose id is only on the device, and pages if
        needed. Until `tell` is called, only `decode` and `free` may be called for these rows.

        Raises:
            ValueError: a sequence already has `max_seq_len` tokens.
            OutOfPages: too few are free. Nothing was changed.
        """
        self._make_room(self._rows(rows), 1)

    def tell(self, rows: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> None:
        """Passes the ids of the tokens by which `rows` have grown, one per row.

        Raises:
            ValueError: all tokens of a row are known.
        """
        rows = np.asarray(rows, dtype=np.int64)
        known = self._num_known[rows]
        if (known >= self._lengths[rows]).any():
            raise ValueError(f"rows: expected rows that have grown; got {rows.tolist()}")
        self._ids[rows, known] = tokens
        self._num_known[rows] = known = known + 1
        for row in rows[known % self.page_size == 0].tolist():
            self._name_pages(row)

    def fork(self, row: int) -> int:
        """Returns a row for a second sequence with all tokens of `row`, which shares all its pages.

        Raises:
            ValueError: `row` has pending tokens, or no row is free.
        """
        self._check_told(row)
        parent = self._sequences[row]
        length = self._lengths[row]
        if num_pending := length - self._num_cached[row]:
            raise ValueError(f"row: expected no pending tokens; got {num_pending}")
        child = self._free_row()
        self._pool.refer(parent.pages)
        copy = _Sequence(list(parent.pages), list(parent.digests))
        self._add(child, copy, self._ids[row, :length], length)
        return child

    def free(self, row: int) -> None:
        """Ends a sequence, with or without pending tokens."""
        self._pool.release(self._sequence(row).pages)
        del self._sequences[row]
        self._table[row], self._table_is_sent = -1, False
        self._lengths[row] = self._num_known[row] = self._num_cached[row] = 0
        self._batch = None

    def forget(self) -> None:
        """Stops the reuse of written pages: weights changed, or logits were not finite."""
        self._pool.forget()

    def computed_with(self, config: ModelConfig, weights: Tensor) -> None:
        """Declares the model that fills the cache, by configuration and fingerprint of its weights;
        drops another model's contents. Waits for the device if there are contents."""
        if self._pool.num_named and (
            self._config != config or not torch.equal(self._weights, weights)
        ):
            self.forget()
        self._config, self._weights = config, weights

    def prefill(self, row: int, most: int | None = None) -> "PagedBatch":
        """Returns the pending tokens of one sequence, or the first `most` of them: `[1, count]`.

        Raises:
            ValueError: there are none, or `most` is below 1.
        """
        if most is not None and most < 1:
            raise ValueError(f"most: expected at least 1; got {most}")
        count = self.num_pending(row)
        return PagedBatch(self, [row], count if most is None else min(count, most))

    def decode(self, rows: Sequence[int]) -> "PagedBatch":
        """Returns the pending tokens of `rows`, any number of each: `[max_batch, most pending]`.

        The tokens are right-aligned; padding before them, and rows that are not requested, are not
        written, and their states are meaningless.

        Raises:
            ValueError: there are no pending tokens.
        """
        return PagedBatch(self, rows)

    def _shared(self, tokens: Sequence[int]) -> tuple[list[bytes], list[int]]:
        """Returns digests and pages of written content that is a prefix of `tokens[:-1]`."""
        digests = list(page_digests(tokens[:-1], self.page_size))
        pages = self._pool.find(digests)
        return digests[: len(pages)], pages

    def _sequence(self, row: int) -> _Sequence:
        if row not in self._sequences:
            raise ValueError(f"row: expected one of {sorted(self._sequences)}; got {row!r}")
        return self._sequences[row]

    def _free_row(self) -> int:
        if not self.num_free_rows:
            raise ValueError(f"max_batch: expected a free row; got {self.max_batch} sequences")
        return next(row for row in range(self.max_batch) if row not in self._sequences)

    def _add(self, row: int, sequence: _Sequence, tokens: Sequence[int], num_cached: int) -> None:
        self._sequences[row] = sequence
        self._table[row, : len(sequence.pages)] = sequence.pages
        self._table_is_sent = False
        self._ids[row, : len(tokens)] = tokens
        self._lengths[row] = self._num_known[row] = len(tokens)
        self._num_cached[row] = num_cached

    def _rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        for row in set(rows.tolist()) - self._sequences.keys():
            self._sequence(row)
        return rows

    def _check_told(self, row: int) -> None:
        self._sequence(row)
        if untold := self._lengths[row] - self._num_known[row]:
            raise ValueError(f"row: expected one with known tokens; got {row}, {untold} unknown")

    def _make_room(self, rows: np.ndarray, count: int) -> None:
        """Adds `count` pending tokens to each row and takes pages for them; first copies a row's
        last page if the row would write to it and other sequences share it.

        Raises:
            ValueError, OutOfPages: a row or the pool is full. Nothing was changed.
        """
        lengths = self._lengths[rows]
        left = self.max_seq_len - max(lengths.tolist(), default=0)
        if count > left:
            raise ValueError(f"tokens: expected at most {left} more; got {count}")
        missing = self.pages_for(lengths + count) - self.pages_for(lengths)
        last = self._table[rows, (lengths - 1) // self.page_size]
        written = (lengths % self.page_size * count).nonzero()[0]
        copying = [rows[written[index]] for index in self._pool.shared(last[written])]
        new = self._pool.take(sum(missing.tolist()) + len(copying))
        self._table_is_sent &= not new
        for row in copying:
            pages = self._sequences[row].pages
            shared, pages[-1] = pages[-1], new.pop()
            self._table[row, len(pages) - 1] = pages[-1]
            for stored in self.stored:
                if stored is not None:
                    stored[:, pages[-1]] = stored[:, shared]
            self._pool.release([shared])
        for index in missing.nonzero()[0].tolist():
            pages = self._sequences[rows[index]].pages
            first = len(pages)
            pages += [new.pop() for _ in range(missing[index])]
            self._table[rows[index], first : len(pages)] = pages[first:]
        self._lengths[rows] = lengths + count
        self._batch = None

    def _slots(self, rows: int | np.ndarray, positions: np.ndarray) -> np.ndarray:
        pages = self._table[rows, positions // self.page_size].astype(np.int64)
        return pages * self.page_size + positions % self.page_size

    def _name_pages(self, row: int) -> None:
        """Names full pages whose entries are written and whose ids are known."""
        sequence = self._sequences[row]
        done = len(sequence.digests)
        num_ready = min(int(self._num_cached[row]), int(self._num_known[row]))
        tokens = self._ids[row, done * self.page_size : num_ready]
        before = sequence.digests[-1] if done else b""
        sequence.digests += page_digests(tokens, self.page_size, before)
        for page, digest in zip(sequence.pages[done:], sequence.digests[done:], strict=False):
            self._pool.name(page, digest)


class PagedBatch:
    """The pending tokens of some rows, or the first `count` of one; the cache argument of one call
    of `Llama2`."""

    def __init__(
        self, cache: PagedKVCache, rows: Sequence[int] | np.ndarray, count: int | None = None
    ) -> None:
        self.stored, self._cache = cache.stored, cache
        self._rows = rows = cache._rows(rows)
        num_cached = cache._num_cached[rows]
        self._ends = ends = cache._lengths[rows] if count is None else num_cached + count
        self._num_new = ends - num_cached
        width = max(self._num_new.tolist(), default=0)
        if width == 0:
            raise ValueError("rows: expected at least 1 pending token; got 0")
        self._places = rows if count is None else np.zeros(1, dtype=np.int64)  # in the batch
        self._shape = (cache.max_batch if count is None else 1, width)
        ago = np.arange(width, 0, -1)  # tokens are right-aligned
        is_new = ago <= self._num_new[:, None]
        at = np.where(is_new, ends[:, None] - ago, 0)
        new = np.zeros((2, *self._shape), dtype=np.int64)
        new[1] = -1
        new[0, self._places] = at
        new[1, self._places] = np.where(is_new, cache._slots(rows[:, None], at), -1)
        device = cache.seq_lens.device
        self.positions_and_slots = places = to_device(new, device)
        if count is None:
            lengths = np.zeros(cache.max_batch, dtype=np.int32)
            lengths[rows] = ends
            cache.seq_lens.copy_(to_device(lengths, device))
            if not cache._table_is_sent:
                cache.block_table.copy_(to_device(cache._table, device))
                cache._table_is_sent = True
            seq_lens, table = cache.seq_lens, cache.block_table
        else:  # in new tensors, as kernels are compiled for the alignment of addresses
            seq_lens = to_device(ends.astype(np.int32), device) if num_cached[0] else None
            table = to_device(cache._table[rows], device)
        self._step = CacheStep(self.stored, *places, seq_lens, table)
        cache._batch = self

    @functools.cached_property
    def tokens(self) -> Tensor:
        """The tokens to pass to the model, int64 `[batch, seq_len]` on the device.

        Raises:
            ValueError: a row has grown by a token whose id `tell` has not given.
        """
        tokens = np.zeros(self._shape, dtype=np.int64)
        where = zip(self._rows, self._places, self._ends, self._num_new, strict=True)
        for row, place, end, count in where:
            self._cache._check_told(int(row))
            tokens[place, len(tokens[0]) - count :] = self._cache._ids[row, end - count : end]
        return to_device(tokens, self._cache.seq_lens.device)

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step of these tokens.

        Raises:
            ValueError: the shape is not that of `tokens`; or the cache has since extended or freed
                a sequence or made another batch, which changes lengths and block table on the
                device.
        """
        shape, got = list(self._shape), [batch, num_tokens]
        if got != shape:
            raise ValueError(f"tokens: expected those of the batch, {shape}; got {got}")
        if self._cache._batch is not self:
            raise ValueError("cache: expected the latest batch, once; got an older or used one")
        return self._step

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Records that the tokens have been written and are no longer pending."""
        cache, rows, ends = self._cache, self._rows, self._ends
        cache._batch = None
        cache._num_cached[rows] = ends
        for row in rows[cache._num_known[rows] >= ends].tolist():
            cache._name_pages(row)
