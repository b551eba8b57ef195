"""The keys and values of the tokens that a batch of sequences has seen."""

import torch
from torch import Tensor

from llama2.config import ModelConfig


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

    def reserve(self, batch: int, num_tokens: int) -> Tensor | None:
        """Positions `[batch, num_tokens]` of the next tokens; None means 0, 1, … in every sequence.

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
        if self.num_written == 0:
            return None
        steps = torch.arange(num_tokens, dtype=torch.int32, device=self.seq_lens.device)
        return self.seq_lens[:, None] + steps

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        """Stores k and v `[batch, num_tokens, num_kv_heads, head_dim]` at `positions`."""
        if positions is None:
            self.keys[layer, :, : k.shape[1]] = k
            self.values[layer, :, : v.shape[1]] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            self.keys[layer][rows, positions.long()] = k
            self.values[layer][rows, positions.long()] = v

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Counts the tokens just written; `valid` int `[batch]` when rows were right-padded."""
        self.num_written += num_tokens
        self.seq_lens += num_tokens if valid is None else valid.to(self.seq_lens.dtype)
