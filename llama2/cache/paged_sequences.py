"""The sequences of a paged cache: their pages, lengths and token ids, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llama2.cache.kv_cache import KeyValues, Stored
from llama2.cache.page_pool import PagePool, page_digests
from llama2.config import ModelConfig


@dataclass
class _Sequence:
    pages: list[int]  # enough for all tokens
    digests: list[bytes] = field(default_factory=list)  # of the full pages that have been written


class PagedSequences(Stored):
    """The part of `PagedKVCache` that adds, extends and ends sequences."""

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
        self._batch: object = None  # the latest PagedBatch, until rows change
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
