"""Scores of texts by a reward model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from llama2.checkpoint import hf, is_scalar, load_config, load_scalar
from llama2.rlhf.ragged import packed
from llama2.scalar_model import ScalarModel
from llama2.taught_format import taught_format

_TOKENIZER = "tokenizer.model"


class Scorer:
    """Scores sequences of ids, prompt and answer, by the reward's logit at the last id.

    Args:
        model: the reward model; its mode does not matter, as it has no dropout.
        max_tokens: most tokens per forward pass, unless one sequence has more.
    """

    def __init__(self, model: ScalarModel, *, max_tokens: int = 16384) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1; got {max_tokens}")
        self.model, self.max_tokens = model, max_tokens

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Returns a score for each sequence, the same as alone up to rounding differences between
        batch sizes.

        Raises:
            ValueError: a sequence is empty or longer than the model's context.
        """
        most = self.model.config.max_seq_len
        for index, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= most:
                raise ValueError(
                    f"sequences[{index}]: expected from 1 to {most} tokens; got {len(sequence)}"
                )
        device = self.model.rope.cos.device
        scores: list[float] = []
        for batch in self._batches(sequences):
            tokens, bounds = packed(batch, device)
            values = self.model(tokens, cu_seqlens=bounds)[0]
            scores += values[bounds[1:].long() - 1].tolist()
        return scores

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        batch: list[Sequence[int]] = []
        for sequence in sequences:
            if batch and sum(map(len, batch)) + len(sequence) > self.max_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        if batch:
            yield batch


def load_reward_model(
    path: Path,
    ops: ModuleType,
    *,
    policy: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ScalarModel:
    """Returns the reward model of a checkpoint directory, after checking that it can score a
    policy's answers.

    Args:
        policy: the policy's checkpoint directory.
        dtype, device: as for `checkpoint.load`.
    Raises:
        ValueError: it is not a reward model; or its tokenizer, vocabulary size or dialogue format
            differs from the policy's, or its context is shorter.
        OSError, NotImplementedError, ImportError: as `checkpoint.load_scalar`.
    """
    if not is_scalar(path):
        raise ValueError(
            f"{path}: expected a reward model, as `llama2 reward` writes it; got a checkpoint of "
            "another architecture"
        )
    found, expected = hf.read_config(path, hf.SCALAR), load_config(policy)
    for folder in (path, policy):
        if not (folder / _TOKENIZER).is_file():
            raise ValueError(f"{folder}: expected a {_TOKENIZER}; got none")
    if (path / _TOKENIZER).read_bytes() != (policy / _TOKENIZER).read_bytes():
        raise ValueError(f"{path}: expected the {_TOKENIZER} of {policy}; got another")
    for name, ours, theirs in (
        ("vocab_size", found.vocab_size, expected.vocab_size),
        ("format of dialogues", taught_format(path), taught_format(policy)),
    ):
        if ours != theirs:
            raise ValueError(f"{path}: expected the {name} of {policy}, {theirs}; got {ours}")
    if found.max_seq_len < expected.max_seq_len:
        raise ValueError(
            f"{path}: expected a context of at least {expected.max_seq_len} tokens, that of "
            f"{policy}; got {found.max_seq_len}"
        )
    return load_scalar(path, ops, dtype=dtype, device=device)
