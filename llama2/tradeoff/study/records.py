"""The task "records": a model answers questions about the fields of items in its context.

A row is BOS, then items, then `questions` questions:

- An item is ONE token that stands for one of `values` values in each of `fields` fields. The items
  of a row differ in every field.
- A question is one token that names a field, a value of that field and another field. The answer is
  the value of the other field in the item that has the given value: one of `values` classes, so
  that a guess is right with probability 1 / `values`.

The loss is the cross-entropy of the answers alone. A query head has to match the key of the given
field and to read the value of the other field. With one key/value head per layer all fields share
its head_dim features; with two fields one match is enough, so that they serve as a control. The
task extends the associative recall of Arora et al. 2023, arXiv:2312.04927, to several fields.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llama2.config import ModelConfig
from llama2.decoder import Decoder

_BOS = 0
_ITEM_STD = 0.1  # of embeddings at the start; with 0.02 no model learns the items in 300 steps
_SCORED_SEED = 12345  # the same questions for every model
_ROWS_AT_ONCE = 42


@dataclass(frozen=True)
class RecordsShape:
    """The sizes of the task and of MHA's network.

    Attributes:
        values: of each field, which is also the largest number of items.
        questions: of a row.
        items: numbers of items in training; each batch draws one of them.
        items_scored: numbers of items for which accuracy is measured.
        rows_scored: rows for each of these numbers.
    """

    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 2
    num_q_heads: int = 8
    head_dim: int = 8
    values: int = 8
    questions: int = 24
    items: tuple[int, ...] = (4, 6, 8)
    items_scored: tuple[int, ...] = (2, 4, 6, 8)
    rows_scored: int = 168

    def config(self, fields: int) -> ModelConfig:
        """Returns the configuration of MHA for items with `fields` fields."""
        return ModelConfig(
            vocab_size=1 + self.values**fields + fields**2 * self.values,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_q_heads,
            head_dim=self.head_dim,
            max_seq_len=1 + max(self.items + self.items_scored) + self.questions,
        )


class RecordsModel(Decoder):
    """A decoder with a head of one logit per value, `answer`, for the last tokens of a row."""

    def __init__(self, config: ModelConfig, values: int, ops: ModuleType) -> None:
        super().__init__(config, ops)
        self.answer = nn.Linear(config.hidden_size, values, bias=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor, questions: int) -> Tensor:
        """Returns logits `[batch, questions, values]` at the last `questions` tokens of tokens
        `[batch, seq_len]`."""
        return self.answer(self.hidden_states(tokens)[:, -questions:])


@torch.no_grad()
def compose_items(model: RecordsModel, shape: RecordsShape, fields: int) -> None:
    """Draws the embeddings; an item's embedding starts as the sum of the vectors of its values.

    There are many items, and each is rare: without this start no model learns the task in a few
    hundred steps, whatever its heads.
    """
    weight = model.embed_tokens.weight
    weight.normal_(std=_ITEM_STD)
    drawn = {"dtype": weight.dtype, "device": weight.device}
    parts = torch.randn(fields, shape.values, shape.hidden_size, **drawn) * _ITEM_STD
    items = torch.arange(shape.values**fields, device=weight.device)
    attributes = [
        parts[field][items // shape.values**field % shape.values] for field in range(fields)
    ]
    weight[1 : 1 + len(items)] = sum(attributes) / fields**0.5


def rows(
    generator: np.random.Generator, count: int, shape: RecordsShape, fields: int, num_items: int
) -> np.ndarray:
    """Returns int64 `[count, 1 + num_items + 2 · questions]`: the tokens, then the answers."""
    row = np.arange(count)[:, None]
    # [count, fields, items]: in each field the items have different values.
    attributes = np.argsort(generator.random((count, fields, shape.values)), axis=2)[
        ..., :num_items
    ]
    items = sum(attributes[:, field] * shape.values**field for field in range(fields))
    size = (count, shape.questions)
    item = generator.integers(num_items, size=size)
    given = generator.integers(fields, size=size)
    asked = (given + generator.integers(1, fields, size=size)) % fields
    pair = given * fields + asked
    questions = 1 + shape.values**fields + pair * shape.values + attributes[row, given, item]
    bos = np.full((count, 1), _BOS, dtype=np.int64)
    return np.concatenate((bos, 1 + items, questions, attributes[row, asked, item]), axis=1)


class RecordsBatches:
    """Batches of rows, a function of the seed and the step, for `pretrain.train`."""

    def __init__(self, shape: RecordsShape, fields: int, seed: int, batch_size: int) -> None:
        self._shape, self._fields, self._seed = shape, fields, seed
        self._batch_size = batch_size

    def batch(self, step: int) -> Tensor:
        generator = np.random.default_rng([self._seed, step])
        num_items = int(generator.choice(self._shape.items))
        drawn = rows(generator, self._batch_size, self._shape, self._fields, num_items)
        return torch.from_numpy(drawn)

    def identity(self) -> dict[str, Any]:
        return {
            "task": "records",
            "fields": self._fields,
            "seed": self._seed,
            "values": self._shape.values,
            "questions": self._shape.questions,
            "items": list(self._shape.items),
        }


def loss(model: RecordsModel, batch: Tensor, questions: int) -> Tensor:
    """Returns the mean cross-entropy of the answers in nats."""
    logits = model(batch[:, :-questions], questions).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, -questions:].flatten())


@torch.no_grad()
def score(model: RecordsModel, shape: RecordsShape, fields: int) -> tuple[dict[str, float], float]:
    """Returns (share of right answers by number of items, mean cross-entropy in bits)."""
    device = model.answer.weight.device
    shares, nats = {}, []
    for num_items in shape.items_scored:
        generator = np.random.default_rng([_SCORED_SEED, num_items])
        drawn = rows(generator, shape.rows_scored, shape, fields, num_items)
        right = 0
        for batch in torch.from_numpy(drawn).to(device).split(_ROWS_AT_ONCE):
            answers = batch[:, -shape.questions :]
            logits = model(batch[:, : -shape.questions], shape.questions).float()
            right += (logits.argmax(-1) == answers).sum().item()
            losses = functional.cross_entropy(
                logits.flatten(0, 1), answers.flatten(), reduction="none"
            )
            nats += losses.double().tolist()
        shares[str(num_items)] = right / (shape.rows_scored * shape.questions)
    return shares, float(np.mean(nats) / np.log(2))
