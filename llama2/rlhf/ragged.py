"""Batches whose rows have lengths of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llama2.cache.paged_kv_cache import to_device

_MULTIPLE = 64  # lengths of packed tokens; fewer of them to allocate and compile for


@dataclass(frozen=True)
class Ragged:
    """A batch, or a part of one, as `objectives.Rows` has it: its rows are any objects on the host,
    such as pairs of answers. An objective packs them, on `device`.
    """

    items: Sequence[Any]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (it is immutable)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: slice) -> Self:
        return replace(self, items=self.items[rows])

    def split(self, size: int) -> list[Self]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return replace(self, device=device)


def packed(sequences: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Sequences of ids one after another, as `Llama2.hidden_states` takes them packed.

    Returns:
        tokens int64 `[1, total]` and bounds int32 `[num_sequences + 1]`, on the device, which waits
        for nobody. What fills `total` up to a multiple of 64 belongs to no sequence.
    """
    lengths = [len(sequence) for sequence in sequences]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    tokens = np.zeros((1, max(-(-int(bounds[-1]) // _MULTIPLE), 1) * _MULTIPLE), dtype=np.int64)
    for start, sequence in zip(bounds, sequences, strict=False):
        tokens[0, start : start + len(sequence)] = sequence
    device = torch.device(device)
    return to_device(tokens, device), to_device(bounds, device)
