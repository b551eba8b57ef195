"""Two tasks that ask a model for what stands earlier in its own context, token for token.

The loss on text hides a small model's lost capacity to remember: most tokens need no more than the
last few. Here every scored token is random, and can be known from the keys and values alone.

- lookup: BOS, NUM_KEYS pairs in random order, each of them one token, no key twice; then a key and
  its value, again and again. Scored: the values.
- copy: BOS, a random string of COPY_LENGTH tokens again and again. Scored: all but the first time.

The ids are those of Llama's byte pieces and the vocabulary's last, which text hardly uses; rows of
the tasks belong to the training data of the models that they are asked of. After the associative
recall of Arora et al. 2023, arXiv:2312.04927.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llama2.model import Llama2

NUM_KEYS, NUM_VALUES = 8, 16
COPY_LENGTH, NUM_LETTERS = 16, 32
BOS = 1
FIRST_BYTE = 3  # of Llama's 256 byte pieces
MIN_VOCAB_SIZE = FIRST_BYTE + NUM_KEYS * NUM_VALUES + NUM_KEYS + NUM_VALUES
MIN_SEQ_LEN = 2 * COPY_LENGTH

Rows = Callable[[np.random.Generator, int, int, int], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A kind of row, int64 `[num_rows, seq_len + 1]` of (generator, num_rows, seq_len, vocab_size).

    Columns `first_scored`, `first_scored + stride`, … are scored; `chance` is the share of them
    that a guess among all that is possible there gets right.
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
    """Raises ValueError if rows of `seq_len` tokens of that vocabulary cannot hold the tasks."""
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
    """Returns the share of scored tokens that are the model's likeliest, by task.

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
            # The prediction of column c stands at c − 1.
            shifted = slice(task.first_scored - 1, None, task.stride)
            right += (likeliest[:, shifted] == batch[:, scored]).sum().item()
        shares[name] = right / rows[:, scored].size
    return shares
