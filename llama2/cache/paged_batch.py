"""The tokens of one call of `Llama2` on a `PagedKVCache`."""

import numpy as np
from torch import Tensor

from llama2.cache.kv_cache import CacheStep, Decoding
from llama2.cache.paged_sequences import PagedSequences
from llama2.cache.transfer import to_device


class PagedBatch:
    """The first pending tokens of some rows; the cache argument of one call of `Llama2`.

    Attributes:
        stored: the tensors of the cache.
        rows: int64 `[num_rows]` on the host.
        last: int64 `[num_rows]` on the host, the index of each row's last token in the flattened
            tokens.
        positions_and_slots: int64 `[2, batch, seq_len]` on the device, as in `CacheStep`.
    """

    def __init__(
        self,
        cache: PagedSequences,
        rows: np.ndarray,
        counts: np.ndarray,
        shape: tuple[int, int],
        last: np.ndarray,
    ) -> None:
        """Makes a batch of `counts` tokens of `rows`, still without its step. The tokens of a row
        lie side by side in `shape`; all others are padding."""
        self.stored, self.rows, self.last = cache.stored, rows, last
        self._cache, self._shape = cache, shape
        self._ends = cache._num_cached[rows] + counts
        self._rows_of_tokens, self._positions, self._places = rows, self._ends - 1, last
        if (counts != 1).any():
            before_last = np.repeat(counts.cumsum() - 1, counts) - np.arange(counts.sum())
            self._rows_of_tokens = np.repeat(rows, counts)
            self._positions = np.repeat(self._positions, counts) - before_last
            self._places = np.repeat(last, counts) - before_last
        new = np.zeros((2, shape[0] * shape[1]), dtype=np.int64)
        new[1] = -1
        slots = cache._slots(self._rows_of_tokens, self._positions)
        new[:, self._places] = self._positions, slots
        self.positions_and_slots = to_device(new.reshape(2, *shape), cache.seq_lens.device)
        cache._batch = self

    @classmethod
    def padded(cls, cache: PagedSequences, rows: np.ndarray) -> "PagedBatch":
        """See `PagedKVCache.decode`."""
        counts = cache._lengths[rows] - cache._num_cached[rows]
        width = max(counts.tolist(), default=0)
        if width == 0:
            raise ValueError("rows: expected at least 1 pending token; got 0")
        batch = cls(cache, rows, counts, (cache.max_batch, width), (rows + 1) * width - 1)
        device = cache.seq_lens.device
        lengths = np.zeros(cache.max_batch, dtype=np.int32)
        lengths[rows] = batch._ends
        cache.seq_lens.copy_(to_device(lengths, device))
        if not cache._table_is_sent:
            cache.block_table.copy_(to_device(cache._table, device))
            cache._table_is_sent = True
        batch._set_step(cache.seq_lens, cache.block_table)
        return batch

    @classmethod
    def packed(
        cls, cache: PagedSequences, row: int, count: int, decoding: np.ndarray
    ) -> "PagedBatch":
        """See `PagedKVCache.prefill`."""
        pending = cache._lengths[decoding] - cache._num_cached[decoding]
        if (pending != 1).any() or len({row, *decoding.tolist()}) <= len(decoding):
            raise ValueError(
                f"decoding: expected different rows but {row}, with 1 pending token each; "
                f"got rows {decoding.tolist()} with {pending.tolist()}"
            )
        rows = np.append(decoding, row)
        counts = np.append(pending, count)
        last = counts.cumsum() - 1
        batch = cls(cache, rows, counts, (1, int(last[-1]) + 1), last)

        # In new tensors, as kernels are compiled for the alignment of addresses.
        def sent(values: np.ndarray) -> Tensor:
            return to_device(values.astype(np.int32), cache.seq_lens.device)

        lengths, table = batch._ends, cache._table[rows]
        if not len(decoding):
            begins = lengths[0] == count
            batch._set_step(None if begins else sent(lengths), sent(table))
            return batch
        bounds = sent(np.array([0, count]))
        others = Decoding(sent(lengths[:-1]), sent(table[:-1]))
        batch._set_step(sent(lengths[-1:]), sent(table[-1:]), bounds, others)
        return batch

    def _set_step(self, *where: Tensor | Decoding | None) -> None:
        self._step = CacheStep(self.stored, *self.positions_and_slots, *where)

    @property
    def tokens(self) -> Tensor:
        """The tokens to pass to the model, int64 `[batch, seq_len]` on the device.

        Raises:
            ValueError: a row has grown by a token whose id `tell` has not given.
        """
        for row in self.rows.tolist():
            self._cache._check_told(row)
        return self._known_tokens()

    def tokens_with(self, latest: Tensor) -> Tensor:
        """Returns `tokens` where the last token of each row that has grown is `latest[row]`, whose
        ids `tell` need not have given.

        Args:
            latest: int64 `[max_batch]` on the device.
        """
        cache, tokens = self._cache, self._known_tokens()
        grown = cache._num_known[self.rows] < self._ends
        if grown.any():
            rows, last = to_device(np.stack([self.rows, self.last])[:, grown], tokens.device)
            tokens.view(-1)[last] = latest[rows]
        return tokens

    def _known_tokens(self) -> Tensor:
        ids = np.zeros(self._shape, dtype=np.int64)
        ids.reshape(-1)[self._places] = self._cache._ids[self._rows_of_tokens, self._positions]
        return to_device(ids, self._cache.seq_lens.device)

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
        cache, rows, ends = self._cache, self.rows, self._ends
        cache._batch = None
        cache._num_cached[rows] = ends
        for row in rows[cache._num_known[rows] >= ends].tolist():
            cache._name_pages(row)
