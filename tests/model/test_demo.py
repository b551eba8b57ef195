"""`llama2 demo`: a short run of the whole, and that it notices what it is there to notice."""

import pytest
import torch

from gqa_kernels import accuracy, get_backend
from llama2 import checkpoint, cli
from llama2.checkpoint import SHIPPED
from llama2.commands import demo
from llama2.placement import place
from llama2.tokenizer import Tokenizer


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "NEW_TOKENS", 2)
    monkeypatch.setattr(demo, "CASES_PER_OP", 1)
    monkeypatch.setattr(demo, "SPEED_TOKENS", 4)


@pytest.fixture
def eager(device):
    return checkpoint.load(SHIPPED, get_backend("eager"), dtype=torch.float32, device=device)


def test_the_demo_passes_and_fits_its_width(short, device, capsys):
    assert cli.main(["demo", "--device", str(device)]) == 0
    out = capsys.readouterr().out
    assert "✓ 2 new tokens: eager and triton agree." in out
    assert "✓ every error is within its budget." in out
    for op in get_backend("triton").__all__:
        assert f"\n{op} " in out
    assert max(map(len, out.splitlines())) <= demo.WIDTH
    assert ("it says nothing about their speed" in out.lower()) == (device.type == "cpu")
    assert ("Tokens per second" in out) == (device.type == "cuda")


def test_other_tokens_are_reported_with_their_gap(eager, device, capsys):
    other = checkpoint.load(SHIPPED, get_backend("eager"), dtype=torch.float32, device=device)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1.0)  # takes the unlikeliest tokens
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model")
    assert not demo._compare_tokens(eager, other, tokenizer)
    out = capsys.readouterr().out
    tokens = torch.tensor([tokenizer.encode(demo.PROMPTS[0])], device=device)
    with torch.no_grad():
        logits = eager(tokens)[0, -1]
    assert "✗ text 1 differs at new token 1" in out and "the same ones" not in out
    assert f"{(logits.max() - logits.min()).item():.2e} lower" in out


@pytest.mark.parametrize("error", [2e-3, float("nan"), float("inf")])
def test_an_error_beyond_its_budget_fails_the_demo(error, short, device, monkeypatch, capsys):
    def measure(spec, case, dtype, device):
        wrong = spec.name == "swiglu" and dtype is torch.float16
        return [
            accuracy.Measured("output 0", 1e-4, 1e-3),
            accuracy.Measured("d x", error if wrong else 0.0, 1e-3),
        ]

    monkeypatch.setattr(accuracy, "measure", measure)
    assert not demo._compare_errors(device)
    out = capsys.readouterr().out
    assert f"{error:.1e} > 1.0e-03" in out and out.count(">") == 1
    assert "✗ an error exceeds its budget." in out


def test_the_speed_table_times_synchronised_runs(short, device, monkeypatch, capsys):
    events = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(demo.Generator, "generate", lambda *_, **__: events.append("generate"))
    eager = place("eager", str(device))
    demo._compare_speed(SHIPPED, eager, eager)
    assert events == ["synchronize", "generate", "synchronize"] * (2 * 3 * (1 + demo.SPEED_RUNS))
    heading, *_, first, second, third = capsys.readouterr().out.strip().splitlines()
    assert "Tokens per second on A GPU" in heading
    assert [row.split()[0] for row in (first, second, third)] == ["1", "8", "64"]
