"""Trains the small model of `stdlib_checkpoint` on several processes:

    torchrun --nproc-per-node 2 -m llama2.train.distributed --tp 2 --work build/distributed

It uses nccl and the kernels on GPUs, gloo and the backend "torch" on the CPU. If the run is killed,
the same command resumes from `--work`, on any number of processes: the data of a step do not depend
on their number, and the loss differs only by rounding. `--work` also receives `log.jsonl`, a line
per step. `--out` belongs to one run, as for `llama2 pretrain`.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gqa_kernels.backends import get_backend
from llama2 import parallel
from llama2.checkpoint import SHIPPED, save_hf
from llama2.decoder import AnyDecoder, Decoder
from llama2.model import Llama2
from llama2.scalar_model import ScalarModel
from llama2.storage import locked, replacing
from llama2.terminal import answered
from llama2.tokenizer import Tokenizer
from llama2.train import pretrain
from llama2.train.data import RandomWindows, stdlib_documents, token_stream
from llama2.train.execution import STATE
from llama2.train.objectives import Rows
from llama2.train.ownership import check_held, claimed, finish, run_id_of
from llama2.train.pretrain import Batches, TrainConfig
from llama2.train.sharded_state import load_sharded_state, save_sharded_state
from llama2.train.state import Identity
from llama2.train.stdlib_checkpoint import MODEL


def make_mesh(device_type: str, tp: int) -> DeviceMesh:
    """Returns a mesh of all processes, in which `tp` neighbours share a model; dimensions of size 1
    are left out.

    Raises:
        ValueError: tp does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if tp < 1 or world_size % tp:
        raise ValueError(f"tp: expected a divisor of the {world_size} processes; got {tp}")
    sizes = {parallel.DATA: world_size // tp, parallel.TENSOR: tp}
    kept = {name: size for name, size in sizes.items() if size > 1} or {parallel.DATA: 1}
    return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))


class Sharded:
    """The `Execution` of a model sharded over `mesh` by `parallelize`; its states can be loaded on
    any number of processes."""

    is_sharded = True

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.speaks = dist.get_rank() == 0
        self.num_parts, self._part = 1, 0
        if parallel.DATA in mesh.mesh_dim_names:
            data = mesh[parallel.DATA]
            self.num_parts, self._part = data.size(), data.get_local_rank()

    def check_rows(self, batch_size: int, name: str = "batch_size") -> None:
        """Raises ValueError, naming the argument `name`, if the models cannot divide the batch
        equally."""
        if batch_size % self.num_parts:
            raise ValueError(
                f"{name}: expected a multiple of the {self.num_parts} models; got {batch_size}"
            )

    def own_rows(self, batch: Rows) -> Rows:
        return batch[self._part :: self.num_parts]

    def collected(self, own: Sequence[Any]) -> list[Any]:
        has_parts = parallel.DATA in self.mesh.mesh_dim_names
        return _dealt_back(own, self.mesh.get_group(parallel.DATA)) if has_parts else list(own)

    def spread(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        return _dealt_back(work(items[dist.get_rank() :: dist.get_world_size()]), None)

    def mean(self, value: Tensor) -> Tensor:
        return parallel.mean(value, self.mesh)

    def grad_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        return parallel.grad_norm(gradients)

    def load(
        self, folder: Path, model: Decoder, optimizer: torch.optim.Optimizer, identity: Identity
    ) -> int:
        if (folder / STATE).exists():
            raise ValueError(
                f"{folder}: expected the state of a run under torchrun; got {STATE}, of a run "
                "without torchrun"
            )
        return load_sharded_state(folder, model, optimizer, identity)

    def save(
        self,
        folder: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        step: int,
        identity: Identity,
    ) -> None:
        save_sharded_state(folder, model, optimizer, step, identity)


def train(
    model: Llama2,
    data: Batches,
    mesh: DeviceMesh,
    config: TrainConfig,
    folder: Path,
    *,
    save_every: int = 500,
) -> list[dict[str, float]]:
    """Calls `pretrain.train` on a model sharded over `mesh` by `parallelize`, without
    micro-batches. All processes must see `folder`.

    Raises:
        ValueError: as `pretrain.train`; or `config` has micro-batches, bfloat16 or activation
            checkpointing, the last two of which are arguments of `parallelize`; or the models
            cannot divide the batch equally.
        FloatingPointError: as `pretrain.train`.
    """
    execution = Sharded(mesh)
    execution.check_rows(config.batch_size)
    unused_options = {"micro_batch_size": None, "bf16": False, "activation_checkpointing": False}
    for name, unused in unused_options.items():
        if getattr(config, name) != unused:
            raise ValueError(f"{name}: expected {unused}; got {getattr(config, name)}")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if execution.speaks else contextlib.nullcontext():
        return pretrain.train(
            model,
            data,
            config,
            folder,
            save_every=save_every,
            objective=partial(parallel.loss, mesh=mesh),
            execution=execution,
        )


def gathered(model: AnyDecoder) -> AnyDecoder | None:
    """Gathers the sharded model and returns it on the CPU of the first process, None in the others.
    Every process calls it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if dist.get_rank() != 0:
        return None
    # Sharding replaces the model's class.
    kind = ScalarModel if isinstance(model, ScalarModel) else Llama2
    alone = kind(model.config, get_backend("torch"))
    alone.load_state_dict(state)
    return alone


def _dealt_back(own: Sequence[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Gathers items that were distributed over a group, or all processes, and returns them in
    order."""
    size = dist.get_world_size(group)
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, list(own), group=group)
    items: list[Any] = [None] * sum(map(len, shares))
    for number, share in enumerate(shares):
        items[number::size] = share
    return items


def replica(model: Llama2, ops: ModuleType, dtype: torch.dtype) -> Llama2:
    """Gathers the sharded model in every process, on its device and in `dtype`, for use without
    communication. Every process calls it. Only one tensor at a time is whole in its training
    dtype."""
    with torch.device("meta"):
        alone = Llama2(model.config, ops)
    weights = {}
    for name, weight in model.state_dict().items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights[name] = whole.to(dtype, copy=True)
    alone.load_state_dict(weights, assign=True)
    return alone.requires_grad_(False)


def export(model: Llama2, out: Path) -> None:
    """Gathers the sharded model and writes it, with the shipped tokenizer, for `llama2 generate`.
    Every process calls it."""
    alone = gathered(model)
    if alone is not None:
        save_hf(alone, out, dtype=torch.bfloat16)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            with replacing(out / name) as partial:
                shutil.copyfile(SHIPPED / name, partial)
    dist.barrier()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun -m llama2.train.distributed",
        description="Train a small Llama 2 on Python's standard library, on several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for state and log")
    parser.add_argument(
        "--out", type=Path, help="directory for the final checkpoint, in Hugging Face's layout"
    )
    parser.add_argument("--tp", type=int, default=1, help="processes that share one model")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences per step, over all processes"
    )
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--peak-lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument(
        "--warmup-steps", type=int, default=10, help="steps of linear warm-up to the peak"
    )
    parser.add_argument("--save-every", type=int, default=25, help="steps between saved states")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and data")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and returns 0, or 2 after a one-line error on stderr about the user's input."""
    return answered("llama2.train.distributed", lambda: _run(_parse(arguments)))


def _run(args: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        raise ValueError("RANK: expected a process started by torchrun, which sets it; got none")
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        peak_lr=args.peak_lr,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "triton" if device.type == "cuda" else "torch"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        mesh = make_mesh(device.type, args.tp)
        if dist.get_rank() == 0:
            print(f"{dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))}, {backend} backend")
        with _owned(args.work, args.out) as run_id:
            documents = [document for document in stdlib_documents() if not document.held_out]
            stream = token_stream(documents, Tokenizer(SHIPPED / "tokenizer.model"))
            torch.manual_seed(args.seed)
            model = parallel.parallelize(Llama2(MODEL, get_backend(backend)).to(device), mesh)
            train(
                model,
                RandomWindows(stream, config),
                mesh,
                config,
                args.work,
                save_every=args.save_every,
            )
            if args.out is not None:
                if run_id is not None:
                    check_held(args.out, run_id)
                export(model, args.out)
                if run_id is not None:
                    finish(args.out, {"run": run_id, "train_config": asdict(config)})
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _owned(work: Path, out: Path | None) -> Iterator[str | None]:
    """Locks `out` for the run in `work`; yields the run's id in the first process, None in the
    others."""
    if out is None or dist.get_rank() != 0:
        yield None
        return
    work.mkdir(parents=True, exist_ok=True)
    run_id = run_id_of(work, begun=True)
    with claimed(out, run_id):
        yield run_id


if __name__ == "__main__":
    sys.exit(main())
