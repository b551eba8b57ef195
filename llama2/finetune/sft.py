"""Supervised fine-tuning: the dialogues of a run, and the loss on those that it does not see.

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
    """Encoded dialogues, and what is told of them by source.

    Attributes:
        num_predictions: tokens that bear a loss, by source.
        counts: what was done to the dialogues of a source.
    """

    encoded: list[Encoded] = field(default_factory=list)
    num_predictions: Counter[str] = field(default_factory=Counter)
    counts: defaultdict[str, CareCounts] = field(default_factory=lambda: defaultdict(CareCounts))

    def add(self, dialogue: Dialogue, encoded: Encoded) -> None:
        self.encoded.append(encoded)
        self.counts[dialogue.source].documents += 1
        self.num_predictions[dialogue.source] += int(encoded.is_trained.sum())

    def record(self) -> dict[str, Any]:
        """What JSON can hold: tokens of answers, and what `CareCounts` counts, by source."""
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
    """Returns a dialogue with every content redacted, encoded; None for one to be left out.

    Patterns are compared with its source and the name of its file; of near-duplicates and of what
    is both for training and held out, all contents together count. What `encode` refuses is
    neither counted nor remembered, so that another that is like it can stay.

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
    """`encode_dialogue` of one that fits in a row.

    Raises:
        ValueError: it takes more than seq_len + 1 tokens; nothing is cut.
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
    """Returns mean −log p in nats over all tokens that bear a loss; every process calls it.

    Args:
        batch_size: rows of a forward pass in each of the execution's parts of a batch.
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
        members += [[]] * (size - len(members))  # the parts of all processes are equal
        batch = pack_rows(members, seq_len).to(model.rope.cos.device)
        predictions = batch.predictions_per_row * len(batch)
        loss = execution.mean(answer_loss(model, execution.own_rows(batch)))
        total, count = total + loss.item() * predictions, count + predictions
    model.train(was_training)
    return total / count
