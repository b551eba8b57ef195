"""The recall tasks: every scored token follows from its row, and no other does."""

import numpy as np
import pytest
import torch
from torch import nn

from llama2.evaluation import recall
from llama2.evaluation.recall import BOS, COPY_LENGTH, FIRST_BYTE, NUM_KEYS, NUM_VALUES, TASKS

VOCAB_SIZE, SEQ_LEN = 1024, 49  # an odd length cuts the last question in two


def rows_of(name, num_rows=40, seed=0):
    return TASKS[name].rows(np.random.default_rng(seed), num_rows, SEQ_LEN, VOCAB_SIZE)


def answer(name, row, column):
    """What a reader of the columns before `column` knows that it must be."""
    if name == "copy":
        return row[column - COPY_LENGTH]
    pairs = row[1 : 1 + NUM_KEYS] - FIRST_BYTE
    value_of = dict(zip(pairs // NUM_VALUES, pairs % NUM_VALUES, strict=True))
    key = row[column - 1] - (VOCAB_SIZE - NUM_VALUES - NUM_KEYS)
    return VOCAB_SIZE - NUM_VALUES + value_of[key]


@pytest.mark.parametrize("name", TASKS)
def test_scored_tokens_follow_from_the_row(name):
    task, rows = TASKS[name], rows_of(name)
    assert rows.shape == (40, SEQ_LEN + 1) and (rows[:, 0] == BOS).all()
    assert rows.min() >= 0 and rows.max() < VOCAB_SIZE
    scored = range(task.first_scored, SEQ_LEN + 1, task.stride)
    assert len(scored) >= 20
    for row in rows:
        for column in scored:
            assert row[column] == answer(name, row, column)


def test_lookups_have_every_key_once():
    pairs = rows_of("lookup")[:, 1 : 1 + NUM_KEYS] - FIRST_BYTE
    assert (np.sort(pairs // NUM_VALUES) == np.arange(NUM_KEYS)).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_chance_level_is_that_of_a_guess(name):
    task, rows = TASKS[name], rows_of(name, 400)
    scored = rows[:, task.first_scored :: task.stride]
    guess = np.random.default_rng(1).permuted(scored.ravel())  # as often as they occur
    deviation = (task.chance * (1 - task.chance) / scored.size) ** 0.5
    # A string is asked for again and again, so that its letters are drawn 16 times, not 33 a row.
    assert abs((guess == scored.ravel()).mean() - task.chance) < 5 * deviation


class Oracle(nn.Module):
    """Answers as `answer` says, or one more where it should be wrong."""

    def __init__(self, wrong=lambda row, column: False):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": VOCAB_SIZE})
        self.lm_head = nn.Linear(1, 1)
        self.wrong = wrong

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, VOCAB_SIZE)
        for row, numbers in zip(logits, tokens.numpy(), strict=True):
            name = "copy" if numbers[1 + COPY_LENGTH] < FIRST_BYTE + 32 else "lookup"
            task = TASKS[name]
            for column in range(task.first_scored, SEQ_LEN + 1, task.stride):
                likeliest = answer(name, np.append(numbers, 0), column)
                row[column - 1, likeliest - self.wrong(numbers, column)] = 1
        return logits


def test_an_oracle_scores_all_and_its_mistakes_are_counted():
    asked = {"seq_len": SEQ_LEN, "num_rows": 20, "seed": 3}
    assert recall.recall(Oracle(), **asked) == {"lookup": 1.0, "copy": 1.0}
    late = recall.recall(Oracle(lambda row, column: column >= 40), **asked)
    for name, task in TASKS.items():
        scored = range(task.first_scored, SEQ_LEN + 1, task.stride)
        assert late[name] == sum(column < 40 for column in scored) / len(scored)


def test_questions_are_a_function_of_the_seed():
    assert (rows_of("lookup") == rows_of("lookup")).all()
    assert (rows_of("lookup") != rows_of("lookup", seed=1)).any()


def test_too_small_a_model_is_refused():
    with pytest.raises(ValueError, match="seq_len: expected at least 32 for recall; got 31"):
        recall.check(31, VOCAB_SIZE)
    with pytest.raises(ValueError, match="vocab_size: expected at least 155 for recall; got 154"):
        recall.check(32, 154)
