"""The keys and values of the tokens that a batch of sequences has seen."""

import copy
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama2.config import ModelConfig

# What a cache stores in, by the names that a command line has for it; None: the model's dtype.
CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


class KeyValues(NamedTuple):
    """What a cache stores, of all layers or of one.

    Attributes:
        keys, values: `[num_layers, …, num_kv_heads, head_dim]`, two dimensions in place of the
            dots: one entry per key/value head, never expanded to the query heads.
        k_scale, v_scale: float32 `[num_layers, …, num_kv_heads]` where keys and values are
            quantised, float8_e4m3fn or int8: a key is its entry times its scale. Otherwise None.
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
        """Of all layers of a model, with `shape` in place of the dots."""
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
        """What each layer has of it."""
        return (self.map(itemgetter(layer)) for layer in range(len(self.keys)))

    def gather(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of one layer at `slots`, each `[len(slots), num_kv_heads,
        head_dim]`, in a dtype that they are rounded to once."""
        keys, values, *scales = self.map(lambda x: x.flatten(0, 1)[slots])
        return tuple(
            x if scale is None else (x.float() * scale[..., None]).to(dtype)
            for x, scale in zip((keys, values), scales, strict=True)
        )


class CacheStep(NamedTuple):
    """Where one call's new tokens go in a cache, and what they attend to; the same for all layers.

    Attributes:
        stored: of all layers; slots count through its two dimensions after the layers'.
        positions: int `[batch, seq_len]` in their sequences.
        slots: int64 `[batch, seq_len]`; −1 for what is not to be written.
        seq_lens: int `[batch]`, the new tokens included; None where sequences begin here, so that
            the new tokens are all there is to attend to.
        block_table: int32 `[batch, max_pages]` of a paged cache, otherwise None.
        context: int64 `[num_tokens]`: the slots of all tokens of the only sequence, the new ones
            included, where these are more than `decode_attention` takes.
    """

    stored: KeyValues
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor | None
    block_table: Tensor | None = None
    context: Tensor | None = None

    def of_layers(self) -> "Iterator[CacheStep]":
        """Returns the same with what is stored of each layer."""
        return (self._replace(stored=stored) for stored in self.stored.of_layers())


class Cache(Protocol):
    """What `Llama2` asks of a cache: once before its layers, once after them."""

    stored: KeyValues

    def reserve(self, batch: int, num_tokens: int) -> CacheStep: ...

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None: ...


class Stored:
    """What holds `stored`, and gives its keys and values by their own names too."""

    stored: KeyValues

    @property
    def keys(self) -> Tensor:
        return self.stored.keys

    @property
    def values(self) -> Tensor:
        return self.stored.values


class KVCache(Stored):
    """Contiguous key/value cache with a length per sequence.

    `stored` is `[num_layers, batch, capacity, …]`, `seq_lens` int32 `[batch]` on the device; what
    lies beyond a sequence's length is never read.

    Args:
        dtype: the model's; or float8_e4m3fn or int8, which round each head of a token by a scale of
            its own. Tokens of a first call attend to each other as they are, later ones to what the
            cache holds of them.
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
        self.stored = KeyValues.zeros(config, (batch, capacity), dtype, device)
        self.capacity = capacity
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.num_written = 0  # on the host: an upper bound of seq_lens, known without a sync

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the next tokens of every sequence.

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
        """Returns the first `batch` sequences, to be begun anew, as a cache in the same memory."""
        part = copy.copy(self)
        part.stored = self.stored.map(lambda x: x[:, :batch])
        part.seq_lens = self.seq_lens[:batch].zero_()
        part.num_written = 0
        return part

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Counts the tokens just written; `valid` int `[batch]` when rows were right-padded."""
        self.num_written += num_tokens
        self.seq_lens += num_tokens if valid is None else valid.to(self.seq_lens.dtype)
