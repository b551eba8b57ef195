"""The task "records" and paired starts: every answer follows from its row, and only from that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gqa_kernels import get_backend
from llama2.accounting import matched, num_parameters
from llama2.model import Llama2
from llama2.tradeoff.study import records
from llama2.tradeoff.study.pairing import share_start
from llama2.tradeoff.study.presets import PRESETS
from llama2.tradeoff.study.records import RecordsBatches, RecordsModel, RecordsShape

OPS = get_backend("eager")
SHAPE = RecordsShape(rows_scored=10)
VALUES, QUESTIONS = SHAPE.values, SHAPE.questions


def rows_of(fields, num_items, count=20, seed=0):
    return records.rows(np.random.default_rng(seed), count, SHAPE, fields, num_items)


def attributes_of(token, fields):
    """The attributes of an item, field by field."""
    digits = np.base_repr(token - 1, VALUES).zfill(fields)
    return [int(digit) for digit in reversed(digits)]


def answers_of(row, fields, num_items):
    """What a reader of a row's tokens knows that the answers must be."""
    items = [attributes_of(token, fields) for token in row[1 : 1 + num_items]]
    answers = []
    for token in row[1 + num_items : 1 + num_items + QUESTIONS]:
        pair, value = divmod(token - 1 - VALUES**fields, VALUES)
        given, asked = divmod(pair, fields)
        assert given != asked
        found = [item for item in items if item[given] == value]
        assert len(found) == 1
        answers.append(found[0][asked])
    return answers


@pytest.mark.parametrize("fields", [2, 3, 4])
@pytest.mark.parametrize("num_items", [2, 8])
def test_answers_follow_from_the_row(fields, num_items):
    drawn = rows_of(fields, num_items)
    config = SHAPE.config(fields)
    assert drawn.shape == (20, 1 + num_items + 2 * QUESTIONS) and drawn.dtype == np.int64
    tokens, answers = drawn[:, :-QUESTIONS], drawn[:, -QUESTIONS:]
    assert tokens.shape[1] <= config.max_seq_len
    assert (tokens[:, 0] == 0).all() and tokens.max() < config.vocab_size
    for row, expected in zip(tokens, answers, strict=True):
        assert answers_of(row, fields, num_items) == expected.tolist()


def test_every_question_and_every_answer_is_asked():
    tokens = rows_of(3, 8, count=400)
    questions = tokens[:, 9 : 9 + QUESTIONS] - 1 - VALUES**3
    pairs = {divmod(pair, 3) for pair in np.unique(questions // VALUES)}
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}
    answers = tokens[:, -QUESTIONS:]
    share = np.bincount(answers.ravel(), minlength=VALUES) / answers.size
    # Answers of a row depend on each other, at worst as though a row had one for each item.
    deviation = (1 / VALUES * (1 - 1 / VALUES) / (400 * 8)) ** 0.5
    assert abs(share - 1 / VALUES).max() < 5 * deviation


def test_batches_are_a_function_of_seed_and_step():
    data = RecordsBatches(SHAPE, 3, seed=5, batch_size=4)
    again = RecordsBatches(SHAPE, 3, seed=5, batch_size=4)
    drawn = [data.batch(step) for step in range(30)]
    assert all(torch.equal(again.batch(step), batch) for step, batch in enumerate(drawn))
    widths = {batch.shape[1] - 2 * QUESTIONS - 1 for batch in drawn}
    assert widths == set(SHAPE.items)
    assert len({batch.numpy().tobytes() for batch in drawn}) == len(drawn)
    other = RecordsBatches(SHAPE, 3, seed=6, batch_size=4)
    assert not any(torch.equal(other.batch(step), batch) for step, batch in enumerate(drawn))
    assert data.identity() != other.identity()


class Oracle(nn.Module):
    """Answers as a reader of the row does; wrongly in rows whose first item is in `wrong`."""

    def __init__(self, fields, wrong=lambda row: False):
        super().__init__()
        self.answer = nn.Linear(1, 1)
        self.fields, self.wrong = fields, wrong

    def forward(self, tokens, questions):
        logits = torch.zeros(len(tokens), questions, VALUES)
        for row, numbers in zip(logits, tokens.numpy(), strict=True):
            num_items = len(numbers) - 1 - questions
            answers = np.array(answers_of(numbers, self.fields, num_items))
            row[range(questions), (answers + self.wrong(numbers)) % VALUES] = 100.0
        return logits


def test_an_oracle_is_right_and_its_mistakes_are_counted():
    shares, bits = records.score(Oracle(3), SHAPE, 3)
    assert shares == {"2": 1.0, "4": 1.0, "6": 1.0, "8": 1.0} and bits == pytest.approx(0, abs=1e-9)
    shares, _ = records.score(Oracle(3, lambda row: row[1] % 2), SHAPE, 3)
    for num_items, share in shares.items():
        drawn = rows_of_score(int(num_items))
        assert share == (drawn[:, 1] % 2 == 0).mean()
    assert min(shares.values()) < 1


def rows_of_score(num_items):
    generator = np.random.default_rng([records._SCORED_SEED, num_items])
    return records.rows(generator, SHAPE.rows_scored, SHAPE, 3, num_items)


def test_a_guess_costs_three_bits():
    model = RecordsModel(SHAPE.config(2), VALUES, OPS)
    with torch.no_grad():
        model.answer.weight.zero_()
    _, bits = records.score(model, SHAPE, 2)
    assert bits == pytest.approx(3.0, abs=1e-6)
    batch = torch.from_numpy(rows_of(2, 4))
    assert records.loss(model, batch, QUESTIONS).item() == pytest.approx(np.log(8), abs=1e-6)


def test_the_loss_is_of_the_answers_alone():
    """Of the last tokens' states: what stands before them changes it, their own targets do."""
    torch.manual_seed(0)
    model = RecordsModel(SHAPE.config(2), VALUES, OPS)
    batch = torch.from_numpy(rows_of(2, 4))
    logits = model.answer(model.hidden_states(batch[:, :-QUESTIONS]))[:, 5:]
    chosen = logits.log_softmax(-1).gather(-1, batch[:, -QUESTIONS:, None])
    assert records.loss(model, batch, QUESTIONS).item() == pytest.approx(-chosen.mean().item())


def test_items_start_as_sums_of_their_attributes():
    torch.manual_seed(0)
    model = RecordsModel(SHAPE.config(3), VALUES, OPS)
    records.compose_items(model, SHAPE, 3)
    items = model.embed_tokens.weight[1 : 1 + VALUES**3].detach().unflatten(0, (VALUES,) * 3)
    # A change of one field adds the same vector, whatever the other fields are.
    for field in range(3):
        change = items.movedim(field, 0)
        change = (change[1:] - change[:1]).flatten(1, 2)
        assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-6)
    assert 0.09 < items.std() < 0.11


# Starts that models share.


def language_models(num_kv_heads):
    full = PRESETS["cpu"].model
    torch.manual_seed(0)
    base = Llama2(full, OPS)
    model = Llama2(matched(full, num_kv_heads, "exact"), OPS)
    drawn = {name: parameter.clone() for name, parameter in model.named_parameters()}
    share_start(model, base, full.head_dim)
    return base, model, drawn


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_models_with_fewer_heads_start_from_mha(num_kv_heads):
    base, model, drawn = language_models(num_kv_heads)
    group = 8 // num_kv_heads
    for (name, given), (_, found) in zip(
        base.named_parameters(), model.named_parameters(), strict=True
    ):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            kept = [row for row in range(64) if row // 8 % group == 0]
            assert torch.equal(found, given[kept])
        elif ".mlp." in name:
            axis = 1 if "down_proj" in name else 0
            assert torch.equal(found.narrow(axis, 0, 176), given)
            wider = found.shape[axis] - 176
            new = found.narrow(axis, 176, wider)
            assert wider > 0 and torch.equal(new, drawn[name].narrow(axis, 176, wider))
            assert new.std() > 0
        else:
            assert torch.equal(found, given)


def test_models_of_other_shapes_are_refused():
    config = PRESETS["smoke"].model
    base, other = (Llama2(replace(config, vocab_size=size), OPS) for size in (300, 301))
    message = r"embed_tokens.weight: expected the base's shape, \[300, 16\]; got \[301, 16\]"
    with pytest.raises(ValueError, match=message):
        share_start(other, base, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_match_mha_to_a_column(name):
    preset = PRESETS[name]
    for full in (preset.model, preset.records.config(3)):
        for count in {*preset.num_kv_heads, 1}:
            config = matched(full, count, "exact")
            column = 3 * config.num_layers * config.hidden_size
            assert 2 * abs(num_parameters(config) - num_parameters(full)) < column
