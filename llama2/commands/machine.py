"""Where a training command runs: in one process or in those that torchrun started."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama2 import parallel
from llama2.decoder import AnyDecoder
from llama2.placement import Placement, place
from llama2.train.distributed import Sharded, gathered, make_mesh
from llama2.train.execution import Execution, OneProcess, use_threads
from llama2.train.pretrain import TrainConfig


@dataclass(frozen=True)
class Machine:
    """One process, or, with a `mesh`, all of its processes."""

    placement: Placement
    mesh: DeviceMesh | None = None

    @cached_property
    def execution(self) -> Execution:
        return OneProcess() if self.mesh is None else Sharded(self.mesh)

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.mesh is None else self.mesh.size()

    def check(self, config: TrainConfig, batch: str = "batch_size") -> None:
        """Raises ValueError for a recipe that these processes cannot follow.

        Args:
            batch: the option that sets the rows of a step.
        """
        if self.mesh is None:
            return
        self.execution.check_rows(config.batch_size, batch)
        rows = config.batch_size // self.execution.num_parts
        if rows % (config.micro_batch_size or 1):
            raise ValueError(
                f"micro_batch_size: expected a divisor of the {rows} rows of each model; "
                f"got {config.micro_batch_size}"
            )
        if config.bf16 and parallel.DATA not in self.mesh.mesh_dim_names:
            raise ValueError(
                f"bf16: expected more processes than --tp; got {self.mesh.size()}, which all share "
                "one model"
            )

    def sharded(self, model: AnyDecoder, config: TrainConfig) -> AnyDecoder:
        """Returns the model sharded over the mesh; in one process the model itself."""
        if self.mesh is None:
            return model
        return parallel.parallelize(
            model,
            self.mesh,
            param_dtype=torch.bfloat16 if config.bf16 else None,
            recompute_layers=config.activation_checkpointing,
        )

    def whole(self, model: AnyDecoder) -> AnyDecoder | None:
        """Returns the whole trained model in the process that writes, None in the others."""
        return model if self.mesh is None else gathered(model)

    @contextlib.contextmanager
    def writer_first(self) -> Iterator[None]:
        """Runs the block in the process that writes first and then in the others, which find its
        files."""
        if self.mesh is not None and not self.execution.speaks:
            dist.barrier()
        yield
        if self.mesh is not None and self.execution.speaks:
            dist.barrier()


@contextlib.contextmanager
def machine(args: argparse.Namespace) -> Iterator[Machine]:
    """Yields the machine that the options of `add_machine` specify.

    Raises:
        ValueError: as `place`, `use_threads` and `make_mesh`; or `--tp` without torchrun.
    """
    if args.threads is not None:
        use_threads(args.threads)
    if "RANK" not in os.environ:
        if args.tp != 1:
            raise ValueError(
                f"tp: expected processes started by torchrun; got --tp {args.tp} without torchrun"
            )
        yield Machine(place(args.backend, args.device))
        return
    device = args.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    placement = place(args.backend, device)
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
    dist.init_process_group("nccl" if placement.device.type == "cuda" else "gloo")
    try:
        yield Machine(placement, make_mesh(placement.device.type, args.tp))
    finally:
        dist.destroy_process_group()
