"""Where a run is computed: in one process, or spread over several (`distributed.py`)."""

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
_MOST_THREADS = 1024  # OpenMP crashes where the system has no more


def use_threads(count: int) -> None:
    """Sets the CPU threads of PyTorch in this process."""
    if not 1 <= count <= _MOST_THREADS:
        raise ValueError(f"threads: expected from 1 to {_MOST_THREADS}; got {count}")
    torch.set_num_threads(count)


class Execution(Protocol):
    """How a run is spread over processes, and how its state is kept."""

    speaks: bool  # whether this process writes the log and shows the progress
    num_parts: int  # into which the rows of a batch are dealt out
    is_sharded: bool  # whether sharding settled the dtype and the recomputation of layers

    def own_rows(self, batch: Rows) -> Rows:
        """Returns the rows of a step's batch that this process computes."""
        ...

    def collected(self, own: Sequence[Any]) -> list[Any]:
        """What all processes made of their `own_rows`, an object a row, in the order of the batch;
        whole in every process."""
        ...

    def spread(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """`work(items)`, an object an item in their order, of which every process does a share
        without the others; whole in every process."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Of the processes' values."""
        ...

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Returns the norm of the whole gradient, a scalar in float32 or wider."""
        ...

    def load(
        self, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, identity: Identity
    ) -> int:
        """Restores the state in `folder` and returns the steps done; 0 where there is none."""
        ...

    def save(
        self,
        folder: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        step: int,
        identity: Identity,
    ) -> None:
        """Leaves the state after `step` steps in `folder`, which never holds half of one."""
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
                f"{folder}: expected the state of a run in one process; got {found[0].name}, of "
                "one on several, under torchrun"
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
