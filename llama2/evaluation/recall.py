"""Two tasks in which a model must repeat tokens from earlier in its context.

The loss on text hides that a small model remembers less, as most tokens depend only on the last
few. Here every scored token is random and can only be known from cached keys and values.

- lookup: BOS, NUM_KEYS pairs of a key and a value, one token each, in random order without repeated
  keys; then keys with their values, repeatedly. The values are scored.
- copy: BOS, then a random string of COPY_LENGTH tokens, repeated. All repetitions are scored.

The ids are those of Llama's byte pieces and the last of the vocabulary, which text hardly uses; the
models' training data must contain rows of the tasks. After the associative recall of Arora et al.
2023, arXiv:2312.04927.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llama2.model import Llama2

NUM_KEYS, NUM_VALUES = 8, 16
COPY_LENGTH, NUM_LETTERS = 16, 32
BOS = 1
FIRST_BYTE = 3  # the first of Llama's 256 byte pieces
MIN_VOCAB_SIZE = FIRST_BYTE + NUM_KEYS * NUM_VALUES + NUM_KEYS + NUM_VALUES
MIN_SEQ_LEN = 2 * COPY_LENGTH

Rows = Callable[[np.random.Generator, int, int, int], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A task: `rows` makes int64 `[num_rows, seq_len + 1]` from (generator, num_rows, seq_len,
    vocab_size).

    Columns `first_scored`, `first_scored + stride`, … are scored; `chance` is the accuracy of
    guessing among all possible tokens.
    """

    rows: Rows
    first_scored: int
    stride: int
    chance: float


def lookup_rows(
    generator: np.random.Generator, num_rows: int, seq_len: int, vocab_size: int
) -> np.ndarray:
    row = np.arange(num_rows)[:, None]
    order = generator.permuted(np.tile(np.arange(NUM_KEYS), (num_rows, 1)), axis=1)
    value_of = generator.integers(NUM_VALUES, size=(num_rows, NUM_KEYS))
    pairs = FIRST_BYTE + order * NUM_VALUES + value_of[row, order]
    asked = generator.integers(NUM_KEYS, size=(num_rows, seq_len // 2))
    values = vocab_size - NUM_VALUES + value_of[row, asked]
    keys = vocab_size - NUM_VALUES - NUM_KEYS + asked
    questions = np.stack((keys, values), axis=2).reshape(num_rows, -1)
    return _begun(np.concatenate((pairs, questions), axis=1), seq_len)


def copy_rows(
    generator: np.random.Generator, num_rows: int, seq_len: int, vocab_size: int
) -> np.ndarray:
    string = FIRST_BYTE + generator.integers(NUM_LETTERS, size=(num_rows, COPY_LENGTH))
    return _begun(np.tile(string, (1, -(-seq_len // COPY_LENGTH))), seq_len)


def _begun(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    return np.pad(tokens[:, :seq_len], ((0, 0), (1, 0)), constant_values=BOS)


TASKS = {
    "lookup": Task(lookup_rows, 1 + NUM_KEYS + 1, 2, 1 / NUM_VALUES),
    "copy": Task(copy_rows, 1 + COPY_LENGTH, 1, 1 / NUM_LETTERS),
}


def check(seq_len: int, vocab_size: int) -> None:
    """Raises ValueError if `seq_len` or `vocab_size` is too small for the tasks."""
    if seq_len < MIN_SEQ_LEN:
        raise ValueError(f"seq_len: expected at least {MIN_SEQ_LEN} for recall; got {seq_len}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: expected at least {MIN_VOCAB_SIZE} for recall; got {vocab_size}"
        )


@torch.no_grad()
def recall(
    model: Llama2, *, seq_len: int, num_rows: int, seed: int, batch_size: int = 16
) -> dict[str, float]:
    """Returns the share of scored tokens that the model predicts as the likeliest, by task.

    Raises:
        ValueError: as `check`.
    """
    check(seq_len, model.config.vocab_size)
    device = model.lm_head.weight.device
    shares = {}
    for number, (name, task) in enumerate(TASKS.items()):
        generator = np.random.default_rng([seed, number])
        rows = task.rows(generator, num_rows, seq_len, model.config.vocab_size)
        scored = slice(task.first_scored, None, task.stride)
        right = 0
        for batch in torch.from_numpy(rows).to(device).split(batch_size):
            likeliest = model(batch[:, :-1]).argmax(-1)
            # Column c is predicted at position c − 1.
            shifted = slice(task.first_scored - 1, None, task.stride)
            right += (likeliest[:, shifted] == batch[:, scored]).sum().item()
        shares[name] = right / rows[:, scored].size
    return shares
