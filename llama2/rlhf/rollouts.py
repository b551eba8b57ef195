"""Sampling of a policy's answers, and evaluation of models on them.

`serve` samples answers with the weights that are being trained: in one process with the trained
module itself; with sharded weights, with a whole copy in each process, gathered once per iteration
and freed after sampling.

Decoding and training sum in different orders: a decode step computes one token of many sequences, a
training step whole packed sequences. Log-probabilities at sampling therefore differ from those of a
training step in the last bits, in bfloat16 by its rounding errors. Answers are sampled by decode
steps, but the log-probabilities by which PPO divides (`by_parts`) come from the forward pass of a
training step, on the micro-batches of the following training steps. So the ratio before the first
step is 1, on a CPU exactly (`ppo.ratio_bound`). Ids that the tokenizer lacks are never sampled,
although the model may give them a small probability.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.cache_size import fitting_pages
from llama2.model import Llama2
from llama2.requests import Request, Result, seed_of
from llama2.rlhf.ppo_losses import Rollout
from llama2.rlhf.ragged import Ragged
from llama2.serving import serve
from llama2.train.distributed import replica
from llama2.train.epochs import Epochs
from llama2.train.execution import Execution

_PAGE_SIZE = 16
Score = Callable[[Sequence[Sequence[int]]], list[float]]  # such as a Scorer: a logit per sequence


class Question(NamedTuple):
    """A prompt as ids, and whether it is a safety prompt."""

    ids: Sequence[int]
    is_safety: bool = False


class Questions:
    """The prompts of a run: every prompt once per epoch, in a different order each epoch.

    Args:
        iterations: number of iterations; a run with more begins with the same prompts.
        per_iteration: prompts per iteration.
        seed: random seed of the orders.
    Raises:
        ValueError: there are no prompts.
    """

    def __init__(
        self, questions: Sequence[Question], *, iterations: int, per_iteration: int, seed: int
    ) -> None:
        if not questions:
            raise ValueError("questions: expected at least one prompt; got none")
        epochs = Fraction(iterations * per_iteration, len(questions))
        sizes = {"batch_size": per_iteration, "epochs": epochs}
        self._questions, self._epochs = questions, Epochs(len(questions), **sizes, seed=seed)

    def __len__(self) -> int:
        return len(self._questions)

    def batch(self, iteration: int) -> list[Question]:
        return [self._questions[row] for row in self._epochs.rows(iteration)]

    def identity(self) -> dict[str, Any]:
        """Returns what two runs must share for one to resume the other."""
        digest = 0
        for question in self._questions:
            ids = np.array([question.is_safety, *question.ids], dtype=np.int64)
            digest = zlib.crc32(ids, digest)
        return {"num_prompts": len(self._questions), "crc32": digest}


@dataclass
class Sampler:
    """Samples the answers of an iteration.

    Attributes:
        max_new_tokens: most tokens of an answer. A truncated answer is kept; its score is added to
            its last token.
        stop_ids: ids that end an answer and belong to it.
        temperature: sampling temperature. There is no nucleus sampling: the policy samples from the
            distribution that it trains.
        seed: determines the random numbers, with iteration and place in the batch.
        vocab_size: ids from this one on are never sampled.
        samples: answers per prompt, which are consecutive.
        max_batch: sequences at once, in each process.
        ops, dtype: of the copies of a sharded model.
        execution: the processes, among which prompts are distributed.
        gathers: how often the weights have been gathered.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float
    seed: int
    vocab_size: int
    samples: int
    max_batch: int
    ops: ModuleType
    dtype: torch.dtype
    execution: Execution
    gathers: int = 0

    def __call__(
        self, policy: Llama2, questions: Sequence[Question], iteration: int
    ) -> list[Rollout]:
        """Returns all answers in the order of the prompts; every process calls it.

        Raises:
            FloatingPointError: the policy's logits are not finite.
            ValueError: as `serve`.
        """
        model = policy
        if self.execution.is_sharded:
            model = replica(policy, self.ops, self.dtype)
            self.gathers += 1
        numbered = list(enumerate(questions))
        drawn = self.execution.spread(numbered, lambda share: self._drawn(model, share, iteration))
        rollouts = []
        for question, answers in zip(questions, drawn, strict=True):
            for tokens, reason in answers:
                if reason not in ("stop", "length"):
                    raise FloatingPointError(f"iteration {iteration}: {reason}")
                cut = reason == "length"
                rollouts.append(Rollout(question.ids, tokens, question.is_safety, cut))
        return rollouts

    def _drawn(
        self, model: Llama2, share: Sequence[tuple[int, Question]], iteration: int
    ) -> list[list[tuple[list[int], str]]]:
        """Returns, for each prompt, the answers' tokens and finish reasons: "stop", "length" or an
        error."""
        if not share:
            return []
        requests = [
            Request(
                question.ids,
                self.max_new_tokens,
                self.temperature,
                seed=seed_of(self.seed, iteration, number, sample),
                stop_ids=self.stop_ids,
            )
            for number, question in share
            for sample in range(self.samples)
        ]
        cache = self._cache(model, [len(request.prompt) for request in requests])
        found: dict[int, Result] = {}
        for result in serve(model, requests, cache=cache, vocab_size=self.vocab_size):
            found[result.index] = result
        answers = [
            (found[index].tokens, found[index].error or found[index].finish_reason)
            for index in range(len(requests))
        ]
        return [
            answers[start : start + self.samples] for start in range(0, len(answers), self.samples)
        ]

    def _cache(self, model: Llama2, prompts: Sequence[int]) -> PagedKVCache:
        """Returns a cache for prompts of these lengths; it is freed before the training steps."""
        weight, config = model.lm_head.weight, model.cache_config
        where = {"dtype": weight.dtype, "device": weight.device}
        rows = min(self.max_batch, len(prompts))
        lengths = [length + self.max_new_tokens for length in prompts]
        sizes = {"max_batch": rows, "page_size": _PAGE_SIZE}
        num_pages = fitting_pages(config, lengths, **sizes, **where)
        longest = min(max(lengths), config.max_seq_len)
        needed = -(-longest // _PAGE_SIZE)
        if num_pages < needed:
            raise ValueError(
                f"max_new_tokens: expected answers whose keys and values fit in memory, {needed} "
                f"pages of {_PAGE_SIZE} tokens; got room for {num_pages}"
            )
        # A decode step reads as many pages of every row as the longest sequence can have.
        config = replace(config, max_seq_len=longest)
        return PagedKVCache(config, num_pages=num_pages, **sizes, **where)


@dataclass(frozen=True)
class Judge:
    """The reward models of helpfulness and, optionally, of safety.

    Each returns the reward logits of token sequences, prompt and answer, in one forward pass:
    processes that share its weights must make the same number of passes.
    """

    helpful: Score
    safety: Score | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[tuple[float, float | None]]:
        """Returns the logits (helpfulness, safety) of each rollout."""
        sequences = [rollout.ids for rollout in rollouts]
        helpful = self.helpful(sequences)
        safety = [None] * len(helpful) if self.safety is None else self.safety(sequences)
        return list(zip(helpful, safety, strict=True))


def by_parts(
    rollouts: Sequence[Rollout],
    compute: Callable[[Sequence[Rollout]], list[Any]],
    *,
    mini_batch_size: int,
    micro_batch_size: int | None,
    execution: Execution,
) -> list[Any]:
    """Returns the objects that `compute` makes of the rollouts, one each, without gradients and in
    the same mini-batches, micro-batches and processes as in training steps."""
    found: list[Any] = []
    for start in range(0, len(rollouts), mini_batch_size):
        own = execution.own_rows(Ragged(rollouts[start : start + mini_batch_size]))
        with torch.no_grad():
            parts = [compute(part.items) for part in own.split(micro_batch_size or len(own))]
        found += execution.collected([each for part in parts for each in part])
    return found
