"""Where a run is computed: in one process, or in several (`distributed.py`)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.decoder import Decoder
from llama2.train import update
from llama2.train.objectives import Rows
from llama2.train.state import Identity, load_state, save_state

STATE = "state.pt"
_MOST_THREADS = 1024  # OpenMP crashes if the system runs out of threads


def use_threads(count: int) -> None:
    """Sets the CPU threads of PyTorch in this process."""
    if not 1 <= count <= _MOST_THREADS:
        raise ValueError(f"threads: expected from 1 to {_MOST_THREADS}; got {count}")
    torch.set_num_threads(count)


class Execution(Protocol):
    """How a run is distributed over processes, and how its state is saved."""

    speaks: bool  # whether this process writes the log and shows the progress
    num_parts: int  # parts into which the rows of a batch are split
    is_sharded: bool  # whether `parallelize` chose dtype and recomputation

    def own_rows(self, batch: Rows) -> Rows:
        """Returns the rows of a step's batch that this process computes."""
        ...

    def collected(self, own: Sequence[Any]) -> list[Any]:
        """Returns, in every process, the objects that all processes made of their `own_rows`, one
        per row, in the order of the batch."""
        ...

    def spread(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Returns `work(items)`, one object per item in order, in every process; each process
        computes a share of the items without communication."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of the processes' values."""
        ...

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Returns the norm of the whole gradient, a scalar in float32 or wider."""
        ...

    def load(
        self, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, identity: Identity
    ) -> int:
        """Restores the state in `folder` and returns the number of steps done; 0 without a
        state."""
        ...

    def save(
        self,
        folder: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        step: int,
        identity: Identity,
    ) -> None:
        """Saves the state after `step` steps in `folder`, atomically."""
        ...


class OneProcess:
    """The `Execution` of a run in this process alone; its state is `state.pt`."""

    speaks = True
    num_parts = 1
    is_sharded = False

    def own_rows(self, batch: Rows) -> Rows:
        return batch

    def collected(self, own: Sequence[Any]) -> list[Any]:
        return list(own)

    def spread(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        return work(items)

    def mean(self, value: Tensor) -> Tensor:
        return value

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        return update.grad_norm(gradients)

    def load(
        self, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, identity: Identity
    ) -> int:
        if found := sorted(folder.glob("step-*")):
            raise ValueError(
                f"{folder}: expected the state of a run without torchrun; got {found[0].name}, of "
                "a run under torchrun"
            )
        path = folder / STATE
        return load_state(path, model, optimizer, identity) if path.exists() else 0

    def save(
        self,
        folder: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        step: int,
        identity: Identity,
    ) -> None:
        save_state(folder / STATE, model, optimizer, step, identity)
