"""Answers that a policy draws, and what the models say of them.

Answers are drawn by `serve`, with the weights that are being trained: in one process by the very
module, where each process has a part of the weights by a whole copy in each, which is gathered once
per iteration and dropped when all have answered.

What decodes is not what trains: decode steps bring one token of each of many sequences, training
brings packed sequences whole, and their matrix products and attention sum in other orders. The
log-probabilities of the drawing therefore differ in their last bits from those of a training step,
in bfloat16 by as much as its roundings. The answers come from the former. The log-probabilities
that PPO divides by come from the latter (`by_parts`): they are computed by the forward pass of a
training step, on the micro-batches of the training steps that follow, so that the ratio before the
first step is 1, on a CPU to the bit (`ppo.ratio_bound`). Where the vocabulary has ids that the
tokenizer lacks, those are never drawn, though the model may give them a little probability.
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
from llama2.rlhf.ppo_losses import Rollout
from llama2.rlhf.ragged import Ragged
from llama2.serving import Request, Result, seed_of, serve
from llama2.train.distributed import replica
from llama2.train.epochs import Epochs
from llama2.train.execution import Execution

_PAGE_SIZE = 16
Score = Callable[[Sequence[Sequence[int]]], list[float]]  # such as a Scorer: a logit per sequence


class Question(NamedTuple):
    """A prompt as ids, tagged as one about safety or not."""

    ids: Sequence[int]
    is_safety: bool = False


class Questions:
    """The prompts of a run: every epoch all of them once, in an order of its own.

    Args:
        iterations: of the run. One with more goes through the same prompts at first.
        per_iteration: prompts of an iteration.
        seed: of the orders.
    Raises:
        ValueError: there is none.
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
        """What two runs must share for one to resume the other."""
        digest = 0
        for question in self._questions:
            ids = np.array([question.is_safety, *question.ids], dtype=np.int64)
            digest = zlib.crc32(ids, digest)
        return {"num_prompts": len(self._questions), "crc32": digest}


@dataclass
class Sampler:
    """Draws the answers of an iteration.

    Attributes:
        max_new_tokens: of an answer. One that has not ended by then is cut: it is kept, and its
            score lies on the last token that it has.
        stop_ids: what ends an answer, and belongs to it.
        temperature: of the drawing; there is no nucleus: the policy draws from all that it trains.
        seed: with iteration and place in the batch it settles what is drawn.
        vocab_size: ids from here on are never drawn.
        samples: answers to each prompt, which follow one another.
        max_batch: sequences at once, in each process.
        ops: of the copies that several processes need.
        dtype: of those copies.
        execution: the processes; prompts are dealt out over all of them.
        gathers: times that the weights were gathered so far.
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
        """Returns the answers, in the order of the prompts; every process calls it and gets all.

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
        """Of each prompt the answers' tokens and why they ended: "stop", "length" or an error."""
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
        """For prompts of these lengths; freed before the training steps need its memory."""
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
        # A step reads as many pages of every row as a sequence can have.
        config = replace(config, max_seq_len=longest)
        return PagedKVCache(config, num_pages=num_pages, **sizes, **where)


@dataclass(frozen=True)
class Judge:
    """The reward models: one of helpfulness and, if there is one, one of safety.

    Each gives the logits of rewards for token sequences, prompt and answer, in one forward pass:
    where processes share its weights, all have to make as many.
    """

    helpful: Score
    safety: Score | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[tuple[float, float | None]]:
        """(helpfulness, safety) of each rollout, logits."""
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
    """What `compute` makes of the rollouts, an object each: without gradients, in the micro-batches
    and processes in which training steps take them, mini-batch by mini-batch."""
    found: list[Any] = []
    for start in range(0, len(rollouts), mini_batch_size):
        own = execution.own_rows(Ragged(rollouts[start : start + mini_batch_size]))
        with torch.no_grad():
            parts = [compute(part.items) for part in own.split(micro_batch_size or len(own))]
        found += execution.collected([each for part in parts for each in part])
    return found
