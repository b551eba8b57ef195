"""A key/value cache in pages, which sequences share where they begin alike.

Token t of a sequence lies in page `block_table[row, t // page_size]` at t % page_size. Kwon et al.
2023, arXiv:2309.06180.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gqa_kernels.reference import MAX_NEW_TOKENS
from llama2.cache.kv_cache import CacheStep, KeyValues, Stored
from llama2.cache.page_pool import PagePool, page_digests
from llama2.config import ModelConfig


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on a device, which fetches them when it comes to it: nobody waits."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@dataclass
class _Sequence:
    tokens: list[int]
    num_cached: int  # tokens whose keys and values are in the cache; the rest are pending
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

    A row that is not in use is a ValueError wherever one is named.

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
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, _Sequence] = {}
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
        return len(self._sequence(row).tokens)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that as many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def pages_to_admit(self, tokens: Sequence[int]) -> int:
        """How many of the free pages `admit` would take."""
        _, shared = self._shared(tokens)
        return self.pages_for(len(tokens)) - len(shared) + self._pool.num_taken(shared)

    def admit(self, tokens: Sequence[int]) -> int:
        """A row for a new sequence. Its tokens are pending, but for those in pages that are shared;
        the last token always is, as what follows it is wanted.

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
        self._add(row, _Sequence(list(tokens), len(shared) * self.page_size, pages, digests))
        return row

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Adds pending tokens to a sequence, and pages where they are needed.

        Raises:
            ValueError: more than `max_seq_len` tokens in all.
            OutOfPages: too few are free. Nothing was changed.
        """
        sequence = self._sequence(row)
        total = len(sequence.tokens) + len(tokens)
        if total > self.max_seq_len:
            raise ValueError(
                f"tokens: expected at most {self.max_seq_len - len(sequence.tokens)} more; "
                f"got {len(tokens)}"
            )
        writes_to_last = len(tokens) > 0 and len(sequence.tokens) % self.page_size > 0
        copies = writes_to_last and self._pool.references(sequence.pages[-1]) > 1
        new = self._pool.take(self.pages_for(total) - len(sequence.pages) + copies)
        if copies:
            shared, sequence.pages[-1] = sequence.pages[-1], new.pop()
            for stored in self.stored:
                if stored is not None:
                    stored[:, sequence.pages[-1]] = stored[:, shared]
            self._pool.release([shared])
        self._batch = None
        sequence.pages += new
        sequence.tokens += tokens
        self._table[row, : len(sequence.pages)] = sequence.pages

    def fork(self, row: int) -> int:
        """A row for a second sequence that has all tokens of `row` and shares all of its pages.

        Raises:
            ValueError: `row` has pending tokens; no free row.
        """
        parent = self._sequence(row)
        if parent.num_cached < len(parent.tokens):
            raise ValueError(
                f"row: expected no pending tokens; got {len(parent.tokens) - parent.num_cached}"
            )
        child = self._free_row()
        self._pool.refer(parent.pages)
        copy = _Sequence(
            list(parent.tokens), parent.num_cached, list(parent.pages), list(parent.digests)
        )
        self._add(child, copy)
        return child

    def free(self, row: int) -> None:
        """Ends a sequence, whether or not it has pending tokens."""
        self._pool.release(self._sequence(row).pages)
        del self._sequences[row]
        self._table[row] = -1
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
        """The pending tokens of one sequence, any number: `[1, num_pending]`.

        Raises:
            ValueError: it has none.
        """
        self._batch = PagedBatch(self, [row], alone=True)
        return self._batch

    def decode(self, rows: Sequence[int]) -> "PagedBatch":
        """The pending tokens of `rows`, at most 16 of each: `[max_batch, most pending]`.

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

    def _add(self, row: int, sequence: _Sequence) -> None:
        self._sequences[row] = sequence
        self._table[row, : len(sequence.pages)] = sequence.pages

    def _slots(self, row: int, positions: np.ndarray) -> np.ndarray:
        pages = self._table[row, positions // self.page_size].astype(np.int64)
        return pages * self.page_size + positions % self.page_size

    def _commit(self, row: int, num_cached: int) -> None:
        """Tokens up to `num_cached` have been written: pages that they fill can be shared."""
        sequence = self._sequences[row]
        sequence.num_cached = num_cached
        done = len(sequence.digests)
        tokens = sequence.tokens[done * self.page_size : num_cached]
        before = sequence.digests[-1] if done else b""
        sequence.digests += page_digests(tokens, self.page_size, before)
        for page, digest in zip(sequence.pages[done:], sequence.digests[done:], strict=False):
            self._pool.name(page, digest)


class PagedBatch:
    """What `Llama2` takes for a cache: the pending tokens of some rows, for one call.

    Attributes:
        tokens: int64 `[batch, seq_len]` on the device, the call's tokens.
    """

    def __init__(self, cache: PagedKVCache, rows: Sequence[int], *, alone: bool) -> None:
        self.stored, self._cache = cache.stored, cache
        sequences = {row: cache._sequence(row) for row in rows}
        pending = [len(s.tokens) - s.num_cached for s in sequences.values()]
        width = max(pending, default=0)
        if width == 0 or (width > MAX_NEW_TOKENS and not alone):
            most = "" if alone else f" to {MAX_NEW_TOKENS}"
            raise ValueError(f"rows: expected 1{most} pending tokens; got {width}")
        lengths = np.zeros(cache.max_batch, dtype=np.int32)
        new = np.zeros((3, cache.max_batch, width), dtype=np.int64)
        tokens, positions, slots = new
        slots.fill(-1)
        for (row, sequence), count in zip(sequences.items(), pending, strict=True):
            lengths[row] = total = len(sequence.tokens)
            if count:
                tokens[row, -count:] = sequence.tokens[-count:]
                positions[row, -count:] = np.arange(total - count, total)
                slots[row, -count:] = cache._slots(row, positions[row, -count:])
        self._totals = {row: len(s.tokens) for row, s in sequences.items()}
        batch = slice(rows[0], rows[0] + 1) if alone else slice(None)
        device = cache.seq_lens.device
        self.tokens, positions, slots = to_device(new[:, batch], device)
        cache.seq_lens.copy_(to_device(lengths, device))
        cache.block_table.copy_(to_device(cache._table, device))
        seq_lens, context = cache.seq_lens[batch], None
        if alone and sequences[rows[0]].num_cached == 0:
            seq_lens = None
        elif width > MAX_NEW_TOKENS:
            context = to_device(cache._slots(rows[0], np.arange(lengths[rows[0]])), device)
        table = cache.block_table[batch]
        self._step = CacheStep(self.stored, positions, slots, seq_lens, table, context)

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Where the tokens go.

        Raises:
            ValueError: the call has other tokens than these, or since it was made the cache has
                extended or freed a sequence or made another batch: the lengths and the block table
                on the device are the last one's.
        """
        if (batch, num_tokens) != tuple(self.tokens.shape):
            raise ValueError(
                f"tokens: expected those of the batch, {list(self.tokens.shape)}; "
                f"got {[batch, num_tokens]}"
            )
        if self._cache._batch is not self:
            raise ValueError("cache: expected the batch that was made last, once; got another")
        return self._step

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """The tokens have been written: they are no longer pending."""
        self._cache._batch = None
        for row, num_cached in self._totals.items():
            self._cache._commit(row, num_cached)
