"""Measuring decode steps: on the CPU with a simulated clock, on a GPU in earnest where one is."""

import statistics
from dataclasses import replace

import pytest
import torch
from small_llama import EAGER, small_config

from gqa_kernels import get_backend
from llama2.accounting import flops_per_token, kv_bytes_per_token, matched
from llama2.tradeoff import measured
from llama2.tradeoff.clock import Ceilings, CudaClock, measure_ceilings
from llama2.tradeoff.measured import decode_step, floor_seconds, measure_decode, random_model

CONFIG = replace(small_config(num_q_heads=4, num_kv_heads=4), max_seq_len=32)
CEILINGS = Ceilings(read_bytes_per_s=1e9, flops_per_s=1e12)
NUMBERS = ("microseconds", "microseconds_p20", "microseconds_p80", "percent_of_floor")


class SimulatedClock:
    """Calls what it is given, and answers with times that were settled beforehand."""

    name = "simulated"

    def __init__(self, samples, memory_ends_at=None):
        self.samples, self.memory_ends_at = samples, memory_ends_at
        self.captured = 0

    def capture(self, call):
        self.captured += 1
        if self.captured == self.memory_ends_at:
            raise torch.OutOfMemoryError("simulated")
        return call

    def seconds(self, call):
        call()
        return self.samples


def measure(clock, counts, batches=(1,), contexts=(8,), **options):
    options = {"ops": EAGER, "ceilings": CEILINGS, "device": "cpu"} | options
    return measure_decode(CONFIG, counts, batches, contexts, clock=clock, **options)


def test_a_row_for_every_point():
    clock = SimulatedClock([4e-6, 1e-6, 3e-6, 2e-6, 5e-6, 6e-6])
    rows = measure(clock, [1, 4], batches=[1, 3], contexts=[8, 20, 64], num_layers=1)
    points = [(row["num_kv_heads"], row["batch"], row["context"]) for row in rows]
    assert points == [(k, b, c) for k in (1, 4) for b in (1, 3) for c in (8, 20, 64)]
    assert clock.captured == 12
    for row in rows:
        assert row["tag"] == "measured"
        assert (row["gpu"], row["num_layers"]) == ("simulated", 1)
        assert (row["read_bytes_per_s"], row["flops_per_s"]) == (1e9, 1e12)
        assert row["microseconds"] == pytest.approx(3.5)
        assert row["microseconds_p20"] == pytest.approx(2)
        assert row["microseconds_p80"] == pytest.approx(5)
        one = replace(matched(CONFIG, row["num_kv_heads"], "same_ffn"), num_layers=1)
        floor = floor_seconds(one, row["batch"], row["context"], CEILINGS)
        assert row["floor_microseconds"] == pytest.approx(floor * 1e6)
        assert row["percent_of_floor"] == pytest.approx(100 * floor / 3.5e-6)


def test_points_that_do_not_fit_are_kept():
    rows = measure(SimulatedClock([1e-6, 1e-6], memory_ends_at=2), [2], contexts=[8, 16, 24])
    assert [row["tag"] for row in rows] == ["measured", "does not fit", "measured"]
    missing = rows[1]
    assert missing["context"] == 16
    assert missing["floor_microseconds"] > 0
    assert [missing[name] for name in NUMBERS] == [None] * 4
    assert {frozenset(row) for row in rows} == {frozenset(missing)}


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    clock = SimulatedClock([1e-6, 1e-6])
    clock.capture = lambda call: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure(clock, [2])


def test_the_floor_is_bytes_or_flops():
    config, batch, context = matched(CONFIG, 2, "same_ffn"), 3, 17
    model = random_model(config, EAGER, "cpu")
    weights = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    read = sum(p.nbytes for p in weights) + batch * context * kv_bytes_per_token(config)
    head = 2 * config.vocab_size * config.hidden_size
    flops = batch * (flops_per_token(config, context) - head)
    assert floor_seconds(config, batch, context, Ceilings(10.0, 1e30)) == read / 10
    assert floor_seconds(config, batch, context, Ceilings(1e30, 10.0)) == flops / 10


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_a_step_is_a_token_after_a_full_cache(num_kv_heads, monkeypatch):
    """Every call attends to the same `context` keys, of as many heads as the model has."""
    seen = []

    def decode_attention(q, keys, values, seq_lens, **options):
        seen.append((q.shape, keys.shape, values.shape, seq_lens.tolist()))
        return attend(q, keys, values, seq_lens, **options)

    attend = EAGER.decode_attention
    monkeypatch.setattr(EAGER, "decode_attention", decode_attention)
    model = random_model(matched(CONFIG, num_kv_heads, "same_ffn"), EAGER, "cpu")
    step = decode_step(model, batch=3, context=9)
    first, second = step(), step()
    assert first.dtype == torch.bfloat16
    assert first.shape == (3, 1, CONFIG.hidden_size)
    assert first.equal(second)
    cache = (3, 9, num_kv_heads, CONFIG.head_dim)
    assert seen == [((3, 1, 4, 16), cache, cache, [9, 9, 9])] * 2 * CONFIG.num_layers


def test_a_random_model_is_one():
    model = random_model(CONFIG, EAGER, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
        assert parameter.isfinite().all()
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.float().std() > 1e-3
    assert model.rope.cos.dtype == torch.float32
    assert model.rope.cos[0].eq(1).all()


def test_ceilings_are_amounts_over_medians():
    ceilings = measure_ceilings(
        SimulatedClock([1.0, 2.0, 9.0]), "cpu", read_bytes=2**12, matrix_size=8
    )
    assert ceilings == Ceilings(2**12 / 2, 2 * 8**3 / 2)


def test_sizes_out_of_range():
    clock = SimulatedClock([1e-6, 1e-6])
    with pytest.raises(
        ValueError, match=r"batches, contexts: expected at least 1 and 2; got 1 and 1"
    ):
        measure(clock, [2], contexts=[8, 1])
    with pytest.raises(ValueError, match=r"batches, contexts: .*; got 0 and 8"):
        measure(clock, [2], batches=[0])
    with pytest.raises(
        ValueError, match=r"expected at least one count, batch and context; got none"
    ):
        measure(clock, [])
    with pytest.raises(ValueError, match=r"num_kv_heads: expected a divisor .*; got 3"):
        measure(clock, [4, 3])
    assert clock.captured == 0


def test_speed_is_measured_on_a_gpu_or_not_at_all():
    with pytest.raises(RuntimeError, match=r"device: expected an NVIDIA GPU .*; got cpu"):
        measure_decode(CONFIG, [2], [1], [8], device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a clock needs a GPU")
def test_on_a_gpu():
    clock = CudaClock()
    x = torch.randn(2**24, device="cuda")
    one, four = (
        statistics.median(clock.seconds(clock.capture(lambda n=n: [x.mul_(1.0) for _ in range(n)])))
        for n in (1, 4)
    )
    assert 2 < four / one < 6
    rows = measure_decode(CONFIG, [1, 4], [2], [16, 32], clock=clock)
    assert [row["tag"] for row in rows] == ["measured"] * 4
    for row in rows:
        assert 0 < row["microseconds_p20"] <= row["microseconds"] <= row["microseconds_p80"]
        assert 0 < row["percent_of_floor"] < 100


def test_the_kernels_are_what_is_timed(device, monkeypatch):
    asked = []

    def backend(name):
        asked.append(name)
        return get_backend(name)

    monkeypatch.setattr(measured, "get_backend", backend)
    rows = measure(SimulatedClock([1e-6, 1e-6]), [2], ops=None, device=device, num_layers=1)
    assert asked == ["triton"]
    assert [row["tag"] for row in rows] == ["measured"]
