"""A paged key/value cache, in which sequences with the same prefix share pages.

Token t of a sequence is in page `block_table[row, t // page_size]` at t % page_size. Kwon et al.
2023, arXiv:2309.06180.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama2.cache.paged_batch import PagedBatch
from llama2.cache.paged_sequences import PagedSequences
from llama2.config import ModelConfig


class PagedKVCache(PagedSequences):
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

    def prefill(
        self, row: int, most: int | None = None, *, decoding: Sequence[int] | np.ndarray = ()
    ) -> PagedBatch:
        """Returns the pending tokens of one sequence, or the first `most` of them, after the single
        pending tokens of the rows `decoding`: `[1, num_decoding + count]`.

        Beside other rows, the tokens attend to the entries of the cache, even if they begin their
        sequence.

        Raises:
            ValueError: there are no pending tokens, `most` is no int of at least 1, or `decoding`
                is not of different other rows with one pending token each.
        """
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"most: expected an int of at least 1; got {most!r}")
        count = self.num_pending(row)
        if count == 0:
            raise ValueError("rows: expected at least 1 pending token; got 0")
        count = count if most is None else min(count, most)
        return PagedBatch.packed(self, row, count, self._rows(decoding))

    def decode(self, rows: Sequence[int]) -> PagedBatch:
        """Returns the pending tokens of `rows`, any number of each: `[max_batch, most pending]`.

        The tokens are right-aligned; padding before them, and rows that are not requested, are not
        written, and their states are meaningless.

        Raises:
            ValueError: there are no pending tokens.
        """
        return PagedBatch.padded(self, self._rows(rows))

    def computed_with(self, config: ModelConfig, weights: Tensor) -> None:
        """Declares the model that fills the cache, by configuration and fingerprint of its weights;
        drops another model's contents. Waits for the device if there are contents."""
        if self._pool.num_named and (
            self._config != config or not torch.equal(self._weights, weights)
        ):
            self.forget()
        self._config, self._weights = config, weights
