"""Pre-training as in Llama 2's paper: AdamW, warm-up and cosine schedule, clipping; with exact
resume.

Reference: Touvron et al. 2023, arXiv:2307.09288, section 2.2.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llama2.decoder import Decoder
from llama2.train import update
from llama2.train.execution import Execution, OneProcess
from llama2.train.loop import run_steps
from llama2.train.objectives import Objective, Rows, next_token
from llama2.train.state import Identity


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults after `seq_len` are the paper's for its 7B model.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per optimiser step.
        seq_len: predicted tokens per sequence.
        micro_batch_size: sequences per forward pass; None means `batch_size`. Gradients of the
            micro-batches accumulate to the batch's.
        weight_decay: applied to matrices, not to norms (our choice: the paper does not say).
        final_lr_fraction: learning rate of the last step, as a fraction of the peak.
        bf16: compute with a copy of the model in bfloat16; weights, the sum of gradients over
            micro-batches and the optimiser's state stay float32.
        seed: random seed of the order of the data.
        activation_checkpointing: as for `Decoder`. It does not change results, so a resumed run may
            change it.

    Raises:
        ValueError: a size or `peak_lr` is not positive, `warmup_steps` or `weight_decay` is
            negative, the seed is not in [0, 2^64), or `micro_batch_size` does not divide
            `batch_size`.
    """

    steps: int
    batch_size: int
    seq_len: int
    micro_batch_size: int | None = None
    peak_lr: float = 3e-4
    final_lr_fraction: float = 0.1
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if not 0 < self.peak_lr < math.inf:
            raise ValueError(f"peak_lr: expected a positive number; got {self.peak_lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0; got {self.warmup_steps}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0; got {self.weight_decay}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected from 0 to 2^64 - 1; got {self.seed}")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ValueError(
                f"micro_batch_size: expected a divisor of batch_size ({self.batch_size}); "
                f"got {micro}"
            )


class Batches(Protocol):
    """The data of a run."""

    def batch(self, step: int) -> Rows:
        """Returns the rows of a step, determined by its number alone: int64 `[batch_size, seq_len +
        1]`, or what the objective takes instead."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns, in JSON's types, what two runs must share for one to resume the other."""
        ...


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of `step`, counted from 0.

    Linear to the peak over `warmup_steps` (peak · (step + 1) / warmup_steps), then
    floor + (peak − floor) · (1 + cos(π · progress)) / 2, progress 0 at the first step after the
    warm-up and 1 at the last step; floor = peak · final_lr_fraction.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    floor = config.peak_lr * config.final_lr_fraction
    return floor + (config.peak_lr - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with weight decay for matrices only.

    All parameters of a group are on the same mesh or all unsharded, as the fused step requires. The
    optimiser is fused, unless `make_worker` makes a worker with copies of the weights:
    `update.step_with_copies` then does the step.
    """
    members = defaultdict(list)
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        members[parameter.dim() >= 2, mesh].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), parameters in members.items()
    ]
    betas = (config.beta1, config.beta2)
    has_copies = config.bf16 and all(mesh is None for _, mesh in members)
    return torch.optim.AdamW(
        groups, config.peak_lr, betas=betas, eps=config.adam_eps, fused=not has_copies
    )


def make_worker(model: Decoder, config: TrainConfig) -> Decoder:
    """Returns the model that computes the gradients of a step: `model`, or with bf16 a copy in
    bfloat16.

    Autocast would not do: it would pass float32 residuals and bfloat16 updates to the ops.
    """
    worker = copy.deepcopy(model).bfloat16() if config.bf16 else model
    worker.activation_checkpointing = config.activation_checkpointing
    return worker


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batch: Rows,
    step: int,
    config: TrainConfig,
    worker: Decoder | None = None,
    objective: Objective = next_token,
    execution: Execution = OneProcess(),  # noqa: B008  (it has no state)
) -> tuple[float, float]:
    """Does one optimiser step on `batch`, on the model's device.

    Args:
        batch: from `Batches`; every process of `execution` passes the whole batch.
        worker: from `make_worker`, with the weights of `model`; afterwards both have the new
            weights. None makes one.
    Returns:
        (loss of the batch, gradient norm before clipping).
    Raises:
        FloatingPointError: either is not finite. The weights are unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    worker = make_worker(model, config) if worker is None else worker
    worker.zero_grad(set_to_none=True)
    rows = execution.own_rows(batch)
    micro_batches = rows.split(config.micro_batch_size or len(rows))
    total = torch.zeros((), dtype=torch.float32, device=batch.device)
    for micro_batch in micro_batches:
        loss = objective(worker, micro_batch) / len(micro_batches)
        loss.backward()
        total = total + loss.detach()
        if worker is not model and len(micro_batches) > 1:
            _hand_over_gradients(worker, model)
    total = execution.mean(total)
    gradients = _gradients(worker, model)
    norm = execution.grad_norm(gradients.values())
    if not (total + norm).isfinite():
        raise FloatingPointError(
            f"step {step}: expected a finite loss and gradient norm; got {total.item()} and "
            f"{norm.item()}. The last saved state is unchanged; start a new run with a lower "
            "learning rate"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    grad_scale = update.clipping_scale(norm, config.max_grad_norm)
    if worker is model:
        update.step_fused(optimizer, grad_scale)
    else:
        copies = dict(zip(model.parameters(), worker.parameters(), strict=True))
        update.step_with_copies(optimizer, gradients, copies, grad_scale, model.adamw_update)
    return total.item(), norm.item()


def _gradients(worker: Decoder, model: Decoder) -> dict[nn.Parameter, Tensor]:
    """Returns the gradients by weight of `model`: its own gradient if there is one, otherwise the
    worker's."""
    pairs = zip(model.parameters(), worker.parameters(), strict=True)
    found = {
        weight: copied.grad if weight.grad is None else weight.grad for weight, copied in pairs
    }
    return {weight: gradient for weight, gradient in found.items() if gradient is not None}


def _hand_over_gradients(worker: Decoder, model: Decoder) -> None:
    """Adds the worker's gradients to the model's in float32 and clears them."""
    for copied, weight in zip(worker.parameters(), model.parameters(), strict=True):
        if copied.grad is not None:
            added = weight.grad is not None
            weight.grad = weight.grad.add_(copied.grad) if added else copied.grad.float()
            copied.grad = None


def run_identity(model: Decoder, data: Batches, config: TrainConfig) -> Identity:
    """Returns the shapes, the recipe and the data of a run."""
    recipe = asdict(config)
    del recipe["activation_checkpointing"]  # does not change results
    return {
        "model_config": asdict(model.config),
        "train_config": recipe,
        "stream": data.identity(),
    }


def train(
    model: Decoder,
    data: Batches,
    config: TrainConfig,
    folder: Path,
    *,
    save_every: int = 500,
    objective: Objective = next_token,
    counts_tokens: bool = True,
    execution: Execution = OneProcess(),  # noqa: B008  (it has no state)
    asked_to_stop: Callable[[], bool] = lambda: False,
    tensorboard: Path | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place on `data` and returns the records of the log, one per step.

    `folder` receives a state, every `save_every` steps and at the end, and `log.jsonl`, a line per
    step: step, loss, lr, grad_norm, tokens (so far), seconds (so far). If `folder` has a state, the
    run resumes from it, bit for bit as if it had never stopped (on CUDA if its kernels are
    deterministic).

    Args:
        objective: the loss of rows that each step minimises.
        counts_tokens: False for rows of different lengths: the log then has no "tokens".
        execution: the processes; every one of them calls this.
        asked_to_stop: called after each step; if it returns True, the step is saved and the run
            ends.
        tensorboard: a directory for TensorBoard event files, which get the numbers of the log.
    Raises:
        KeyboardInterrupt: `asked_to_stop` returned True; the step is saved.
        ValueError: the state in `folder` is of another run, its log is incomplete, or `save_every`
            is not positive; or as the batches of `data`.
        FloatingPointError: a loss or gradient is not finite; such a step is never saved.
    """
    device = model.rope.cos.device  # also for sharded parameters
    optimizer = make_optimizer(model, config)
    model.train()
    worker = None

    def do_step(step: int) -> dict[str, float]:
        nonlocal worker
        if worker is None:  # now that the weights of a resumed run are loaded
            worker = model if execution.is_sharded else make_worker(model, config)
        batch = data.batch(step).to(device)
        loss, grad_norm = train_step(
            model, optimizer, batch, step, config, worker, objective, execution
        )
        record = {"loss": loss, "lr": learning_rate(step, config), "grad_norm": grad_norm}
        if counts_tokens:
            record["tokens"] = (step + 1) * config.batch_size * config.seq_len
        return record

    return run_steps(
        folder,
        model,
        optimizer,
        run_identity(model, data, config),
        config.steps,
        do_step,
        save_every=save_every,
        execution=execution,
        asked_to_stop=asked_to_stop,
        tensorboard=tensorboard,
    )
