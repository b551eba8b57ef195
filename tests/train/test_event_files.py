"""`--tensorboard`: the numbers of the log as scalars, each step once however often a run stops."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama2.checkpoint import SHIPPED_CHAT
from llama2.cli import main
from llama2.train.execution import OneProcess
from llama2.train.loop import run_steps

SAVE_EVERY = 3


class Killed(Exception):
    pass


def train(folder, num_steps, killed_at=None, execution=OneProcess()):  # noqa: B008
    """A run of the loop whose steps cost nothing."""
    model = nn.Linear(1, 1)

    def do_step(step):
        if step == killed_at:
            raise Killed
        return {"loss": 10.0 - step, "value_loss": None, "name": "text"}

    optimizer = torch.optim.SGD(model.parameters())
    settings = {"save_every": SAVE_EVERY, "execution": execution}
    return run_steps(
        folder / "work",
        model,
        optimizer,
        {},
        num_steps,
        do_step,
        **settings,
        tensorboard=folder / "events",
    )


class Writer:
    """SummaryWriter's part that a run uses: what it was told is in `calls`."""

    calls = ()

    def __init__(self, folder, *, purge_step, flush_secs):
        self.calls.append(("open", folder.name, purge_step))

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))

    def flush(self):
        self.calls.append("flush")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls.append("close")


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(Writer, "calls", [])
    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return Writer.calls


def losses(calls):
    return [call for call in calls if call[0] == "loss"]


def test_scalars_are_the_numbers_of_the_log(calls, tmp_path):
    log = train(tmp_path, 4)
    assert calls[0] == ("open", "events", 0) and calls[-1] == "close"
    assert losses(calls) == [("loss", line["loss"], line["step"]) for line in log]
    scalars = {call[0] for call in calls if isinstance(call, tuple)} - {"open"}
    assert scalars == {"loss", "seconds"}  # neither None nor text, nor the step itself


def test_scalars_are_flushed_before_each_state(calls, tmp_path):
    """Otherwise a killed run would lack the scalars of steps that it does not repeat."""
    with pytest.raises(Killed):
        train(tmp_path, 9, killed_at=SAVE_EVERY + 1)
    assert calls.index("flush") == calls.index(("loss", 8.0, 2)) + 2  # after that step's seconds


def test_a_resumed_run_drops_the_scalars_that_it_writes_again(calls, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, 9, killed_at=5)
    assert [step for *_, step in losses(calls)] == [0, 1, 2, 3, 4]
    calls.clear()
    train(tmp_path, 9)
    assert calls[0] == ("open", "events", SAVE_EVERY)
    assert [step for *_, step in losses(calls)] == [3, 4, 5, 6, 7, 8]
    calls.clear()
    train(tmp_path, 9)
    assert not calls  # nothing is left to do


def test_one_process_of_several_writes(calls, tmp_path):
    class Other(OneProcess):
        speaks = False

    train(tmp_path, 2)
    calls.clear()
    (tmp_path / "work" / "state.pt").unlink()
    train(tmp_path, 4, execution=Other())
    assert not calls


def test_tensorboard_reads_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        train(tmp_path, 9, killed_at=5)
    log = train(tmp_path, 9)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert read == [(line["step"], line["loss"]) for line in log]


@pytest.mark.parametrize("command", ["pretrain", "sft", "reward", "ppo"])
def test_a_missing_tensorboard_is_known_before_the_run(command, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    data = tmp_path / "data.jsonl"
    data.touch()
    needed = {
        "pretrain": ["--steps", "9", "--text", str(data)],
        "sft": ["--data", str(data)],
        "reward": ["--data", str(data)],
        "ppo": ["--data", str(data), f"--init={SHIPPED_CHAT}", f"--reward={SHIPPED_CHAT}"],
    }
    folders = [f"--{name}={tmp_path / name}" for name in ("work", "out", "tensorboard")]
    more = {"pretrain": ["--warmup-steps", "0"], "ppo": ["--max-new-tokens", "8"]}
    status = main(
        [command, *folders, *needed[command], *more.get(command, ()), "--backend", "torch"]
    )
    assert status == 2 and list(tmp_path.iterdir()) == [data]
    assert capfd.readouterr().err.splitlines()[-1] == (
        "llama2: --tensorboard needs tensorboard; from a clone of gqa-kernels: "
        'pip install ".[tensorboard]"'
    )
