"""The keys and values of the tokens that a batch of sequences has seen."""

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama2.config import ModelConfig


@dataclass(frozen=True)
class CacheStep:
    """Where one call's new tokens go in a cache, and what they attend to; the same for all layers.

    Attributes:
        keys, values: of all layers, `[num_layers, …, num_kv_heads, head_dim]`: two dimensions in
            place of the dots, which slots count through.
        positions: int `[batch, seq_len]` in their sequences.
        slots: int64 `[batch, seq_len]`; −1 for what is not to be written.
        seq_lens: int `[batch]`, the new tokens included; None where sequences begin here, so that
            the new tokens are all there is to attend to.
        block_table: int32 `[batch, max_pages]` of a paged cache, otherwise None.
        context: int64 `[num_tokens]`: the slots of all tokens of the only sequence, the new ones
            included, where these are more than `decode_attention` takes.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor | None
    block_table: Tensor | None = None
    context: Tensor | None = None


class Cache(Protocol):
    """What `Llama2` asks of a cache: once before its layers, once after them."""

    keys: Tensor
    values: Tensor

    def reserve(self, batch: int, num_tokens: int) -> CacheStep: ...

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None: ...


class KVCache:
    """Contiguous key/value cache with a length per sequence.

    `keys` and `values` are `[num_layers, batch, capacity, num_kv_heads, head_dim]`: one entry per
    key/value head, never expanded to the query heads. `seq_lens` is int32 `[batch]` on the device;
    what lies beyond a sequence's length is never read.

    Raises:
        ValueError: `capacity` exceeds the model's `max_seq_len`, whose rotary table ends there.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if not 0 < capacity <= config.max_seq_len:
            raise ValueError(
                f"capacity: expected 1 to max_seq_len ({config.max_seq_len}); got {capacity}"
            )
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.num_written = 0  # on the host: an upper bound of seq_lens, known without a sync

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """The next tokens of every sequence.

        Raises:
            ValueError: the cache is for another batch, or cannot hold that many more tokens.
                Nothing has been written.
        """
        if batch != len(self.seq_lens):
            raise ValueError(
                f"tokens: expected the cache's batch of {len(self.seq_lens)}; got {batch}"
            )
        if self.num_written + num_tokens > self.capacity:
            raise ValueError(
                f"tokens: expected at most {self.capacity - self.num_written} more in a cache of "
                f"capacity {self.capacity}; got {num_tokens}"
            )
        device = self.seq_lens.device
        new = torch.arange(num_tokens, dtype=torch.int32, device=device)
        positions = self.seq_lens[:, None] + new
        slots = torch.arange(batch, device=device)[:, None] * self.capacity + positions
        seq_lens = None if self.num_written == 0 else self.seq_lens + num_tokens
        return self.step(positions, slots, seq_lens)

    def step(self, positions: Tensor, slots: Tensor, seq_lens: Tensor | None) -> CacheStep:
        return CacheStep(self.keys, self.values, positions, slots, seq_lens)

    def first(self, batch: int) -> "KVCache":
        """The first `batch` sequences, to be begun anew, as a cache in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, :batch], self.values[:, :batch]
        part.seq_lens = self.seq_lens[:batch].zero_()
        part.num_written = 0
        return part

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Counts the tokens just written; `valid` int `[batch]` when rows were right-padded."""
        self.num_written += num_tokens
        self.seq_lens += num_tokens if valid is None else valid.to(self.seq_lens.dtype)
