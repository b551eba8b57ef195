"""The pre-training recipe: its schedule, its data, and a resume that changes no bit."""

import copy
import io
import math
import os
import resource
import socket
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gqa_kernels.backends import get_backend
from llama2.cache.kv_cache import KVCache
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.storage import locked
from llama2.train import distributed, execution, pretrain
from llama2.train.data import Document, RandomWindows, random_batch
from llama2.train.pretrain import TrainConfig, learning_rate
from llama2.train.state import cut_log, read_log, save_state

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


def train(model, folder, config=CONFIG, stream=STREAM, **options):
    return pretrain.train(model, RandomWindows(stream, config), config, folder, **options)


def without_seconds(log):
    return [{**record, "seconds": 0} for record in log]


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
        ({"peak_lr": 0.0}, r"peak_lr: expected a positive number; got 0\.0"),
        ({"peak_lr": math.nan}, "peak_lr: expected a positive number; got nan"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0; got -1"),
        ({"weight_decay": -0.1}, r"weight_decay: expected at least 0; got -0\.1"),
        ({"weight_decay": math.inf}, "weight_decay: expected at least 0; got inf"),
        ({"seed": -1}, r"seed: expected from 0 to 2\^64 - 1; got -1"),
        ({"seed": 2**64}, "seed: expected from 0"),
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
    expected = train(whole, tmp_path / "whole", save_every=3)

    step = pretrain.train_step

    def killed_at_5(*args):
        if args[3] == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(pretrain, "train_step", killed_at_5)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tmp_path / "cut", save_every=3)
    assert len(read_log(tmp_path / "cut" / "log.jsonl")) == 5  # two of them after the last save
    monkeypatch.setattr(pretrain, "train_step", step)

    resumed = make_model(seed=1)
    log = train(resumed, tmp_path / "cut", save_every=3)
    assert without_seconds(log) == without_seconds(expected)
    assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)
    for name, parameter in whole.named_parameters():
        assert parameter.equal(resumed.get_parameter(name)), name


class Killed(BaseException):
    """No code of a run catches it."""


class Disk:
    """Ends a run at one of its writes: before it, in its middle, or after it."""

    def __init__(self, monkeypatch):
        self.writes = []
        self.fatal = (-1, "")
        self._patch = monkeypatch

    @contextmanager
    def _write(self, kind, half):
        number, when = self.fatal
        here = number == len(self.writes)
        self.writes.append(kind)
        if here and when == "before":
            raise Killed
        if here and when == "in the middle":
            half()
            raise Killed
        yield
        if here:
            raise Killed

    @contextmanager
    def inserted(self):
        disk, save, replace_file = self, torch.save, os.replace
        write_text, open_file = Path.write_text, Path.open

        def saved(state, path):
            with disk._write("save", lambda: path.write_bytes(b"half")):
                save(state, path)

        def replaced(source, target):
            with disk._write("replace", lambda: None):
                replace_file(source, target)

        def synced(number):
            with disk._write("fsync", lambda: None):
                pass  # a killed process leaves what it wrote, synced or not

        def wrote(path, text, **options):
            with disk._write("text", lambda: write_text(path, text[: len(text) // 2], **options)):
                write_text(path, text, **options)

        def opened(path, *args, **options):
            file = open_file(path, *args, **options)
            write = file.write

            def line(text):
                with disk._write("line", lambda: (write(text[: len(text) // 2]), file.flush())):
                    write(text)

            if args == ("a",):
                file.write = line
            return file

        with self._patch.context() as patch:
            patch.setattr(torch, "save", saved)
            patch.setattr(os, "replace", replaced)
            patch.setattr(os, "fsync", synced)
            patch.setattr(Path, "write_text", wrote)
            patch.setattr(Path, "open", opened)
            yield


def test_a_run_killed_at_any_write_has_the_same_bits(tmp_path, monkeypatch):
    """Killed twice: from nothing, and where the log has steps that no state has."""
    config = replace(CONFIG, steps=4)

    def run(name, seed=0):
        model = make_model(seed)
        return train(model, tmp_path / name, config, save_every=3), parameters(model)

    disk = Disk(monkeypatch)
    with disk.inserted():
        log, weights = run("whole")
    state = ["fsync", "save", "fsync", "replace"]
    assert disk.writes == ["text", "fsync", "replace", *["line"] * 3, *state, "line", *state]
    for number in range(len(disk.writes)):
        for when in ("before", "in the middle", "after"):
            name = f"{number} {when}"
            for _ in range(2):
                disk.fatal, disk.writes = (number, when), []
                with disk.inserted():
                    try:
                        run(name)
                    except Killed:
                        pass
                    else:  # what was left had less writes than that
                        assert len(disk.writes) <= number
            got, found = run(name)
            assert without_seconds(got) == without_seconds(log), name
            assert all(found[key].equal(value) for key, value in weights.items()), name
            left = {path.name for path in (tmp_path / name).iterdir()}
            assert left == {"state.pt", "log.jsonl"}, name


def test_a_log_that_lost_records_is_refused(tmp_path):
    train(make_model(), tmp_path)
    log = tmp_path / "log.jsonl"
    content = log.read_text(encoding="utf-8")
    log.write_text(content[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl: expected the 8 records .*; got 7"):
        train(make_model(), tmp_path)
    assert log.read_text(encoding="utf-8") == content[:-9]
    assert cut_log(tmp_path / "none", 0) == 0.0


def test_save_every_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="save_every: expected at least 1; got 0"):
        train(make_model(), tmp_path, save_every=0)


def test_finished_run_resumes_to_itself(tmp_path):
    log = train(make_model(), tmp_path)
    again = make_model(seed=1)
    assert train(again, tmp_path) == log


def test_log_has_a_line_per_step(tmp_path):
    log = train(make_model(), tmp_path)
    assert [line["step"] for line in log] == list(range(8))
    assert log[3].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert log[3]["lr"] == learning_rate(3, CONFIG)
    assert log[3]["tokens"] == 4 * 4 * 8


def test_loss_falls(tmp_path):
    log = train(make_model(), tmp_path, replace(CONFIG, steps=60))
    assert log[0]["loss"] == pytest.approx(math.log(32), rel=0.05)
    assert log[-1]["loss"] < 0.5


def test_state_of_another_run_is_refused(tmp_path):
    train(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"train_config peak_lr=0\.5; got 0\.01"):
        train(make_model(), tmp_path, replace(CONFIG, peak_lr=0.5))
    with pytest.raises(ValueError, match="stream num_tokens=639; got 640"):
        train(make_model(), tmp_path, stream=STREAM[1:])
    with pytest.raises(ValueError, match="stream crc32="):
        train(make_model(), tmp_path, stream=STREAM[::-1])
    wider = replace(MODEL, intermediate_size=32)
    with pytest.raises(ValueError, match="model_config intermediate_size=32; got 24"):
        train(make_model(config=wider), tmp_path)


def test_files_that_are_no_state(tmp_path):
    whole = train(make_model(), tmp_path) and (tmp_path / "state.pt").read_bytes()
    others = [io.BytesIO(), io.BytesIO()]
    torch.save([1, 2], others[0])
    torch.save({"step": 1}, others[1])
    for content in (b"", b"text", whole[:-1000], *(other.getvalue() for other in others)):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt: expected a saved state; got "):
            train(make_model(), tmp_path)
        assert len(read_log(tmp_path / "log.jsonl")) == 8


def test_a_full_disk_is_an_os_error_and_leaves_the_last_state(tmp_path):
    """Of a limit on the size of files, which the system's writes meet as they meet a full disk."""
    train(make_model(), tmp_path, replace(CONFIG, steps=2))
    before = (tmp_path / "state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make_model()
    arguments = (model, pretrain.make_optimizer(model, CONFIG), 1, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, hard))
    try:
        with pytest.raises(OSError, match=r"state\.pt\.partial: expected to write the state"):
            save_state(tmp_path / "state.pt", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_folder_is_locked_for_one_process(tmp_path):
    with locked(tmp_path):
        other = locked(tmp_path)  # flock asks for the open file, not for the process
        with pytest.raises(ValueError, match="expected no other run there; got one"), other:
            pass
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):  # free again
        pass


def test_failed_save_leaves_the_last_state(tmp_path, monkeypatch):
    train(make_model(), tmp_path)
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


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("max_grad_norm", [1e-3, math.inf])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_is_that_of_clipped_gradients(bf16, max_grad_norm, micro_batch_size):
    """torch's AdamW on gradients that torch clipped, in float64, is the truth of three steps; ours
    are as near to it as the same in float32 are, twice over."""
    config = replace(
        CONFIG, bf16=bf16, max_grad_norm=max_grad_norm, micro_batch_size=micro_batch_size
    )
    model = make_model()
    optimizer, worker = pretrain.make_optimizer(model, config), pretrain.make_worker(model, config)
    others = [copy.deepcopy(model), copy.deepcopy(model).double()]
    steppers = [pretrain.make_optimizer(other, replace(config, bf16=False)) for other in others]
    for step in range(3):
        batch = random_batch(STREAM, batch_size=4, seq_len=8, seed=0, step=step)
        _, norm = pretrain.train_step(model, optimizer, batch, step, config, worker)
        pairs = zip(model.parameters(), worker.parameters(), strict=True)
        found = [copied.grad if p.grad is None else p.grad for p, copied in pairs]
        if not bf16 and max_grad_norm < norm:  # the step has divided them
            found = [gradient * ((norm + 1e-6) / max_grad_norm) for gradient in found]
        for other, stepper in zip(others, steppers, strict=True):
            for weight, gradient in zip(other.parameters(), found, strict=True):
                weight.grad = gradient.to(weight.dtype, copy=True)
            torch.nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
            for group in stepper.param_groups:
                group["lr"] = pretrain.learning_rate(step, config)
            stepper.step()
    for ours, single, exact in zip(
        model.parameters(), *(o.parameters() for o in others), strict=True
    ):
        error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, single))
        assert error <= 2 * allowed + 2**-24 * exact.abs().max().item()
    for weight, copied in zip(model.parameters(), worker.parameters(), strict=True):
        assert copied.equal(weight.to(copied.dtype))


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
        config = replace(CONFIG, bf16=bf16)
        optimizer = pretrain.make_optimizer(model, config)
        worker, before = pretrain.make_worker(model, config), parameters(model)
        losses.append(pretrain.train_step(model, optimizer, batch, 0, config, worker)[0])
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.float32 and not weight.equal(before[name]), name
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)


def gradients(config, tied=False):
    model = make_model(config=replace(MODEL, tie_word_embeddings=tied))
    batch = random_batch(STREAM[::-1] // 3, batch_size=4, seq_len=8, seed=0, step=0)
    optimizer = pretrain.make_optimizer(model, config)
    worker = pretrain.make_worker(model, config)
    values = pretrain.train_step(model, optimizer, batch, 0, config, worker)
    pairs = zip(model.named_parameters(), worker.parameters(), strict=True)
    found = {name: p.grad if p.grad is not None else copied.grad for (name, p), copied in pairs}
    assert found["lm_head.weight" if not tied else "embed_tokens.weight"] is not None
    return values, found, parameters(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_activation_checkpointing_changes_no_bit(bf16, micro_batch_size, tied, monkeypatch):
    config = replace(CONFIG, bf16=bf16, micro_batch_size=micro_batch_size)
    runs = Counter()
    attention = get_backend("eager").flash_attention

    def counted(*args, **options):
        runs[checkpointing] += 1
        return attention(*args, **options)

    monkeypatch.setattr(get_backend("eager"), "flash_attention", counted)
    results = []
    for checkpointing in (False, True):
        results.append(gradients(replace(config, activation_checkpointing=checkpointing), tied))
    (values, *tensors), (other_values, *other_tensors) = results
    assert values == other_values
    for found, expected in zip(other_tensors, tensors, strict=True):
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) for name, value in expected.items())
    assert runs[True] == 2 * runs[False] > 0


def test_nothing_is_checkpointed_without_gradients_or_with_a_cache(monkeypatch):
    model, tokens = make_model(), torch.arange(6)[None]
    model.activation_checkpointing = True
    monkeypatch.setattr("llama2.decoder.checkpoint", None)
    with torch.no_grad():
        expected = model(tokens)
    cache = KVCache(MODEL, 1, 8, dtype=torch.float32, device="cpu")
    assert model(tokens, cache).equal(expected)
    with pytest.raises(TypeError):
        model(tokens)


def test_a_resumed_run_may_choose_activation_checkpointing_anew(tmp_path, monkeypatch):
    expected = train(make_model(), tmp_path / "whole")
    step = pretrain.train_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pretrain, "train_step", lambda *a: step(*a) if a[3] < 5 else 1 / 0)
        checkpointing = replace(CONFIG, activation_checkpointing=True)
        train(make_model(), tmp_path / "cut", checkpointing, save_every=2)
    assert without_seconds(train(make_model(), tmp_path / "cut")) == without_seconds(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_gradients_of_micro_batches_are_added_in_float32(tied):
    """Each is that of a model whose weights were cast; their sum is not rounded to bfloat16."""
    config = replace(CONFIG, bf16=True, micro_batch_size=1, max_grad_norm=math.inf)
    _, found, _ = gradients(config, tied)
    batch = random_batch(STREAM[::-1] // 3, batch_size=4, seq_len=8, seed=0, step=0)
    expected = {}
    for row in batch.split(1):
        model = make_model(config=replace(MODEL, tie_word_embeddings=tied)).bfloat16()
        (model.loss(row) / 4).backward()
        for name, weight in model.named_parameters():
            expected[name] = expected.get(name, 0) + weight.grad.float()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())
    assert any(not value.equal(value.bfloat16().float()) for value in found.values())


def test_a_worker_has_the_weights_of_every_step():
    config = replace(CONFIG, bf16=True)
    batches = RandomWindows(STREAM, config)
    results = []
    for keep in (False, True):
        model = make_model()
        optimizer = pretrain.make_optimizer(model, config)
        worker = pretrain.make_worker(model, config) if keep else None
        for step in range(3):
            values = pretrain.train_step(
                model, optimizer, batches.batch(step), step, config, worker
            )
        results.append(values)
    assert results[0] == results[1]


def test_non_finite_loss_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    train(make_model(), tmp_path, replace(CONFIG, steps=2))
    before = (tmp_path / "state.pt").read_bytes()
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    weights = parameters(model)
    monkeypatch.setattr(execution, "load_state", lambda *arguments: 2)
    with pytest.raises(FloatingPointError, match=r"step 2: .*; got nan and nan\. The last"):
        train(model, tmp_path, save_every=1)
    assert (tmp_path / "state.pt").read_bytes() == before
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[name]), name


def test_a_folder_is_of_one_process_or_of_several(tmp_path):
    """Each would cut the other's log."""
    expected = train(make_model(), tmp_path / "one")
    log = (tmp_path / "one" / "log.jsonl").read_bytes()
    optimizer = pretrain.make_optimizer(make_model(), CONFIG)
    several = object.__new__(distributed.Sharded)
    with pytest.raises(
        ValueError, match=r"expected the state of a run under torchrun; .*state\.pt"
    ):
        several.load(tmp_path / "one", make_model(), optimizer, {})
    assert (tmp_path / "one" / "log.jsonl").read_bytes() == log
    assert train(make_model(), tmp_path / "one") == expected
    (tmp_path / "several" / "step-3").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"expected the state of a run without torchrun; got step-3"
    ):
        train(make_model(), tmp_path / "several")


def test_the_command_on_several_processes_needs_torchrun(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.main(["--work", str(tmp_path)]) == 2
    assert (
        "llama2.train.distributed: RANK: expected a process started by torchrun"
        in capsys.readouterr().err
    )


@pytest.fixture
def alone(monkeypatch):
    """The environment of torchrun's only process, and a small corpus."""
    documents = [Document("a.py", "x = 1\n" * 99, False)]
    monkeypatch.setattr(distributed, "stdlib_documents", lambda: documents)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in (world | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))


def test_the_command_on_several_processes_writes_over_nothing(alone, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine", encoding="utf-8")
    arguments = ["--steps", "1", "--batch-size", "1", "--seq-len", "16", "--work"]
    arguments += [str(tmp_path / "work"), "--out", str(out)]
    assert distributed.main(arguments) == 2
    assert "out: expected a new or empty directory" in capsys.readouterr().err
    assert (out / "model.safetensors").read_text(encoding="utf-8") == "mine"
    (out / "model.safetensors").unlink()
    assert distributed.main(arguments) == distributed.main(arguments) == 0  # its own it may
    assert not list(out.glob(".claimed*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "llama2.train.distributed: steps: expected at least 1; got 0"),
        (["--tp", "3"], "tp: expected a divisor of the 1 processes; got 3"),
        (["--save-every", "0"], "save_every: expected at least 1; got 0"),
        (["--seq-len", "0"], "seq_len: expected at least 1"),
    ],
)
def test_a_wrong_option_on_several_processes_is_one_line(options, message, alone, tmp_path, capsys):
    assert distributed.main(["--work", str(tmp_path / "work"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
