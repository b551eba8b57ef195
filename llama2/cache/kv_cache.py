"""The contiguous key/value cache of a batch of sequences."""

import copy
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama2.config import ModelConfig

# The dtypes of a cache by their names on the command line; None means the model's dtype.
CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


class KeyValues(NamedTuple):
    """The tensors of a cache, of all layers or of one.

    Attributes:
        keys, values: `[num_layers, …, num_kv_heads, head_dim]`, where the dots are two dimensions;
            one entry per key/value head, not repeated for the query heads.
        k_scale, v_scale: float32 `[num_layers, …, num_kv_heads]` if keys and values are quantised
            to float8_e4m3fn or int8: a key is its entry times its scale. Otherwise None.
    """

    keys: Tensor
    values: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KeyValues":
        """Returns zeros for all layers of a model, with `shape` in place of the dots."""
        scale_shape = (config.num_layers, *shape, config.num_kv_heads)
        keys, values = (
            torch.zeros((*scale_shape, config.head_dim), dtype=dtype, device=device)
            for _ in range(2)
        )
        if dtype not in CACHE_DTYPES.values():
            return cls(keys, values, None, None)
        return cls(
            keys,
            values,
            *(torch.zeros(scale_shape, dtype=torch.float32, device=device) for _ in range(2)),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "KeyValues":
        return KeyValues(*(None if x is None else function(x) for x in self))

    def of_layers(self) -> "Iterator[KeyValues]":
        """Yields the tensors of each layer."""
        return (self.map(itemgetter(layer)) for layer in range(len(self.keys)))


class Decoding(NamedTuple):
    """Sequences with one new token each, in a paged cache.

    Attributes:
        seq_lens: int32 `[num_sequences]`, the new tokens included.
        block_table: int32 `[num_sequences, max_pages]`.
    """

    seq_lens: Tensor
    block_table: Tensor


class CacheStep(NamedTuple):
    """Where a call writes its new tokens in a cache, and what they attend to; the same for all
    layers.

    Attributes:
        stored: the tensors of all layers; slots index the two dimensions after the layers',
            flattened.
        positions: int `[batch, seq_len]`, of the tokens in their sequences.
        slots: int64 `[batch, seq_len]`; −1 for tokens that are not written.
        seq_lens: int `[batch]`, new tokens included; None if the sequences begin with this call, so
            that the new tokens attend only to each other.
        block_table: int32 `[batch, max_pages]` for a paged cache, otherwise None.
        cu_seqlens: int32 `[batch + 1]`, the bounds of sequences that are packed in tokens
            `[1, total]`, otherwise None.
        decoding: further sequences, whose tokens precede the packed ones. `seq_lens`, `block_table`
            and `cu_seqlens` do not include them.
    """

    stored: KeyValues
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor | None
    block_table: Tensor | None = None
    cu_seqlens: Tensor | None = None
    decoding: Decoding | None = None

    def of_layers(self) -> "Iterator[CacheStep]":
        """Yields the step with the tensors of each layer."""
        return (self._replace(stored=stored) for stored in self.stored.of_layers())


class Cache(Protocol):
    """The interface through which `Llama2` uses a cache: one call before its layers, one after
    them."""

    stored: KeyValues

    def reserve(self, batch: int, num_tokens: int) -> CacheStep: ...

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None: ...


class Stored:
    """A cache with `stored` and the attributes `keys` and `values` for its tensors."""

    stored: KeyValues

    @property
    def keys(self) -> Tensor:
        return self.stored.keys

    @property
    def values(self) -> Tensor:
        return self.stored.values


class KVCache(Stored):
    """Contiguous key/value cache with a length per sequence.

    `stored` is `[num_layers, batch, capacity, …]`, `seq_lens` int32 `[batch]` on the device;
    entries beyond a sequence's length are never read.

    Args:
        dtype: the model's, or float8_e4m3fn or int8, which quantise with one scale per token and
            head. Tokens of the first call attend to each other's exact keys and values, later ones
            to the quantised ones.
    Raises:
        ValueError: `capacity` exceeds the model's `max_seq_len`, the length of its rotary table.
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
                f"capacity: expected from 1 to max_seq_len ({config.max_seq_len}); got {capacity}"
            )
        self.stored = KeyValues.zeros(config, (batch, capacity), dtype, device)
        self.capacity = capacity
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.num_written = 0  # on the host: an upper bound of seq_lens, known without a sync

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step of the next tokens of every sequence.

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
        return CacheStep(self.stored, positions, slots, seq_lens)

    def first(self, batch: int) -> "KVCache":
        """Returns an empty cache for `batch` sequences in the memory of the first `batch`
        sequences."""
        part = copy.copy(self)
        part.stored = self.stored.map(lambda x: x[:, :batch])
        part.seq_lens = self.seq_lens[:batch].zero_()
        part.num_written = 0
        return part

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Counts the tokens just written; `valid` int `[batch]` if rows were right-padded."""
        self.num_written += num_tokens
        self.seq_lens += num_tokens if valid is None else valid.to(self.seq_lens.dtype)
