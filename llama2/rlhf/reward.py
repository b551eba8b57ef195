"""Reward models: pairs of answers as ids, the ranking loss and the accuracy on held-out pairs.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llama2.chat_format import Message
from llama2.finetune.dialogues import Dialogue
from llama2.finetune.sft import encode_within
from llama2.rlhf.comparisons import RATINGS, Comparison, margin_of
from llama2.rlhf.ragged import Ragged, packed
from llama2.scalar_model import ScalarModel
from llama2.tokenizer import Tokenizer
from llama2.train.epochs import Epochs
from llama2.train.execution import Execution


@dataclass(frozen=True)
class Pair:
    """A comparison as ids.

    Attributes:
        chosen, rejected: int32 `[num_tokens]`: the messages, the answer and the EOS after it.
        rating: that of the comparison.
        margin: the loss's margin between the scores.
        weight: the weight of its loss in a batch; 0 for padding of the batch.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    rating: str | None = None
    margin: float = 0.0
    weight: float = 1.0


_ONE_TOKEN = np.zeros(1, dtype=np.int32)
_FILLING = Pair(_ONE_TOKEN, _ONE_TOKEN, weight=0.0)


def answer_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], answer: str, form: str, seq_len: int
) -> np.ndarray:
    """Returns the ids that a reward model scores, int32 `[num_tokens]`: messages and an answer,
    encoded by `encode_dialogue`, with EOS at the end.

    Args:
        messages: as `check_messages` accepts them, a "user" last.
        form: one of `chat_format.FORMATS`.
        seq_len: the most tokens.
    Raises:
        ValueError: there are more tokens, which are not truncated; or the tokenizer lacks BOS or
            EOS.
    """
    dialogue = (*messages, {"role": "assistant", "content": answer})
    trained = (True,) * sum(message["role"] == "assistant" for message in dialogue)
    # A training row may have one token more: its last token is only a target.
    place = {"source": "", "file": Path(), "line": 0}
    return encode_within(tokenizer, Dialogue(dialogue, trained, **place), form, seq_len - 1).ids


def encode_pair(tokenizer: Tokenizer, comparison: Comparison, form: str, seq_len: int) -> Pair:
    """Returns the pair with `answer_ids` of both answers; see there for the arguments.

    Raises:
        ValueError: as `answer_ids`; names the answer.
    """
    ids = []
    for name in ("chosen", "rejected"):
        answer = getattr(comparison, name)
        try:
            ids.append(answer_ids(tokenizer, comparison.messages, answer, form, seq_len))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Pair(*ids, comparison.rating)


def with_margins(pairs: Sequence[Pair], margins: str) -> list[Pair]:
    """Returns the pairs with the margins of their ratings; errors as `margin_of`."""
    return [replace(pair, margin=margin_of(pair.rating, margins)) for pair in pairs]


def score_pairs(model: ScalarModel, rows: Ragged) -> tuple[Tensor, Tensor]:
    """Returns (chosen, rejected), the scores of the pairs' answers at their last tokens, float32
    `[pairs]`.

    All answers of the rows are packed into one sequence of tokens.
    """
    ids = [ids for pair in rows.items for ids in (pair.chosen, pair.rejected)]
    tokens, cu_seqlens = packed(ids, rows.device)
    scores = model(tokens, cu_seqlens=cu_seqlens)[0, cu_seqlens[1:].long() - 1]
    return scores[0::2], scores[1::2]


def ranking_loss(model: ScalarModel, rows: Ragged) -> Tensor:
    """Returns the mean over pairs of weight · −log σ(r_chosen − r_rejected − margin), float32, in
    nats."""
    chosen, rejected = score_pairs(model, rows)
    settings = {"dtype": torch.float32, "device": chosen.device}
    margins = torch.tensor([pair.margin for pair in rows.items], **settings)
    weights = torch.tensor([pair.weight for pair in rows.items], **settings)
    return -(weights * F.logsigmoid(chosen - rejected - margins)).mean()


class PairBatches:
    """The batches of a run: every pair once per epoch, in a different order each epoch.

    Pairs of weight 0 fill up the last batch; the weight of the others is increased, so that the
    loss is the mean over them.

    Attributes:
        steps: batches of all epochs.

    Args:
        epochs: passes over all pairs; a partial epoch takes the first pairs of its order.
        seed: random seed of the orders.
    Raises:
        ValueError: there are no pairs, or `epochs` is not positive.
    """

    def __init__(self, pairs: Sequence[Pair], *, batch_size: int, epochs: float, seed: int) -> None:
        if not pairs:
            raise ValueError("pairs: expected at least one; got none")
        self._pairs, self._batch_size = pairs, batch_size
        self._epochs = Epochs(len(pairs), batch_size=batch_size, epochs=epochs, seed=seed)
        self.steps = self._epochs.steps

    def batch(self, step: int) -> Ragged:
        numbers = self._epochs.rows(step)
        weight = self._batch_size / len(numbers)
        pairs = [replace(self._pairs[number], weight=weight) for number in numbers]
        return Ragged(_filled(pairs, self._batch_size))

    def identity(self) -> dict[str, Any]:
        digest = 0
        for pair in self._pairs:
            for part in (pair.chosen, pair.rejected, np.float64(pair.margin)):
                digest = zlib.crc32(np.ascontiguousarray(part), digest)
        return {
            "num_pairs": len(self._pairs),
            "pairs_of_all_epochs": self._epochs.num_rows_of_all,
            "crc32": digest,
        }


def _filled(pairs: Sequence[Pair], size: int) -> list[Pair]:
    return [*pairs, *[_FILLING] * (size - len(pairs))]


@torch.no_grad()
def differences(
    model: ScalarModel, pairs: Sequence[Pair], *, batch_size: int, execution: Execution
) -> Tensor:
    """Returns r_chosen − r_rejected of each pair, float64 `[pairs]`; every process calls it.

    Args:
        batch_size: pairs per forward pass in each of the execution's parts of a batch.
    """
    num_parts, device = execution.num_parts, model.rope.cos.device
    size = min(batch_size, -(-len(pairs) // num_parts)) * num_parts
    starts = range(0, len(pairs), size)
    found = torch.zeros(len(starts) * size, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for start in tqdm(starts, desc="held out", leave=False, disable=not execution.speaks):
        rows = Ragged(_filled(pairs[start : start + size], size), device)
        places = execution.own_rows(torch.arange(start, start + size, device=device))
        chosen, rejected = score_pairs(model, execution.own_rows(rows))
        found[places] = (chosen - rejected).double()
    model.train(was_training)
    # Each process has zeros in place of the others' scores.
    return execution.mean(found)[: len(pairs)] * num_parts


def evaluate(
    model: ScalarModel, pairs: Sequence[Pair], *, batch_size: int, execution: Execution
) -> dict[str, Any]:
    """Returns statistics of a model on pairs, in JSON's types; every process calls it.

    Args:
        pairs: at least one; their margins are ignored.
        batch_size: as for `differences`.
    Returns:
        `pairs`; `correct`, the number whose chosen answer has the higher score, without ties;
        `accuracy`, their share; `mean_difference` of the scores; `loss`, the mean of
        −log σ(r_chosen − r_rejected) in nats; and `by_rating`, the same for the pairs of each
        rating; "unrated" stands for None.
    Raises:
        FloatingPointError: a score is not finite.
    """
    found = differences(model, pairs, batch_size=batch_size, execution=execution).cpu()
    if count := int((~found.isfinite()).sum()):
        raise FloatingPointError(
            f"held_out: expected finite scores; got {count:,} of {len(pairs):,} pairs without"
        )
    places = defaultdict(list)
    for place, pair in enumerate(pairs):
        places[pair.rating].append(place)
    by_rating = {
        rating or "unrated": _counted(found[places[rating]])
        for rating in [*RATINGS, None]
        if rating in places
    }
    return _counted(found) | {"by_rating": by_rating}


def _counted(found: Tensor) -> dict[str, Any]:
    correct = int((found > 0).sum())
    return {
        "pairs": len(found),
        "correct": correct,
        "accuracy": correct / len(found),
        "mean_difference": found.mean().item(),
        "loss": -F.logsigmoid(found).mean().item(),
    }
