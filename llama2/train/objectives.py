"""What training minimises, and the rows of a batch that it is a mean over."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from llama2.model import Llama2


class Rows(Protocol):
    """A batch: as a tensor `[batch_size, …]` can be indexed, split and moved, rows first."""

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Self: ...

    def split(self, size: int) -> Sequence[Self]: ...

    def to(self, device: torch.device) -> Self: ...


# The loss by a model of one micro-batch of rows, a scalar: a mean over rows, of which that over the
# micro-batches and processes of a step is the step's loss.
Objective = Callable[[Any, Any], Tensor]


def next_token(model: Llama2, tokens: Tensor) -> Tensor:
    """`Llama2.loss` of tokens `[batch, seq_len + 1]`, each row whole: pre-training."""
    return model.loss(tokens)
