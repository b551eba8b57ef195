"""Packed rows: no dialogue knows of another, and parts of a batch add up to the whole."""

from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_kernels.backends import get_backend
from llama2 import parallel
from llama2.config import ModelConfig
from llama2.finetune.encoding import Encoded
from llama2.finetune.packing import PackedDialogues, answer_loss, pack, pack_rows
from llama2.finetune.sft import held_out_loss
from llama2.model import Llama2
from llama2.targets import IGNORED
from llama2.train.distributed import Sharded, make_mesh
from llama2.train.execution import OneProcess
from llama2.train.pretrain import TrainConfig, make_optimizer, train_step

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=24,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=32,
)
LENGTHS = [9, 30, 3, 33, 17, 2, 12, 24, 5, 8, 2, 20]


def make_model(dtype=torch.float64, backend="eager"):
    torch.manual_seed(0)
    model = Llama2(MODEL, get_backend(backend)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # predictions far from uniform
    return model


def make_dialogues(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        is_trained = rng.random(length) < 0.4
        is_trained[0], is_trained[-1] = False, True
        found.append(Encoded(rng.integers(40, size=length).astype(np.int32), is_trained))
    return found


def alone(model, dialogue):
    """Σ −log p of a dialogue's answers, without anything of what is tested."""
    ids = torch.from_numpy(dialogue.ids.astype(np.int64))
    log_probs = model(ids[None, :-1])[0].log_softmax(-1)
    chosen = log_probs.gather(1, ids[1:, None])[:, 0]
    return -chosen[torch.from_numpy(dialogue.is_trained[1:])].sum()


def num_trained(dialogues):
    return sum(int(dialogue.is_trained[1:].sum()) for dialogue in dialogues)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_every_item_is_in_one_row_and_none_overflows(lengths):
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < total <= 20 for total in sums)
    # No two rows of best fit could be one, so that all but one are more than half full on average.
    assert len(rows) <= 1 + 2 * sum(lengths) / 20


def test_best_fit_takes_the_row_with_least_room():
    # Rooms are 4, 3 and 5 when the item of 3 comes: it goes to the second row, the 4 to the first.
    assert pack([16, 17, 15, 3, 4], 20) == [[1, 3], [0, 4], [2]]


@pytest.mark.parametrize("length", [0, 21])
def test_an_item_that_fits_nowhere(length):
    with pytest.raises(ValueError, match=f"lengths: expected from 1 to 20; got {length}"):
        pack([length], 20)


def test_packed_loss_and_gradients_are_those_of_the_dialogues_alone():
    model, dialogues = make_model(), make_dialogues()
    rows = pack([len(dialogue.ids) - 1 for dialogue in dialogues], 32)
    assert any(len(row) > 2 for row in rows)
    packed = answer_loss(model, pack_rows([[dialogues[n] for n in row] for row in rows], 32))
    parameters = list(model.parameters())
    found = torch.autograd.grad(packed, parameters)
    expected = sum(alone(model, dialogue) for dialogue in dialogues) / num_trained(dialogues)
    torch.testing.assert_close(packed, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-12)


def test_a_row_of_prompts_alone_has_no_gradient():
    dialogues = [replace(d, is_trained=np.zeros_like(d.is_trained)) for d in make_dialogues([9, 5])]
    rows = pack_rows([dialogues], 32)
    model = make_model()
    rows = replace(rows, predictions_per_row=1.0)
    loss = answer_loss(model, rows)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
    # Beside a row with answers it changes nothing.
    answers = make_dialogues([20], seed=1)
    both = answer_loss(model, pack_rows([dialogues, answers], 32))
    torch.testing.assert_close(
        both, answer_loss(model, pack_rows([answers], 32)), rtol=1e-12, atol=0
    )


def test_places_without_a_dialogue_are_filled_and_ignored():
    dialogues = make_dialogues([6, 4])
    rows = pack_rows([dialogues, []], 12)
    assert rows.bounds.tolist() == [[0, 5, 8, 12], [0, 12, 12, 12]]
    assert (rows.targets[0, 8:] == IGNORED).all() and (rows.targets[1] == IGNORED).all()
    expected = [
        int(id) if trained else IGNORED
        for dialogue in dialogues
        for id, trained in zip(dialogue.ids[1:], dialogue.is_trained[1:], strict=True)
    ]
    assert rows.targets[0, :8].tolist() == expected
    assert rows.cu_seqlens().tolist() == [0, 5, 8, 12, 24, 24, 24]
    assert rows.cu_seqlens().dtype == torch.int32


def test_epochs_have_every_row_once_in_another_order():
    dialogues = make_dialogues()
    data = PackedDialogues(dialogues, seq_len=32, batch_size=4, epochs=2.5, seed=3)
    assert data.steps == -(-round(2.5 * data.num_rows + 0.49) // 4)
    batches = [data.batch(step) for step in range(data.steps)]
    rows = [tuple(row) for batch in batches for row in batch.tokens.tolist() if any(row)]
    epochs = [rows[i : i + data.num_rows] for i in range(0, len(rows), data.num_rows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(epochs) == 3 and set(epochs[2]) <= set(epochs[0])
    again = PackedDialogues(dialogues, seq_len=32, batch_size=4, epochs=2.5, seed=3)
    assert torch.equal(again.batch(1).targets, batches[1].targets)
    assert again.identity() == data.identity()
    changed = [replace(dialogues[0], is_trained=~dialogues[0].is_trained), *dialogues[1:]]
    other = PackedDialogues(changed, seq_len=32, batch_size=4, epochs=2.5, seed=3)
    assert other.identity() != data.identity()
    assert data.waste == pytest.approx(1 - sum(n - 1 for n in LENGTHS) / (32 * data.num_rows))


def test_a_part_of_an_epoch_is_as_large_as_it_is_written():
    """1.1 · 10 is more than 11 in binary. And no order is drawn before its epoch comes."""
    dialogues = make_dialogues([32] * 10)
    sizes = {"seq_len": 31, "batch_size": 1, "seed": 0}
    for epochs, steps in ((1.1, 11), (0.3, 3), (0.01, 1), (1, 10), (1e8, 10**9)):
        data = PackedDialogues(dialogues, epochs=epochs, **sizes)
        assert (data.num_rows, data.steps) == (10, steps)
    assert data.batch(10**9 - 1).tokens.shape == (1, 31)


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), 1e300])
def test_epochs_that_are_none(epochs):
    with pytest.raises(ValueError, match="epochs: expected a positive number"):
        PackedDialogues(make_dialogues(), seq_len=32, batch_size=4, epochs=epochs, seed=0)


# Rows of very different numbers of predictions: a mean of their means is another loss.
UNEQUAL = [[33], [5, 4], [20], [2, 2, 2]]


def unequal():
    rng = np.random.default_rng(1)
    members = []
    for number, lengths in enumerate(UNEQUAL):
        row = make_dialogues(lengths, seed=number)
        for dialogue in row:
            share = (0.05, 1.0, 0.1, 1.0)[number]
            dialogue.is_trained[1:] = rng.random(len(dialogue.ids) - 1) < share
            dialogue.is_trained[-1] = True
        members.append(row)
    return pack_rows(members, 32)


def step_of(micro_batch_size, execution=None, model=None):
    config = TrainConfig(
        steps=1,
        batch_size=4,
        seq_len=32,
        peak_lr=1e-2,
        warmup_steps=0,
        max_grad_norm=1e9,
        micro_batch_size=micro_batch_size,
    )
    model = make_model(torch.float32) if model is None else model
    loss, norm = train_step(
        model,
        make_optimizer(model, config),
        unequal(),
        0,
        config,
        worker=model,
        objective=answer_loss,
        execution=execution or OneProcess(),
    )
    return loss, norm, model


def test_micro_batches_do_not_change_a_step():
    loss, norm, model = step_of(None)
    means = [
        answer_loss(
            make_model(torch.float32),
            replace(row, predictions_per_row=(row.targets != IGNORED).sum().item()),
        )
        for row in unequal().split(1)
    ]
    assert abs(sum(means).item() / 4 - loss) > 0.01  # the mean of means is another loss
    gradients = [parameter.grad for parameter in model.parameters()]
    for size in (1, 2):
        other, other_norm, micro = step_of(size)
        assert other == pytest.approx(loss, rel=1e-6) and other_norm == pytest.approx(
            norm, rel=1e-5
        )
        for one, two in zip(gradients, micro.parameters(), strict=True):
            torch.testing.assert_close(one, two.grad, rtol=1e-4, atol=1e-6 * norm)


def two_ranks():
    expected, norm, _ = step_of(None)
    mesh = make_mesh("cpu", 1)
    for size in (None, 1):
        model = parallel.parallelize(make_model(torch.float32), mesh)
        loss, found, _ = step_of(size, Sharded(mesh), model)
        assert loss == pytest.approx(expected, rel=1e-6) and found == pytest.approx(norm, rel=1e-5)
    dialogues = make_dialogues()
    sizes = {"seq_len": 32, "batch_size": 2}
    alone = held_out_loss(make_model(torch.float32), dialogues, **sizes, execution=OneProcess())
    model = parallel.parallelize(make_model(torch.float32), mesh)
    both = held_out_loss(model, dialogues, **sizes, execution=Sharded(mesh))
    assert both == pytest.approx(alone, rel=1e-6)


def test_ranks_do_not_change_a_step():
    ranks.run({"two ranks": two_ranks}, world_size=2)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_held_out_loss_is_a_mean_over_tokens(batch_size):
    model, dialogues = make_model(), make_dialogues()
    found = held_out_loss(
        model, dialogues, seq_len=32, batch_size=batch_size, execution=OneProcess()
    )
    with torch.no_grad():
        expected = sum(alone(model, dialogue) for dialogue in dialogues) / num_trained(dialogues)
    assert found == pytest.approx(expected.item(), rel=1e-12)
    assert model.training


def test_the_kernels_compute_the_same_loss():
    """Both backends, within the roundings of float32."""
    dialogues = make_dialogues([9, 12, 5])
    rows = pack_rows([dialogues[:2], dialogues[2:]], 24)
    exact = answer_loss(make_model(), rows)
    for backend in ("eager", "triton"):
        loss = answer_loss(make_model(torch.float32, backend), rows)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
