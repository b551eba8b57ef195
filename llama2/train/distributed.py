"""Trains the small model of `stdlib_checkpoint` on several processes:

    torchrun --nproc-per-node 2 -m llama2.train.distributed --tp 2 --work build/distributed

On GPUs with nccl and the kernels, on the CPU with gloo and the eager backend. Killed, the same
command continues from `--work`, on any number of processes: the data of a step, and with it the
loss but for roundings, do not depend on it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from gqa_kernels.backends import get_backend
from llama2 import parallel
from llama2.checkpoint import SHIPPED
from llama2.model import Llama2
from llama2.tokenizer import Tokenizer
from llama2.train.data import RandomWindows, stdlib_documents, token_stream
from llama2.train.pretrain import (
    Batches,
    TrainConfig,
    apply_gradients,
    make_optimizer,
    run_identity,
)
from llama2.train.sharded_state import load_sharded_state, save_sharded_state
from llama2.train.stdlib_checkpoint import MODEL


def make_mesh(device_type: str, tp: int) -> DeviceMesh:
    """All processes, `tp` neighbours to a model; dimensions of one process are left out.

    Raises:
        ValueError: tp does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if tp < 1 or world_size % tp:
        raise ValueError(f"tp: expected a divisor of the {world_size} processes; got {tp}")
    sizes = {parallel.DATA: world_size // tp, parallel.TENSOR: tp}
    kept = {name: size for name, size in sizes.items() if size > 1} or {parallel.DATA: 1}
    return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def own_rows(batch: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of a batch that this process computes."""
    if parallel.DATA not in mesh.mesh_dim_names:
        return batch
    data = mesh[parallel.DATA]
    return batch[data.get_local_rank() :: data.size()]


def train_step(
    model: Llama2,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    mesh: DeviceMesh,
    step: int,
    config: TrainConfig,
) -> tuple[float, float]:
    """`pretrain.train_step` of a parallel model; every process gives it the whole batch.

    Raises:
        FloatingPointError: the loss or the norm is not finite. The weights are as before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = parallel.loss(model, own_rows(batch, mesh), mesh)
    loss.backward()
    total = parallel.mean(loss, mesh)
    norm = parallel.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    return apply_gradients(optimizer, total, norm, step, config)


def train(
    model: Llama2,
    data: Batches,
    mesh: DeviceMesh,
    config: TrainConfig,
    folder: Path,
    *,
    save_every: int = 500,
) -> list[float]:
    """`pretrain.train` of a model that `parallelize` sharded over `mesh`, without micro-batches and
    without a log: goes on from the state in `folder`, if there is one.

    Returns:
        the losses of the steps run, the first of them after those of the state.
    Raises:
        ValueError: `config` asks for micro-batches, or for bfloat16 or activation checkpointing,
            which `parallelize` gives, or for a batch that the models do not divide; the state in
            `folder` is of another run.
        FloatingPointError: a loss or gradient is not finite; such a step is never saved.
    """
    num_parts = mesh[parallel.DATA].size() if parallel.DATA in mesh.mesh_dim_names else 1
    if config.batch_size % num_parts:
        raise ValueError(
            f"batch_size: expected a multiple of the {num_parts} models; got {config.batch_size}"
        )
    unused_options = {"micro_batch_size": None, "bf16": False, "activation_checkpointing": False}
    for name, unused in unused_options.items():
        if getattr(config, name) != unused:
            raise ValueError(f"{name}: expected {unused}; got {getattr(config, name)}")
    optimizer = make_optimizer(model, config)
    identity = run_identity(model, data, config)
    first_step = load_sharded_state(folder, model, optimizer, identity)
    losses = []
    speaks = dist.get_rank() == 0
    steps = range(first_step, config.steps)
    model.train()
    with tqdm(
        steps, initial=first_step, total=config.steps, unit="step", disable=not speaks
    ) as progress:
        for step in progress:
            batch = data.batch(step).to(model.rope.cos.device)
            loss, norm = train_step(model, optimizer, batch, mesh, step, config)
            losses.append(loss)
            if speaks:
                progress.write(f"step {step}: loss {loss:.6f}, gradient norm {norm:.6f}")
            if (step + 1) % save_every == 0 or step + 1 == config.steps:
                save_sharded_state(folder, model, optimizer, step + 1, identity)
    return losses


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun -m llama2.train.distributed",
        description="Train a small Llama 2 on Python's standard library, on several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="directory of the state")
    parser.add_argument("--tp", type=int, default=1, help="processes that share one model")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step, of all")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--peak-lr", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps to reach it")
    parser.add_argument("--save-every", type=int, default=25, help="steps between states")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data's order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
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
    backend = "triton" if device.type == "cuda" else "eager"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        mesh = make_mesh(device.type, args.tp)
        if dist.get_rank() == 0:
            print(f"{dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))}, {backend} backend")
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
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
