"""Batches with rows of different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llama2.cache.transfer import to_device

_MULTIPLE = 64  # packed lengths are rounded up to this, for fewer allocations and compilations


@dataclass(frozen=True)
class Ragged:
    """A batch, or a part of one, with the interface of `objectives.Rows`. Its rows are any objects
    on the host, such as pairs of answers; an objective packs them on `device`.
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
    """Packs sequences of ids for `Llama2.hidden_states`.

    Returns:
        Tokens int64 `[1, total]` and bounds int32 `[num_sequences + 1]` on the device, copied
        without a synchronisation. Padding fills `total` up to a multiple of 64 after the last
        sequence.
    """
    lengths = [len(sequence) for sequence in sequences]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    tokens = np.zeros((1, max(-(-int(bounds[-1]) // _MULTIPLE), 1) * _MULTIPLE), dtype=np.int64)
    for start, sequence in zip(bounds, sequences, strict=False):
        tokens[0, start : start + len(sequence)] = sequence
    device = torch.device(device)
    return to_device(tokens, device), to_device(bounds, device)
