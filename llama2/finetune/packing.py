"""Dialogues packed into rows of equal length, and the loss of their answers.

Several dialogues share a row. They do not attend to each other, and the positions of each start at
0, so that its loss and gradients are those of the dialogue alone.
"""

import zlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from llama2.finetune.encoding import Encoded
from llama2.model import Llama2
from llama2.targets import IGNORED
from llama2.train.epochs import Epochs


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items to rows by best fit decreasing: longest first, each to the row with the least
    room in which it fits.

    Args:
        lengths: lengths of the items, from 1 to `capacity`.
    Returns:
        The items' indices, row by row.
    Raises:
        ValueError: an item is longer than a row.
    Reference: Johnson 1973, "Near-optimal bin packing algorithms" (best fit decreasing).
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room left in them
    rooms: list[int] = []  # its keys in ascending order
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths: expected from 1 to {capacity}; got {length}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(item)
        if left := room - length:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


@dataclass(frozen=True)
class PackedRows:
    """A batch of packed rows, or a part of one.

    Attributes:
        tokens: int64 `[rows, seq_len]`.
        targets: int64 `[rows, seq_len]`: the next token if it has a loss, otherwise IGNORED.
        bounds: int32 `[rows, num_sequences + 1]`: the beginnings of a row's dialogues, from 0, and
            the end. The padding is the last sequence, followed by empty ones.
        predictions_per_row: tokens with a loss in the whole batch, divided by its number of rows.
    """

    tokens: Tensor
    targets: Tensor
    bounds: Tensor
    predictions_per_row: float

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Self:
        return self._with(lambda tensor: tensor[rows])

    def split(self, size: int) -> list[Self]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Any) -> Self:
        names = ("tokens", "targets", "bounds")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def cu_seqlens(self) -> Tensor:
        """Returns the bounds of all rows concatenated into one sequence, int32, from 0."""
        rows = torch.arange(len(self), dtype=torch.int32, device=self.device)
        ends = self.bounds[:, 1:] + rows[:, None] * self.tokens.shape[1]
        return torch.cat([self.bounds[:1, 0], ends.flatten()])


def answer_loss(model: Llama2, rows: PackedRows) -> Tensor:
    """Returns Σ −log p(target) / (predictions_per_row · rows), in nats.

    Its mean over equal parts of a batch, such as micro-batches or the parts of processes, is the
    mean over all predictions of the batch, whatever number each part has. Tokens without a loss are
    not projected onto the vocabulary.
    """
    targets = rows.targets.reshape(1, -1)
    tokens = rows.tokens.reshape(1, -1)
    total = model(tokens, cu_seqlens=rows.cu_seqlens(), targets=targets, reduction="sum")
    return total / (rows.predictions_per_row * len(rows))


def pack_rows(dialogues: Sequence[Sequence[Encoded]], seq_len: int) -> PackedRows:
    """Returns rows of the given dialogues, one list per row; a list may be empty.

    Of a dialogue of n ids, the first n − 1 are inputs and the last n − 1 are targets where they
    have a loss.
    """
    rows = len(dialogues)
    width = max(map(len, dialogues)) + 2
    tokens = torch.zeros(rows, seq_len, dtype=torch.int64, device="cpu")
    targets = torch.full((rows, seq_len), IGNORED, dtype=torch.int64, device="cpu")
    bounds = torch.full((rows, width), seq_len, dtype=torch.int32, device="cpu")
    for row, members in enumerate(dialogues):
        start = bounds[row, 0] = 0
        for number, dialogue in enumerate(members, 1):
            end = start + len(dialogue.ids) - 1
            ids = torch.from_numpy(dialogue.ids.astype(np.int64))
            bears_loss = torch.from_numpy(dialogue.is_trained[1:])
            tokens[row, start:end] = ids[:-1]
            targets[row, start:end] = ids[1:].where(bears_loss, IGNORED)
            bounds[row, number] = start = end
    count = (targets != IGNORED).sum().item()
    return PackedRows(tokens, targets, bounds, count / rows)


class PackedDialogues:
    """The batches of a run: every row once per epoch, in a different order each epoch.

    The dialogues are packed once. Empty rows without weight fill up the last batch.

    Attributes:
        num_rows: rows of an epoch.
        steps: batches of all epochs.
        num_predictions: tokens of an epoch with a loss.
        waste: the share of padding in the rows.

    Args:
        dialogues: of at most seq_len + 1 ids each.
        epochs: passes over all rows; a partial epoch takes the first rows of its order.
        seed: random seed of the orders.
    Raises:
        ValueError: there are no dialogues, one does not fit, or `epochs` is not positive.
    """

    def __init__(
        self,
        dialogues: Sequence[Encoded],
        *,
        seq_len: int,
        batch_size: int,
        epochs: float,
        seed: int,
    ) -> None:
        if not dialogues:
            raise ValueError("dialogues: expected at least one; got none")
        self._dialogues, self._rows = dialogues, pack([len(d.ids) - 1 for d in dialogues], seq_len)
        self._seq_len, self._batch_size = seq_len, batch_size
        self._epochs = Epochs(len(self._rows), batch_size=batch_size, epochs=epochs, seed=seed)
        self.num_rows, self.steps = self._epochs.num_rows, self._epochs.steps
        self.num_predictions = sum(int(d.is_trained[1:].sum()) for d in dialogues)
        filled = sum(len(d.ids) - 1 for d in dialogues)
        self.waste = 1 - filled / (self.num_rows * seq_len)

    def batch(self, step: int) -> PackedRows:
        rows = self._epochs.rows(step)
        members = [[self._dialogues[n] for n in self._rows[row]] for row in rows]
        return pack_rows(members + [[]] * (self._batch_size - len(members)), self._seq_len)

    def identity(self) -> dict[str, Any]:
        digest = 0
        for dialogue in self._dialogues:
            for part in (dialogue.ids, dialogue.is_trained):
                digest = zlib.crc32(np.ascontiguousarray(part), digest)
        return {
            "num_dialogues": len(self._dialogues),
            "num_rows": self.num_rows,
            "rows_of_all_epochs": self._epochs.num_rows_of_all,
            "crc32": digest,
        }
