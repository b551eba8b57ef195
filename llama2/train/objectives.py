"""Training objectives and the interface of batches."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from llama2.model import Llama2


class Rows(Protocol):
    """A batch, which can be indexed, split and moved like a tensor `[batch_size, …]`."""

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Self: ...

    def split(self, size: int) -> Sequence[Self]: ...

    def to(self, device: torch.device) -> Self: ...


# The loss of a model on one micro-batch, a scalar mean over rows. The step's loss is the mean over
# its micro-batches and processes.
Objective = Callable[[Any, Any], Tensor]


def next_token(model: Llama2, tokens: Tensor) -> Tensor:
    """Returns `Llama2.loss` of tokens `[batch, seq_len + 1]` without padding: pre-training."""
    return model.loss(tokens)
