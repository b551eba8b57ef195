"""The pre-training recipe: its schedule, its data, and a resume that changes no bit."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gqa_kernels.backends import get_backend
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.train import pretrain
from llama2.train.data import random_batch
from llama2.train.pretrain import TrainConfig, learning_rate, train
from llama2.train.state import read_log, save_state

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_seq_len=32,
)
CONFIG = TrainConfig(steps=8, batch_size=4, seq_len=8, peak_lr=1e-2, warmup_steps=2)
STREAM = np.tile(np.arange(32, dtype=np.int32), 20)


def make_model(seed=0, config=MODEL):
    torch.manual_seed(seed)
    return Llama2(config, get_backend("eager"))


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_learning_rate_of_the_paper():
    config = TrainConfig(steps=10_001, batch_size=1, seq_len=1)
    assert learning_rate(0, config) == pytest.approx(3e-4 / 2000)
    assert learning_rate(1999, config) == pytest.approx(3e-4)
    assert learning_rate(2000, config) == pytest.approx(3e-4)
    assert learning_rate(6000, config) == pytest.approx(3e-4 * 0.55)
    assert learning_rate(10_000, config) == pytest.approx(3e-5)


def test_learning_rate_of_a_run_shorter_than_its_warm_up():
    config = TrainConfig(steps=10, batch_size=1, seq_len=1)
    assert learning_rate(9, config) == pytest.approx(3e-4 * 10 / 2000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1; got 0"),
        ({"micro_batch_size": 3}, r"micro_batch_size: expected a divisor of batch_size \(4\)"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_only_matrices_decay():
    model = make_model()
    decayed, others = pretrain.make_optimizer(model, CONFIG).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.95), 1e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_killed_and_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    whole = make_model()
    expected = train(whole, STREAM, CONFIG, tmp_path / "whole", save_every=3)

    step = pretrain.train_step

    def killed_at_5(model, optimizer, batch, number, config):
        if number == 5:
            raise KeyboardInterrupt
        return step(model, optimizer, batch, number, config)

    monkeypatch.setattr(pretrain, "train_step", killed_at_5)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), STREAM, CONFIG, tmp_path / "cut", save_every=3)
    assert len(read_log(tmp_path / "cut" / "log.jsonl")) == 5  # two of them after the last save
    monkeypatch.setattr(pretrain, "train_step", step)

    resumed = make_model(seed=1)
    log = train(resumed, STREAM, CONFIG, tmp_path / "cut", save_every=3)
    for got, want in zip(log, expected, strict=True):
        assert {**got, "seconds": 0} == {**want, "seconds": 0}
    assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)
    for name, parameter in whole.named_parameters():
        assert parameter.equal(resumed.get_parameter(name)), name


def test_finished_run_resumes_to_itself(tmp_path):
    log = train(make_model(), STREAM, CONFIG, tmp_path)
    again = make_model(seed=1)
    assert train(again, STREAM, CONFIG, tmp_path) == log


def test_log_has_a_line_per_step(tmp_path):
    log = train(make_model(), STREAM, CONFIG, tmp_path)
    assert [line["step"] for line in log] == list(range(8))
    assert log[3].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert log[3]["lr"] == learning_rate(3, CONFIG)
    assert log[3]["tokens"] == 4 * 4 * 8


def test_loss_falls(tmp_path):
    log = train(make_model(), STREAM, replace(CONFIG, steps=60), tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(32), rel=0.05)
    assert log[-1]["loss"] < 0.5


def test_state_of_another_run_is_refused(tmp_path):
    train(make_model(), STREAM, CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"train_config peak_lr=0\.5; got 0\.01"):
        train(make_model(), STREAM, replace(CONFIG, peak_lr=0.5), tmp_path)
    with pytest.raises(ValueError, match="stream num_tokens=639; got 640"):
        train(make_model(), STREAM[1:], CONFIG, tmp_path)
    with pytest.raises(ValueError, match="stream crc32="):
        train(make_model(), STREAM[::-1], CONFIG, tmp_path)
    wider = replace(MODEL, intermediate_size=32)
    with pytest.raises(ValueError, match="model_config intermediate_size=32; got 24"):
        train(make_model(config=wider), STREAM, CONFIG, tmp_path)


def test_failed_save_leaves_the_last_state(tmp_path, monkeypatch):
    train(make_model(), STREAM, CONFIG, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", full_disk)
    model = make_model()
    optimizer = pretrain.make_optimizer(model, CONFIG)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path / "state.pt", model, optimizer, 1, {})
    assert (tmp_path / "state.pt").read_bytes() == before


def test_gradients_are_clipped_and_their_norm_reported():
    batch = random_batch(STREAM, batch_size=4, seq_len=8, seed=0, step=0)
    model = make_model()
    config = replace(CONFIG, max_grad_norm=1e-3)
    optimizer = pretrain.make_optimizer(model, config)
    _, norm = pretrain.train_step(model, optimizer, batch, 0, config)
    clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm > 0.1
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_micro_batches_equal_the_batch():
    batch = random_batch(STREAM, batch_size=4, seq_len=8, seed=0, step=0)
    losses, gradients = [], []
    for micro_batch_size in (None, 2, 1):
        model = make_model()
        config = replace(CONFIG, micro_batch_size=micro_batch_size)
        optimizer = pretrain.make_optimizer(model, config)
        losses.append(pretrain.train_step(model, optimizer, batch, 0, config)[0])
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[1:] == pytest.approx([losses[0]] * 2)
    for accumulated in gradients[1:]:
        torch.testing.assert_close(accumulated, gradients[0])


def test_bf16_runs_in_bfloat16_and_updates_float32():
    batch = random_batch(STREAM, batch_size=4, seq_len=8, seed=0, step=0)
    seen = []
    losses = []
    for bf16 in (False, True):
        model = make_model()
        model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out[0].dtype))
        optimizer = pretrain.make_optimizer(model, CONFIG)
        config = replace(CONFIG, bf16=bf16)
        losses.append(pretrain.train_step(model, optimizer, batch, 0, config)[0])
        assert all(
            weight.dtype == weight.grad.dtype == torch.float32 for weight in model.parameters()
        )
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)


def test_non_finite_loss_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    train(make_model(), STREAM, replace(CONFIG, steps=2), tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    weights = parameters(model)
    monkeypatch.setattr(pretrain, "load_state", lambda *arguments: 2)
    with pytest.raises(FloatingPointError, match=r"step 2: .*; got nan and nan\. The last"):
        train(model, STREAM, CONFIG, tmp_path, save_every=1)
    assert (tmp_path / "state.pt").read_bytes() == before
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[name]), name
