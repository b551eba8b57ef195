"""Supervised fine-tuning: the dialogues of a run and the held-out loss.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.1.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from llama2.finetune.dialogues import Dialogue
from llama2.finetune.encoding import Encoded, encode_dialogue
from llama2.finetune.packing import answer_loss, pack, pack_rows
from llama2.model import Llama2
from llama2.tokenizer import Tokenizer
from llama2.train.care import Care, CareCounts
from llama2.train.execution import Execution


@dataclass
class Dialogues:
    """Encoded dialogues with counts by source.

    Attributes:
        num_predictions: tokens with a loss, by source.
        counts: what was done to the dialogues, by source.
    """

    encoded: list[Encoded] = field(default_factory=list)
    num_predictions: Counter[str] = field(default_factory=Counter)
    counts: defaultdict[str, CareCounts] = field(default_factory=lambda: defaultdict(CareCounts))

    def add(self, dialogue: Dialogue, encoded: Encoded) -> None:
        self.encoded.append(encoded)
        self.counts[dialogue.source].documents += 1
        self.num_predictions[dialogue.source] += int(encoded.is_trained.sum())

    def record(self) -> dict[str, Any]:
        """Returns tokens of answers and `CareCounts`, by source, in JSON's types."""
        return {
            source: {"answer_tokens": self.num_predictions[source]} | counts.to_json()
            for source, counts in sorted(self.counts.items())
        }


def taken(
    care: Care,
    dialogue: Dialogue,
    counts: CareCounts,
    encode: Callable[[Dialogue], Encoded],
    *,
    held_out: bool = False,
) -> Encoded | None:
    """Returns an encoded dialogue with redacted contents; None if it is to be left out.

    Patterns are matched with its source and its file's name. Its concatenated contents decide on
    near-duplicates and on overlap of training and held-out data. A dialogue that `encode` refuses
    is neither counted nor remembered, so that a similar one can be kept.

    Raises:
        ValueError: as `encode`.
    """
    if care.excludes(dialogue.source, dialogue.file.name):
        counts.excluded += 1
        return None
    messages, redacted = [], Counter()
    for message in dialogue.messages:
        content, found = care.redact(message["content"])
        messages.append({**message, "content": content})
        redacted += found
    encoded = encode(replace(dialogue, messages=tuple(messages)))
    if care.repeats("\n".join(message["content"] for message in messages), held_out=held_out):
        counts.near_duplicates += 1
        return None
    counts.redacted += redacted
    return encoded


def encode_within(tokenizer: Tokenizer, dialogue: Dialogue, form: str, seq_len: int) -> Encoded:
    """Returns `encode_dialogue` of a dialogue that fits in a row.

    Raises:
        ValueError: it has more than seq_len + 1 tokens; it is not truncated.
    """
    least = sum(tokenizer.least_ids(message["content"].strip()) for message in dialogue.messages)
    encoded = None if least > seq_len + 1 else encode_dialogue(tokenizer, dialogue, form)
    if encoded is None or len(encoded.ids) > seq_len + 1:
        got = f"{least} or more" if encoded is None else len(encoded.ids)
        raise ValueError(f"messages: expected at most {seq_len + 1} tokens; got {got}")
    return encoded


@torch.no_grad()
def held_out_loss(
    model: Llama2,
    dialogues: Sequence[Encoded],
    *,
    seq_len: int,
    batch_size: int,
    execution: Execution,
) -> float:
    """Returns the mean −log p in nats over all tokens with a loss; every process calls it.

    Args:
        batch_size: rows per forward pass in each of the execution's parts of a batch.
    """
    num_parts = execution.num_parts
    rows = pack([len(dialogue.ids) - 1 for dialogue in dialogues], seq_len)
    size = min(batch_size, -(-len(rows) // num_parts)) * num_parts
    was_training = model.training
    model.eval()
    total, count = 0.0, 0.0
    starts = range(0, len(rows), size)
    for start in tqdm(starts, desc="held out", leave=False, disable=not execution.speaks):
        members = [[dialogues[n] for n in row] for row in rows[start : start + size]]
        members += [[]] * (size - len(members))  # all processes get equal parts
        batch = pack_rows(members, seq_len).to(model.rope.cos.device)
        predictions = batch.predictions_per_row * len(batch)
        loss = execution.mean(answer_loss(model, execution.own_rows(batch)))
        total, count = total + loss.item() * predictions, count + predictions
    model.train(was_training)
    return total / count
