"""A key/value cache in pages, which sequences share where they begin alike.

Token t of a sequence lies in page `block_table[row, t // page_size]` at t % page_size. Kwon et al.
2023, arXiv:2309.06180.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gqa_kernels.reference import MAX_NEW_TOKENS
from llama2.cache.kv_cache import CacheStep, KeyValues, Stored
from llama2.cache.page_pool import PagePool, page_digests
from llama2.cache.transfer import to_device
from llama2.config import ModelConfig


@dataclass
class _Sequence:
    pages: list[int]  # with room for all tokens
    digests: list[bytes] = field(default_factory=list)  # of the full pages that are cached


class PagedKVCache(Stored):
    """Key/value cache of up to `max_batch` sequences in pages of `page_size` tokens.

    A sequence is a row, from `admit` or `fork` until `free`. Its tokens are pending until a batch
    of it has gone through the model:

        row = cache.admit(prompt)
        batch = cache.prefill(row)
        states = model.hidden_states(batch.tokens, batch)
        cache.extend(row, [next_token])
        batch = cache.decode([row])
        states = model.hidden_states(batch.tokens, batch)[row]
        …

    Every method raises ValueError for a row that is not in use. A row may also `grow` by a token
    whose id only the device has so far; `tell` then gives its id to the cache.

    Pages are shared by sequences that begin with the same tokens, as far as these fill pages, and
    by forks. A page that others read is copied before a sequence writes to it. What a freed
    sequence leaves in full pages is found again until pages run out; the least recently used goes
    first. That is what one model left, with weights that have not changed: `serve` sees to it by
    `computed_with`; who calls a model himself has to `forget` it otherwise.

    All bookkeeping is on the host and waits for no device: what was enqueued before is done before.

    Attributes:
        stored: `[num_layers, num_pages, page_size, …]`.
        block_table: int32 `[max_batch, max_pages]` on the device; −1 where a row has no page.
        seq_lens: int32 `[max_batch]` on the device: the lengths in the last batch that was made,
            its pending tokens included; 0 for rows that were not part of it.
    Args:
        dtype: as of `KVCache`.
    Raises:
        ValueError: a size below 1, a page_size that is no power of two.
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
        self._table_is_sent = True  # to block_table
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, _Sequence] = {}
        self._ids = np.zeros((max_batch, self.max_seq_len), dtype=np.int64)
        self._lengths = np.zeros(max_batch, dtype=np.int64)  # pending tokens included
        self._num_known = np.zeros(max_batch, dtype=np.int64)  # whose ids the host knows
        self._num_cached = np.zeros(max_batch, dtype=np.int64)  # whose keys and values are written
        self._batch: PagedBatch | None = None  # the last that was made, until rows change
        self._config: ModelConfig | None = None  # of the model that fills it, with _weights
        self._weights: Tensor | None = None

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had, those included whose contents would be forgotten for it."""
        return self._pool.num_free

    @property
    def num_free_rows(self) -> int:
        return self.max_batch - len(self._sequences)

    def num_tokens(self, row: int) -> int:
        """Tokens of a sequence, pending ones included."""
        self._sequence(row)
        return int(self._lengths[row])

    def pages_for(self, num_tokens: int) -> int:
        """Pages that as many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def pages_to_admit(self, tokens: Sequence[int]) -> int:
        """Returns how many of the free pages `admit` would take."""
        _, shared = self._shared(tokens)
        return self.pages_for(len(tokens)) - len(shared) + self._pool.num_taken(shared)

    def admit(self, tokens: Sequence[int]) -> int:
        """Returns a row for a new sequence. Its tokens are pending, but for those in pages that are
        shared; the last token always is, as what follows it is wanted.

        Raises:
            ValueError: no token, or more than `max_seq_len`; no free row.
            OutOfPages: too few are free. Nothing was changed.
        """
        if not 1 <= len(tokens) <= self.max_seq_len:
            raise ValueError(f"tokens: expected 1 to {self.max_seq_len}; got {len(tokens)}")
        row = self._free_row()
        digests, shared = self._shared(tokens)
        self._pool.refer(shared)  # before others are taken, which might be these
        try:
            pages = [*shared, *self._pool.take(self.pages_for(len(tokens)) - len(shared))]
        except Exception:
            self._pool.release(shared)
            raise
        self._add(row, _Sequence(pages, digests), tokens, len(shared) * self.page_size)
        return row

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Adds pending tokens to a sequence, and pages where they are needed.

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
        """Adds to each of `rows` a pending token whose id only the device has, and pages where they
        are needed. Until `tell` has given the ids, only `decode` and `free` may be called for rows.

        Raises:
            ValueError: a sequence of `max_seq_len` tokens.
            OutOfPages: too few are free. Nothing was changed.
        """
        self._make_room(self._rows(rows), 1)

    def tell(self, rows: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> None:
        """Gives the cache the ids of the tokens by which `rows` have grown, one per row.

        Raises:
            ValueError: a row whose tokens are all known.
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
        """Returns a row for a second sequence with all tokens of `row`; it shares all its pages.

        Raises:
            ValueError: `row` has pending tokens; no free row.
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
        """Ends a sequence, whether or not it has pending tokens."""
        self._pool.release(self._sequence(row).pages)
        del self._sequences[row]
        self._table[row], self._table_is_sent = -1, False
        self._lengths[row] = self._num_known[row] = self._num_cached[row] = 0
        self._batch = None

    def forget(self) -> None:
        """No sequence finds what others left from now on: for a model whose weights have changed,
        and after logits that were not finite."""
        self._pool.forget()

    def computed_with(self, config: ModelConfig, weights: Tensor) -> None:
        """From here on a model with this configuration and with weights of this fingerprint fills
        the cache: what was filled with others is forgotten. Waits for the device if there is
        something to forget."""
        if self._pool.num_named and (
            self._config != config or not torch.equal(self._weights, weights)
        ):
            self.forget()
        self._config, self._weights = config, weights

    def prefill(self, row: int) -> "PagedBatch":
        """Returns the pending tokens of one sequence, any number: `[1, num_pending]`.

        Raises:
            ValueError: it has none.
        """
        self._batch = PagedBatch(self, [row], alone=True)
        return self._batch

    def decode(self, rows: Sequence[int]) -> "PagedBatch":
        """Returns the pending tokens of `rows`, at most 16 of each: `[max_batch, most pending]`.

        They stand at the end of their rows; what stands before them, and in rows that are not
        asked for, is written nowhere, and its states are meaningless.

        Raises:
            ValueError: no pending tokens; a row with more.
        """
        self._batch = PagedBatch(self, rows, alone=False)
        return self._batch

    def _shared(self, tokens: Sequence[int]) -> tuple[list[bytes], list[int]]:
        """Digests and pages of cached content that `tokens` begin with, without the last token."""
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
            raise ValueError(f"row: expected one that knows its tokens; got {row}, {untold} untold")

    def _make_room(self, rows: np.ndarray, count: int) -> None:
        """Adds `count` pending tokens to each row: takes pages for them, and first copies a row's
        last page if the row would write to it and other sequences read it.

        Raises:
            ValueError, OutOfPages: no room in a row, too few pages. Nothing was changed.
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
        """Makes full pages findable, once their entries are written and their ids known."""
        sequence = self._sequences[row]
        done = len(sequence.digests)
        num_ready = min(int(self._num_cached[row]), int(self._num_known[row]))
        tokens = self._ids[row, done * self.page_size : num_ready]
        before = sequence.digests[-1] if done else b""
        sequence.digests += page_digests(tokens, self.page_size, before)
        for page, digest in zip(sequence.pages[done:], sequence.digests[done:], strict=False):
            self._pool.name(page, digest)


class PagedBatch:
    """The pending tokens of some rows, for one call of `Llama2`, which takes it as its cache."""

    def __init__(
        self, cache: PagedKVCache, rows: Sequence[int] | np.ndarray, *, alone: bool
    ) -> None:
        self.stored, self._cache = cache.stored, cache
        self._rows = rows = cache._rows(rows)
        self._totals = totals = cache._lengths[rows]
        self._num_pending = totals - cache._num_cached[rows]
        width = max(self._num_pending.tolist(), default=0)
        if width == 0 or (width > MAX_NEW_TOKENS and not alone):
            most = "" if alone else f" to {MAX_NEW_TOKENS}"
            raise ValueError(f"rows: expected 1{most} pending tokens; got {width}")
        self._places = np.zeros(1, dtype=np.int64) if alone else rows  # of the rows in the batch
        self._shape = (1 if alone else cache.max_batch, width)
        ago = np.arange(width, 0, -1)  # tokens stand at the end
        is_pending = ago <= self._num_pending[:, None]
        at = np.where(is_pending, totals[:, None] - ago, 0)
        new = np.zeros((2, *self._shape), dtype=np.int64)
        new[1] = -1
        new[0, self._places] = at
        new[1, self._places] = np.where(is_pending, cache._slots(rows[:, None], at), -1)
        lengths = np.zeros(cache.max_batch, dtype=np.int32)
        lengths[rows] = totals
        device = cache.seq_lens.device
        self.positions_and_slots = places = to_device(new, device)
        cache.seq_lens.copy_(to_device(lengths, device))
        if not cache._table_is_sent:
            cache.block_table.copy_(to_device(cache._table, device))
            cache._table_is_sent = True
        seq_lens, table, context = cache.seq_lens, cache.block_table, None
        if alone:
            seq_lens, table = (x[rows[0] : rows[0] + 1] for x in (seq_lens, table))
        if alone and self._num_pending[0] == totals[0]:
            seq_lens = None
        elif width > MAX_NEW_TOKENS:
            context = to_device(cache._slots(rows[0], np.arange(totals[0])), device)
        self._step = CacheStep(self.stored, places[0], places[1], seq_lens, table, context)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """The tokens of the call: int64 `[batch, seq_len]` on the device.

        Raises:
            ValueError: a row has grown by a token whose id `tell` has not given.
        """
        tokens = np.zeros(self._shape, dtype=np.int64)
        where = zip(self._rows, self._places, self._totals, self._num_pending, strict=True)
        for row, place, total, count in where:
            self._cache._check_told(int(row))
            tokens[place, len(tokens[0]) - count :] = self._cache._ids[row, total - count : total]
        return to_device(tokens, self._cache.seq_lens.device)

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Where the tokens go.

        Raises:
            ValueError: the call has other tokens than these, or since it was made the cache has
                extended or freed a sequence or made another batch: the lengths and the block table
                on the device are the last one's.
        """
        if (batch, num_tokens) != self._shape:
            raise ValueError(
                f"tokens: expected those of the batch, {list(self._shape)}; "
                f"got {[batch, num_tokens]}"
            )
        if self._cache._batch is not self:
            raise ValueError("cache: expected the batch that was made last, once; got another")
        return self._step

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """The tokens have been written: they are no longer pending."""
        cache, rows, totals = self._cache, self._rows, self._totals
        cache._batch = None
        cache._num_cached[rows] = totals
        for row in rows[cache._num_known[rows] == totals].tolist():
            cache._name_pages(row)
