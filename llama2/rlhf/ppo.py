"""Proximal policy optimisation of a chat model against reward models.

An iteration samples a batch of answers, scores them, and does one gradient step of the policy and
one of the critic on each mini-batch, in order.

From the paper (Touvron et al. 2023, arXiv:2307.09288, section 3.2.3 and appendix A.3): AdamW with
its settings, the constant learning rate, clipping of gradients, sizes of batch and mini-batch, one
step per mini-batch, the clip range, β, the choice between the two rewards, its whitened logit, the
KL penalty to the supervised model.

Our choices where the paper gives none: the critic, a separate model that is initialised from the
helpfulness reward model and trained with the policy's learning rate; generalised advantages with γ
= 1 and λ = 0.95, whitened over the batch; the clipped value loss, with the policy's range; the mean
over tokens in both losses; no dropout, no entropy bonus.

With `group_size` > 0 there is no critic: each prompt has that many answers, and the advantage of an
answer's tokens is its score relative to its group (Shao et al. 2024, arXiv:2402.03300). The KL
penalty stays in the reward, as in the paper: each token's advantage includes −β times the sum of
the log-ratios from that token on. It is not normalised by the group; otherwise a group with equal
scores would be trained on the penalty alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llama2.decoder import Decoder
from llama2.model import Llama2
from llama2.rlhf.experience import Measured, check_finite, described, experiences
from llama2.rlhf.ppo_config import PPOConfig
from llama2.rlhf.ppo_losses import (
    Experience,
    PolicyLoss,
    Rollout,
    ValueLoss,
    answer_log_probs,
    answer_values,
    tokens_per_row,
)
from llama2.rlhf.ragged import Ragged
from llama2.rlhf.rollouts import Judge, Questions, Sampler, by_parts
from llama2.scalar_model import ScalarModel
from llama2.train.execution import Execution, OneProcess
from llama2.train.loop import run_steps
from llama2.train.pretrain import make_optimizer, make_worker, train_step


@dataclass(frozen=True)
class Actors:
    """The models of a run, on one device, all sharded in the same way or none.

    Attributes:
        policy: the trained policy.
        critic: the trained critic; None with `group_size`. It shares no weights with the policy.
        reference: the frozen initial policy, in the dtype in which the policy computes.
    """

    policy: Llama2
    critic: ScalarModel | None
    reference: Llama2
    judge: Judge


def train(
    actors: Actors,
    questions: Questions,
    sampler: Sampler,
    config: PPOConfig,
    folder: Path,
    *,
    save_every: int = 10,
    inputs: dict[str, Any] | None = None,
    execution: Execution = OneProcess(),  # noqa: B008  (it has no state)
    asked_to_stop: Callable[[], bool] = lambda: False,
    tensorboard: Path | None = None,
) -> list[dict[str, Any]]:
    """Trains the policy and the critic in place and returns the records of the log, one per
    iteration. States, log and resuming are as in `pretrain.train`. States are saved at the end of
    an iteration: a killed iteration is repeated, on a CPU bit for bit.

    Args:
        inputs: what else two runs must share for one to resume the other, such as reward models.
        tensorboard: as for `pretrain.train`.
    Raises:
        KeyboardInterrupt, ValueError: as `pretrain.train`.
        FloatingPointError: a logit, score, log-probability, value, loss or gradient is not finite,
            or the ratio before the first step of an iteration is not 1 (`ratio_bound`). Nothing of
            that iteration is saved.
    """
    loop = _Loop(actors, questions, sampler, config, execution)
    recipe = asdict(config)
    # With a constant learning rate, longer runs begin with the same iterations as shorter ones.
    del recipe["activation_checkpointing"], recipe["iterations"]
    identity = {
        "model_config": asdict(actors.policy.config),
        "ppo_config": recipe,
        "prompts": questions.identity(),
        "inputs": inputs or {},
    }
    return run_steps(
        folder,
        loop.trained,
        loop.optimizer,
        identity,
        config.iterations,
        loop.iteration,
        save_every=save_every,
        execution=execution,
        asked_to_stop=asked_to_stop,
        tensorboard=tensorboard,
        unit="iteration",
        shown="reward",
    )


def ratio_bound(device: torch.device, clip_range: float) -> float:
    """Returns the largest |ρ − 1| before the first step of an iteration that counts as correct.

    Old and new log-probabilities come from the same weights and kernels on the same micro-batches.
    On a CPU they are bit-identical, so the bound is 0, for every dtype and number of processes. On
    GPUs, the libraries for matrix products and all-reduces do not guarantee the order of their
    sums. There the bound is the clip range: below it, no ratio of that step is clipped, so its
    gradient is the unclipped one. The log records the actual deviation.
    """
    return 0.0 if device.type == "cpu" else clip_range


class _Loop:
    """One run; its state consists of `trained` and `optimizer`."""

    def __init__(
        self,
        actors: Actors,
        questions: Questions,
        sampler: Sampler,
        config: PPOConfig,
        execution: Execution,
    ) -> None:
        if (actors.critic is None) != (config.group_size > 0):
            raise ValueError(
                "critic: expected a critic if and only if group_size is 0; got "
                f"{'none' if actors.critic is None else 'one'} with {config.group_size}"
            )
        self.actors, self.config, self.execution = actors, config, execution
        self.questions, self.sampler = questions, sampler
        self.device = actors.policy.rope.cos.device
        self.step_config = config.step_config(actors.policy.config.max_seq_len)
        models = {"policy": actors.policy, "critic": actors.critic}
        models = {name: model for name, model in models.items() if model is not None}
        # One state and one optimizer for both, so that they are saved together. A step of one model
        # does not change the other: AdamW skips parameters without a gradient.
        self.trained = nn.ModuleDict(models)
        self.optimizer = make_optimizer(self.trained, self.step_config)
        self.seconds: dict[str, float] = {}

    @cached_property
    def workers(self) -> dict[str, Decoder]:
        """The models that compute the gradients, made in the first iteration, after the weights of
        a resumed run have been loaded."""
        sharded = self.execution.is_sharded
        return {
            name: model if sharded else make_worker(model, self.step_config)
            for name, model in self.trained.items()
        }

    def iteration(self, number: int) -> dict[str, Any]:
        """Does an iteration, from sampling to the last gradient step, and returns its record."""
        gathers = self.sampler.gathers
        with self._timed("rollout"):
            batch = self.questions.batch(number)
            rollouts = self.sampler(self.workers["policy"], batch, number)
        with self._timed("score"):
            measured = self._measured(rollouts)
            check_finite(measured, number)
            learnt = experiences(measured, self.config)
            record = described(measured, learnt, self.config)
        with self._timed("train"):
            record |= self._learn(learnt, number)
        record["gathers"] = self.sampler.gathers - gathers
        return record | {f"{part}_seconds": spent for part, spent in self.seconds.items()}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = round(time.perf_counter() - started, 3)

    def _measured(self, rollouts: Sequence[Rollout]) -> list[Measured]:
        """Returns the outputs of the reward models, policy, reference and critic on the answers."""
        config, device = self.config, self.device

        def measure(part: Sequence[Rollout]) -> list[Measured]:
            scores = self.actors.judge(part)
            policy, reference = self.workers["policy"], self.actors.reference
            ours = answer_log_probs(policy, part, config.temperature, device)
            theirs, _ = answer_log_probs(reference, part, config.temperature, device)
            numbers = [*ours, theirs]
            if "critic" in self.workers:
                numbers.append(answer_values(self.workers["critic"], part, device))
            ends = np.cumsum([len(rollout.answer) for rollout in part])[:-1]
            columns = [np.split(each.cpu().numpy(), ends) for each in numbers]
            columns += [[None] * len(part)] * (4 - len(columns))  # without a critic
            rows = zip(part, scores, *columns, strict=True)
            return [Measured(rollout, *score, *tokens) for rollout, score, *tokens in rows]

        return by_parts(
            rollouts,
            measure,
            mini_batch_size=config.mini_batch_size,
            micro_batch_size=config.micro_batch_size,
            execution=self.execution,
        )

    def _learn(self, learnt: Sequence[Experience], number: int) -> dict[str, Any]:
        """Does a gradient step of each model per mini-batch and returns the log's fields about
        them."""
        config, steps = self.config, []
        size = config.mini_batch_size
        for start in range(0, len(learnt), size):
            rows = Ragged(learnt[start : start + size], self.device)
            per_row = tokens_per_row(rows.items)
            policy_loss = PolicyLoss(per_row, config.clip_range, config.temperature)
            found = {"tokens": per_row * len(rows)}
            step = number * (len(learnt) // size) + start // size
            found["policy_loss"], found["grad_norm"] = self._step("policy", rows, step, policy_loss)
            seen = self.execution.collected([policy_loss.seen()])
            found["ratio_deviation"] = max(part["ratio_deviation"] for part in seen)
            for name in ("clipped", "divergence"):
                found[name] = sum(part[name] for part in seen)
            if start == 0:
                self._check_ratio(found["ratio_deviation"], number)
            if "critic" in self.workers:
                value_loss = ValueLoss(per_row, config.clip_range)
                found["value_loss"], found["critic_grad_norm"] = self._step(
                    "critic", rows, step, value_loss
                )
            steps.append(found)
        tokens = sum(found["tokens"] for found in steps)
        record = {
            "clip_fraction": sum(found["clipped"] for found in steps) / tokens,
            "approx_kl": sum(found["divergence"] for found in steps) / tokens,
            "first_ratio_deviation": steps[0]["ratio_deviation"],
            "lr": config.lr,
        }
        for name in ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm"):
            known = name in steps[0]
            record[name] = float(np.mean([found[name] for found in steps])) if known else None
        return record

    def _step(
        self, name: str, rows: Ragged, step: int, objective: Callable[..., torch.Tensor]
    ) -> tuple[float, float]:
        """Does a gradient step of one model and returns (loss, gradient norm)."""
        try:
            return train_step(
                self.trained[name],
                self.optimizer,
                rows,
                step,
                self.step_config,
                self.workers[name],
                objective,
                self.execution,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from error

    def _check_ratio(self, deviation: float, number: int) -> None:
        bound = ratio_bound(self.device, self.config.clip_range)
        if not deviation <= bound:
            raise FloatingPointError(
                f"iteration {number}: expected ratios to the old policy that differ from 1 by at "
                f"most {bound:g} before the first step; got {deviation:g}. The forward pass is not "
                "reproducible"
            )
