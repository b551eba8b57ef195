"""Tests of the bench itself. They need no GPU and time nothing."""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ceilings
import gate
import gpu
import grid
import host_time
import idle_gpu
import installed_peers
import launches
import model_grid
import peers
import pytest
import record
import report
import torch
import tune
from adapters import Backend, Lacks, make_call
from floors import Ceilings, floor
from runner import OpContest, Runner
from stub import FLUSH_SECONDS, LAUNCH_SECONDS, StubDevice
from timing import Clock, Rotation, Timed, copies_needed

from gqa_kernels import fused, reference
from gqa_kernels.runtime import configs
from llama2.reporting.document import to_markdown

BENCH = Path(__file__).resolve().parent
SAMPLE = BENCH / "sample.json"
CPU = torch.device("cpu")
TINY = {(work.op, work.pass_): work for work in grid.TINY}
TINY_IDS = {"params": grid.TINY, "ids": [work.group for work in grid.TINY]}


@pytest.fixture(scope="module", autouse=True)
def started_dry_run(tmp_path_factory):
    """Starts `gpu.py --dry-run` in an empty folder; it runs while the other tests run."""
    folder = tmp_path_factory.mktemp("dry")
    process = subprocess.Popen(
        [sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--out", "results"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield folder, process
    if process.poll() is None:
        gpu.stop(process)


# --- Floors ----------------------------------------------------------------------------------

# 4.3 TB/s and 790 TFLOP/s, against numbers worked out by hand.
ROUND_CEILINGS = Ceilings(4.3e12, 4.3e12, 790e12)
BY_GROUP = {work.group: work for work in grid.GRID}


@pytest.mark.parametrize(
    ("group", "microseconds", "bound"),
    [
        # 2 planes of 8192 x 4096 x 2 bytes; the weight is 0.01 % more
        ("rms_norm|fwd|7B-T8192", 31.2, "mem"),
        ("rms_norm|bwd|7B-T8192", 46.8, "mem"),  # 3 planes
        ("rms_norm|bwd|70B-T8192", 93.6, "mem"),
        ("rms_norm|fwd|70B-T1", 0.01143, "latency"),  # the row, its weight and its result
        ("add_rms_norm|fwd|7B-T8192", 62.4, "mem"),  # 4 planes
        ("add_rms_norm|bwd|7B-T8192", 62.4, "mem"),
        ("swiglu|fwd|7B-T8192", 125.8, "mem"),  # 3 x 8192 x 11008 x 2 bytes
        ("swiglu|bwd|70B-T8192", 546.2, "mem"),  # 5 x 8192 x 28672 x 2 bytes
        # 2 x 8192 x 64 x 128 x 2 bytes, and 8192 x 64 pairs of angles of 8 bytes
        ("apply_rope|fwd|7B-T8192", 63.4, "mem"),
        # 4 x 16384 tokens x 64 heads x 128 x 4096 / 2 pairs
        ("flash_attention|fwd|70B-B4-S4096-causal", 1392, "mma"),
        ("flash_attention|fwd|70B-B4-S4096-full", 2784, "mma"),
        ("flash_attention|bwd|70B-B2-S8192-causal", 6959, "mma"),  # 2.5 x 2784
        ("flash_attention|fwd|7B-B1-S16384-causal", 2784, "mma"),
        # 2 x 4096 keys x 32 heads x 128 x 2 bytes
        ("decode_attention|fwd|7B-B1-L4096", 15.6, "mem"),
        ("decode_attention|fwd|70B-B16-L4096", 62.5, "mem"),
        ("decode_attention|fwd|MQA-B64-L8192", 62.9, "mem"),
        # 64 tokens of (64 + 2 · 8) · 128 values of 2 bytes and 128 angles of 4 read, (64 + 3 · 8) ·
        # 128 values written: 2.8 MB.
        ("rope_append_kv|fwd|70B-B64-T1", 0.648, "latency"),
        # 2 x 8192 x 4096 x 32000 flops
        ("linear_cross_entropy|fwd|7B-T8192", 2718, "mma"),
        ("linear_cross_entropy|step|7B-T8192", 8155, "mma"),  # 3 of them
        ("linear_cross_entropy|step|7B-T8192-half", 4077, "mma"),
        ("linear_cross_entropy|step|Llama3-8B-T8192", 32684, "mma"),
    ],
)
def test_floor_is_the_hand_number(group, microseconds, bound):
    found = floor(BY_GROUP[group].cost, ROUND_CEILINGS)
    assert found.seconds * 1e6 == pytest.approx(microseconds, rel=0.01)
    assert found.bound == bound


@pytest.mark.parametrize(
    ("op", "shape", "milliseconds"),
    [
        # 6.476e9 weights of the layers and 0.131e9 of the head, 2 bytes each; 1.07e9 bytes of cache
        ("decode_step", "7B-B1-S2048", 3.32),
        # 2 x 6.476e9 x 2048 flops, and 1.1e12 of attention
        ("prefill", "7B-B1-S2048", 35.0),
    ],
)
def test_floor_of_a_model_is_the_hand_number(op, shape, milliseconds):
    work = next(w for w in model_grid.GRID if (w.op, w.shape) == (op, shape))
    assert floor(work.cost, ROUND_CEILINGS).seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_reading_is_held_to_the_rate_of_reading():
    fast_reads = Ceilings(1e12, 2e12, 1e15)
    decode, norm = BY_GROUP["decode_attention|fwd|7B-B64-L4096"], BY_GROUP["rms_norm|fwd|7B-T8192"]
    for work, rate in ((decode, 2e12), (norm, 1e12)):
        total = work.cost.read_bytes + work.cost.write_bytes
        assert floor(work.cost, fast_reads).seconds == pytest.approx(total / rate)


def test_grid_names_are_unique_and_tiers_grow():
    assert len(BY_GROUP) == len(grid.GRID)
    counts = [len(grid.select(tier, tuple(fused.__all__))) for tier in grid.TIERS]
    assert 0 < counts[0] < counts[1] < counts[2] == len(grid.GRID)


# --- The clock, on a simulated device --------------------------------------------------------


def measure(method, **contenders):
    device = next(iter(contenders.values())).device
    calls = {name: contender.call for name, contender in contenders.items()}
    return Clock(device).measure(calls, method)


def on(device, *arguments, **options):
    return SimpleNamespace(device=device, call=device.kernel(*arguments, **options))


def test_a_kernels_time_is_exact_and_cold():
    timed = measure("events", kernel=on(StubDevice(), 50e-6, warm=30e-6))["kernel"]
    assert timed.samples == pytest.approx([50e-6] * len(timed.samples))
    assert timed.host_seconds == pytest.approx(LAUNCH_SECONDS)
    assert timed.median == pytest.approx(50e-6)
    assert not timed.starved


@pytest.mark.parametrize("host", [100e-6, 1e-3, 5e-3])
def test_a_slow_host_does_not_slow_the_kernel(host):
    """The device is busy until the call is enqueued, however long that takes."""
    timed = measure("events", kernel=on(StubDevice(), 20e-6, host=host))["kernel"]
    assert timed.median == pytest.approx(20e-6)
    assert timed.host_seconds == pytest.approx(host)
    assert not timed.starved


def test_a_call_that_waits_for_the_device_is_called_starved():
    device = StubDevice()
    kernel = device.kernel(20e-6)

    def synchronising():
        kernel()
        device.synchronize()
        kernel()

    timed = Clock(device).measure({"it": synchronising}, "events")["it"]
    assert timed.starved


def test_a_graph_divides_by_its_calls_and_leaves_launches_out():
    device = StubDevice()
    rotation = Rotation([device.kernel(3e-6) for _ in range(7)])
    timed = Clock(device).measure({"it": rotation}, "graph")["it"]
    assert timed.median == pytest.approx(3e-6)


def test_end_to_end_includes_the_host():
    timed = measure("end to end", kernel=on(StubDevice(), 10e-6, host=70e-6))["kernel"]
    assert timed.median == pytest.approx(70e-6)


def test_rounds_alternate_between_contenders():
    device = StubDevice()
    calls = {name: device.kernel(1e-3, name=name) for name in "ab"}
    clock = Clock(device)
    device.log.clear()
    clock.measure(calls, "events")
    turns = [name for i, name in enumerate(device.log) if i == 0 or device.log[i - 1] != name]
    assert turns == ["a", "b"] + ["a", "b"] * clock.rounds


def test_peak_memory_is_what_the_call_allocates():
    device = StubDevice()
    device.allocated = 1000
    timed = measure("events", kernel=on(device, 1e-5, temporary_bytes=64))["kernel"]
    assert timed.peak_bytes == 64


def test_one_contenders_failure_is_its_own():
    device = StubDevice()

    def broken():
        raise RuntimeError("no such kernel")

    results = Clock(device).measure({"broken": broken, "fine": device.kernel(1e-5)}, "events")
    assert isinstance(results["broken"], RuntimeError)
    assert results["fine"].median == pytest.approx(1e-5)


def test_a_disturbed_round_counts_once():
    timed = Timed("events", rounds=[[1.0] * 5, [9.0] * 50, [1.2] * 5])
    assert timed.median == 1.2
    assert timed.spread == pytest.approx(8.0 / 1.2)
    assert [timed.quantile(share) for share in (0.0, 0.1, 0.2, 0.8)] == [1.0, 1.2, 9.0, 9.0]


def test_copies_exceed_the_cache_where_nothing_flushes_it():
    assert copies_needed(10, 1000, "graph") == 64
    assert copies_needed(1000, 1000, "graph") == 3
    assert copies_needed(10_000, 1000, "graph") == 1
    assert copies_needed(10, 1000, "events") == 2


def test_flush_is_outside_the_sample():
    device = StubDevice()
    assert measure("events", kernel=on(device, FLUSH_SECONDS / 10))[
        "kernel"
    ].median == pytest.approx(FLUSH_SECONDS / 10)


# --- Nothing is timed under another's name ---------------------------------------------------


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_group(workload, names, device):
    clock = Clock(StubDevice())
    contest = OpContest(workload, device, StubDevice.l2_bytes)
    return Runner(clock, ceilings.simulated(clock)).run(contest, names)


@pytest.mark.parametrize("key", [("rms_norm", "fwd"), ("rms_norm", "bwd")], ids="-".join)
def test_eager_cannot_be_timed_as_triton(monkeypatch, device, key):
    fake = dataclasses.replace(peers.BY_NAME["triton"], adapters=peers.of_module(reference))
    monkeypatch.setitem(peers.BY_NAME, "triton", fake)
    row = run_group(TINY[key], ["triton"], device)["triton"]
    assert row.status == "fail"
    assert "expected a launch of this package's kernels" in row.reason
    assert not row.samples


def test_triton_cannot_be_timed_as_eager(monkeypatch, device):
    fake = dataclasses.replace(peers.BY_NAME["eager"], adapters=peers.of_module(fused))
    monkeypatch.setitem(peers.BY_NAME, "eager", fake)
    row = run_group(TINY["swiglu", "fwd"], ["eager"], device)["eager"]
    assert row.status == "fail"
    assert "expected none of this package's kernels" in row.reason


def test_launches_of_every_op_are_seen(device):
    """If this fails for a new op, `launches.package_kernels` does not find its kernels."""
    for work in grid.TINY:
        if peers.BY_NAME["triton"].lacks(work.op, work.pass_) is None:
            row = run_group(work, ["triton"], device)["triton"]
            assert row.status == "ok", row.reason
            assert row.info["ours_launched"], work.group


def test_hooks_are_taken_away():
    with launches.recorded():
        pass
    assert all(not kernel.pre_run_hooks for kernel in launches.package_kernels().values())


@pytest.mark.parametrize("work", TINY_IDS["params"], ids=TINY_IDS["ids"])
def test_a_wrong_result_is_never_timed(monkeypatch, work):
    """Every output and gradient, one at a time, is wrong by 5 %, an integer by one."""

    def off(x):
        return x * 1.05 if x.is_floating_point() else x + 1

    count = 0 if work.pass_ == "bwd" else len(_eager_result(work))
    count += 0 if work.pass_ == "fwd" else len(work.spec.wrt)
    for wrong in range(count):

        def spoiled(workload, inputs, cotangents, actual, wrong=wrong, check=gate.check, **coarse):
            actual = tuple(off(x) if i == wrong else x for i, x in enumerate(actual))
            return check(workload, inputs, cotangents, actual, **coarse)

        with monkeypatch.context() as patch:
            patch.setattr(gate, "check", spoiled)
            row = run_group(work, ["eager"], CPU)["eager"]
        assert row.status == "fail"
        assert "GateError" in row.reason
        assert not row.samples


def _eager_result(work):
    inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, torch.Generator().manual_seed(0))
    return make_call(peers.BY_NAME["eager"], work.op, "fwd", inputs, (), ())()


@pytest.mark.parametrize("seq_lens", [(200, 200), (70, 200), (200, 70)], ids=str)
def test_sampled_queries_are_those_of_the_whole(seq_lens):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, seq_len, 2, 8, generator=generator, dtype=torch.float64)
        for seq_len in (seq_lens[0], seq_lens[1], seq_lens[1])
    )
    whole = reference.flash_attention(q, k, v, causal=True)
    for start in (0, 3, seq_lens[0] - 64):
        rows = slice(start, start + 64)
        part = gate._attend_rows(q, k, v, causal=True, rows=rows, seq_len_q=seq_lens[0])[0]
        torch.testing.assert_close(part, whole[:, rows])


# --- Backends --------------------------------------------------------------------------------


def test_every_backend_names_ops_of_the_table():
    assert len(peers.BY_NAME) == len(peers.BACKENDS)
    for backend in peers.BACKENDS:
        assert set(backend.adapters) <= set(fused.__all__), backend.name


def test_what_a_backend_lacks_is_a_reason():
    assert peers.BY_NAME["fa3"].lacks("rms_norm", "fwd") == "fa3 has no rms_norm"
    assert "no backward" in peers.BY_NAME["fa3"].lacks("flash_attention", "bwd")
    assert peers.BY_NAME["fa3"].lacks("flash_attention", "fwd") is None


def test_a_missing_package_is_a_reason():
    def missing():
        raise ModuleNotFoundError("No module named 'nonesuch'")

    reason = Backend("nonesuch", {}, import_check=missing, distribution="nonesuch").available()
    assert "nonesuch not usable" in reason


@pytest.mark.parametrize(
    ("work", "name"),
    [
        pytest.param(work, name, id=f"{work.group}|{name}")
        for name in ("torch", "sdpa_flash", "sdpa_default")
        for work in grid.TINY
        if peers.BY_NAME[name].lacks(work.op, work.pass_) is None
    ],
)
def test_adapters_of_torch_pass_the_gate(work, name):
    row = run_group(work, [name], CPU)[name]
    assert row.status == "ok" or "PyTorch before" in row.reason, row.reason


def test_an_adapter_may_take_views_of_what_is_differentiated():
    def of_views(inputs):
        x = inputs["x"].view_as(inputs["x"])
        return lambda: reference.rms_norm(x, inputs["weight"])

    work = TINY["rms_norm", "bwd"]
    inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, torch.Generator().manual_seed(0))
    cotangents = (torch.ones_like(inputs["x"]),)
    backend = Backend("views", {work.op: of_views})
    with torch.no_grad():
        actual = make_call(backend, work.op, "bwd", inputs, work.spec.wrt, cotangents)()
    gate.check(work, inputs, cotangents, actual)


class _Apply:
    """Stands in for an autograd Function of a peer."""

    def __init__(self, function):
        self.apply = function


def _liger_like_rope(q, k, cos, sin):
    """liger-kernel's interface: [batch, heads, seq_len, head_dim] views, angles twice, in place."""
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    rotated = reference.apply_rope(
        q.transpose(1, 2), k.transpose(1, 2), cos[0, :, :half], sin[0, :, :half]
    )
    for x, new in zip((q, k), rotated, strict=True):
        assert x.transpose(1, 2).is_contiguous()
        x.copy_(new.transpose(1, 2))
    return q, k


def _split_k_like(q, k, v, *, attn_bias, op):
    """xformers' interface: [1, tokens, kv heads, group, head_dim], padded sequences."""
    lengths, capacity = attn_bias
    batch = len(lengths)
    q = q.reshape(batch, -1, q.shape[2] * q.shape[3], q.shape[4])
    assert k.stride(3) == 0  # a group shares its key/value head
    k, v = (x[:, :, :, 0].reshape(batch, capacity, x.shape[2], x.shape[4]) for x in (k, v))
    return reference.decode_attention(q, k, v, torch.tensor(lengths)).flatten(0, 1)[None]


class _Bias:
    @staticmethod
    def from_seqlens(q_seqlen, kv_padding, kv_seqlen, device):
        assert q_seqlen == [1] * len(kv_seqlen)
        return kv_seqlen, kv_padding


def _liger_like_loss(hidden, weight, targets, bias, class_weights, ignore_index, z_loss, *rest):
    """liger-kernel's interface: (loss, z-loss, accuracy, predictions)."""
    smoothing, reduction, softcap, return_z_loss, accum_dtype = rest
    assert not (bias or class_weights or smoothing or return_z_loss)
    assert accum_dtype in (None, torch.float32)
    options = {"ignore_index": ignore_index, "reduction": reduction, "softcap": softcap}
    loss = reference.linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, **options)
    return loss, None, None, None


def _cce_like_loss(e, c, targets, bias=None, ignore_index=0, impl=None, **options):
    assert impl in ("cce", "cce_exact") and options.keys() == {"reduction", "softcap"}
    return reference.linear_cross_entropy(e, c, targets, ignore_index=ignore_index, **options)


class _PagedLike:
    """flashinfer's interface: planned from the pages of each sequence, then run on
    [batch, heads, head_dim]."""

    def __init__(self, workspace, layout, *, use_tensor_cores):
        assert layout == "NHD" and workspace.dtype == torch.uint8 and not use_tensor_cores

    def plan(self, bounds, indices, last, *heads, q_data_type, kv_data_type):
        assert {x.dtype for x in (bounds, indices, last)} == {torch.int32}
        self.heads, self.last = heads, last
        self.pages = [indices[start:end] for start, end in itertools.pairwise(bounds.tolist())]

    def run(self, q, caches):
        k, v = caches
        assert self.heads == (q.shape[1], k.shape[2], q.shape[2], k.shape[1])
        rows = []
        for query, pages, last in zip(q, self.pages, self.last.tolist(), strict=True):
            length = (len(pages) - 1) * k.shape[1] + last
            own = [x[pages.long()].flatten(0, 1)[None] for x in (k, v)]
            rows.append(reference.decode_attention(query[None, None], *own, torch.tensor([length])))
        return torch.cat(rows).squeeze(1)


class _PackedPagedLike(_PagedLike):
    """The same of packed rows."""

    def __init__(self, workspace, layout):
        super().__init__(workspace, layout, use_tensor_cores=False)

    def plan(self, bounds_q, *pages, causal, **dtypes):
        assert bounds_q.dtype == torch.int32 and causal
        self.bounds_q = bounds_q
        super().plan(*pages, **dtypes)

    def run(self, q, caches):
        capacity = max(len(pages) for pages in self.pages)
        table = torch.zeros(len(self.pages), capacity, dtype=torch.int32)
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = pages
        full = torch.tensor([len(pages) - 1 for pages in self.pages]) * caches[0].shape[1]
        return reference.prefill_attention(
            q, *caches, self.bounds_q, full + self.last, block_table=table
        )


_STANDINS = {
    "liger": {
        "_liger": SimpleNamespace(
            LigerRMSNormFunction=_Apply(lambda x, w, eps, *_: reference.rms_norm(x, w, eps)),
            LigerFusedAddRMSNormFunction=_Apply(
                lambda x, r, w, eps, *_: reference.add_rms_norm(x, r, w, eps)
            ),
            LigerSiLUMulFunction=_Apply(reference.swiglu),
            LigerRopeFunction=_Apply(_liger_like_rope),
            LigerFusedLinearCrossEntropyFunction=_Apply(_liger_like_loss),
        )
    },
    "cce": {"_cce": _cce_like_loss},
    "fa3": {
        "_fa3": SimpleNamespace(
            flash_attn_func=reference.flash_attention,
            flash_attn_varlen_func=lambda q, k, v, bounds_q, bounds_kv, *_, causal: (
                reference.flash_attention_varlen(q, k, v, bounds_q, bounds_kv, causal=causal)
            ),
            flash_attn_with_kvcache=lambda q, k, v, *, cache_seqlens, causal: (
                reference.decode_attention(q, k, v, cache_seqlens)
            ),
        )
    },
    "xformers": {
        "_xformers": SimpleNamespace(
            attn_bias=SimpleNamespace(BlockDiagonalCausalWithOffsetPaddedKeysMask=_Bias),
            memory_efficient_attention_forward=_split_k_like,
            triton_splitk=SimpleNamespace(FwOp=None),
        )
    },
    "flashinfer": {
        "_flashinfer": SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=_PagedLike,
            BatchPrefillWithPagedKVCacheWrapper=_PackedPagedLike,
        ),
    },
    "fla": {
        "_fla": (
            lambda x, w, b, *, residual=None, eps, prenorm=False: (
                reference.add_rms_norm(x, residual, w, eps)
                if prenorm
                else reference.rms_norm(x, w, eps)
            ),
            reference.swiglu,
            None,
        )
    },
}
_STANDINS["liger_float32"], _STANDINS["cce_exact"] = _STANDINS["liger"], _STANDINS["cce"]


@pytest.mark.parametrize(
    ("name", "op"), [(name, op) for name in _STANDINS for op in peers.BY_NAME[name].adapters]
)
def test_adapters_of_other_packages_pass_layouts_right(monkeypatch, name, op):
    """With stand-ins that have the peers' layouts, the forward pass or step of an adapter is within
    its error budget."""
    for loader, standin in _STANDINS[name].items():
        monkeypatch.setattr(installed_peers, loader, lambda standin=standin: standin)
    work, backend = TINY.get((op, "step"), TINY[op, "fwd"]), peers.BY_NAME[name]
    inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            actual = make_call(backend, op, work.pass_, inputs, work.spec.wrt, ())()
    except Lacks:
        assert (name, op) == ("fla", "apply_rope")
        return
    gate.check(work, inputs, (torch.ones(()),), actual, coarse=op in backend.coarse)


def test_sums_that_are_rounded_with_every_chunk_have_a_budget_of_their_own():
    tiny = TINY["linear_cross_entropy", "step"]
    sizes = {"num_tokens": 1024, "hidden_size": 32, "vocab_size": 1024, "ignored_every": None}
    work = dataclasses.replace(
        tiny, case=dataclasses.replace(tiny.case, sizes=tiny.case.sizes | sizes)
    )
    inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, torch.Generator().manual_seed(0))
    ones, by_token = (torch.ones(()),), {"reduction": "none", "ignore_index": None}
    loss, dhidden, dweight = make_call(
        peers.BY_NAME["eager"], work.op, "step", inputs, work.spec.wrt, ()
    )()
    gate.check(work, inputs, ones, (loss, dhidden, dweight))
    summed = gate._dweight_by_chunks(work, inputs)
    rounded = gate._rounded_sums(reference.linear_cross_entropy(**inputs | by_token), grid.DTYPE)[0]
    for coarse in ((rounded, dhidden, dweight), (loss, dhidden, summed)):
        gate.check(work, inputs, ones, coarse, coarse=True)
        with pytest.raises(gate.GateError):
            gate.check(work, inputs, ones, coarse)
    coarse = (loss, dhidden, summed)
    for wrong in range(3):
        spoiled = [x * 1.05 if i == wrong else x for i, x in enumerate(coarse)]
        with pytest.raises(gate.GateError):
            gate.check(work, inputs, ones, spoiled, coarse=True)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("decode_attention", {"ragged": False}),
        ("decode_attention", {"ragged": True}),
        ("prefill_attention", {"mixed": True}),
    ],
)
def test_flashinfer_reads_pages(monkeypatch, op, sizes):
    standin = _STANDINS["flashinfer"]["_flashinfer"]
    monkeypatch.setattr(installed_peers, "_flashinfer", lambda: standin)
    tiny = TINY[op, "fwd"]
    sizes = tiny.case.sizes | {"page_size": 8} | sizes
    work = dataclasses.replace(tiny, case=dataclasses.replace(tiny.case, sizes=sizes))
    inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, torch.Generator().manual_seed(0))
    actual = make_call(peers.BY_NAME["flashinfer"], work.op, "fwd", inputs, (), ())()
    gate.check(work, inputs, (), actual)
    inputs["block_table"] = inputs["block_table"].flip(0)
    with pytest.raises(gate.GateError):
        gate.check(work, inputs, (), actual)


@pytest.mark.parametrize(
    "cache", [{}, {"cache_dtype": torch.int8}, {"cache_dtype": torch.float8_e4m3fn}]
)
def test_an_append_that_goes_astray_is_refused(cache):
    tiny = TINY["rope_append_kv", "fwd"]
    work = dataclasses.replace(
        tiny, case=dataclasses.replace(tiny.case, sizes=tiny.case.sizes | cache)
    )

    def check(spoil=lambda inputs: None, wrong=lambda inputs: None):
        generator = torch.Generator().manual_seed(0)
        inputs = work.spec.make_inputs(work.case, grid.DTYPE, CPU, generator)
        gate.spoil(work, inputs)
        given = dict(inputs)
        wrong(given)
        actual = reference.rope_append_kv(**given)
        spoil(inputs)
        gate.check(work, inputs, (), actual)

    def off_by_one(inputs):
        inputs["slots"] = (inputs["slots"] + 1) % 4

    def swapped(inputs):
        inputs["k"], inputs["v"] = inputs["v"], inputs["k"]

    check()
    for wrong in (off_by_one, swapped):
        with pytest.raises(gate.GateError):
            check(wrong=wrong)
    with pytest.raises(gate.GateError, match="v stored"):
        check(spoil=lambda inputs: inputs["v_cache"].fill_(1))


def test_a_causal_mask_that_sdpa_would_misalign_is_refused():
    q, k = torch.zeros(1, 3, 2, 8), torch.zeros(1, 5, 2, 8)
    with pytest.raises(Lacks, match="top left"):
        peers._sdpa("FLASH_ATTENTION", q, k, k, causal=True)


def test_compiled_peers_cannot_fall_back_to_eager():
    def broken_graph(x):
        print("this cannot be in a graph")
        return x + 1

    with pytest.raises(Exception, match=r"graph|print|Unsupported"):
        peers.strict_compile(broken_graph, backend="eager")(torch.ones(2))

    compiled = peers.strict_compile(lambda x: x + 1, backend="eager")
    torch._dynamo.config.recompile_limit = 2
    try:
        with pytest.raises(Exception, match="recompile_limit"):
            for size in range(2, 8):
                compiled(torch.ones(size))
    finally:
        torch._dynamo.config.recompile_limit = 64
        peers.forget_compiled()


# --- Results ---------------------------------------------------------------------------------


def test_a_record_is_on_disk_after_every_row(tmp_path):
    kept = record.Record(tmp_path / "out" / "rows.json", record.DRY_RUN, {"gpu": "none"})
    head = {"op": "o", "pass": "fwd", "shape": "s"}
    kept.add(record.Row("skip", head, "because"))
    assert record.read(kept.path)["rows"] == [{"status": "skip", "reason": "because", **head}]
    again = record.Record(kept.path, record.DRY_RUN, {"gpu": "none"})
    assert again.resume() == {"o|fwd|s"}
    again.add(record.Row("ok", head))
    assert len(record.read(kept.path)["rows"]) == 2
    with pytest.raises(ValueError, match="expected a file of another"):
        record.Record(kept.path, record.DRY_RUN, {"gpu": "another"}).resume()


@pytest.fixture(scope="module")
def sample():
    return record.read(SAMPLE)


def test_the_sample_cannot_be_taken_for_a_result(sample):
    assert "sample" in sample["kind"] and "not a measurement" in sample["environment"]["gpu"]
    page = to_markdown(report.TITLE, report.build(sample))
    assert "INVENTED NUMBERS" in page and "No number on this page is a result" in page
    assert "measured)*" not in page and "*(simulated)*" in page
    real = to_markdown(report.TITLE, report.build(sample | {"kind": record.MEASUREMENT}))
    assert "*(measured)*" in real and "simulated" not in real


def test_report_lists_losses_first_and_every_backend(sample):
    page = to_markdown(report.TITLE, report.build(sample))
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Losses"
    losses = report.losses(sample["rows"])
    ratios = [ratio for ratio, _, _ in losses]
    assert ratios == sorted(ratios)
    # six of attention against cuDNN (1.6 / 2.0), one of RMSNorm against torch.compile (1.1 / 1.25)
    assert ratios == pytest.approx([1.6 / 2.0] * 6 + [1.1 / 1.25])
    assert "| rms\\_norm | fwd | 70B-T8192 | 250 | compile | 220 | 0.88 |" in page
    # 1.5 / 1.25 twice and 1.1 / 1.25
    assert report.geometric_mean([1.2, 1.2, 0.88]) == pytest.approx(1.0821, abs=1e-4)
    assert "1.08 (3)" in page and "51,200" in page
    assert "liger-kernel not usable (sample)" in page and "GateError" in page
    assert "- torch rounds its sums (sample)." in page and "| 64,425 | mma | 80,000 " in page


def test_a_difference_within_the_noise_is_no_loss(sample):
    rows = [dict(row) for row in sample["rows"] if row["status"] == "ok"]
    for row in rows:
        row["noise"] = 0.3
    assert report.losses(rows) == []


def test_the_page_of_the_sample_needs_no_other_file(sample, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib not installed")
    page = report.write(sample, tmp_path).read_text(encoding="utf-8")
    names = {"attention_fwd_70B", "rms_norm_fwd", "decode_70B_B1", "roofline"}
    assert {f"{name}.svg" for name in names} == {file.name for file in tmp_path.glob("*.svg")}
    assert page.count("<svg") == len(names)
    assert not re.search(r'\b(src|href)="(?!#)', page)  # links within the page alone
    headings = re.findall(r'<h2 id="([^"]+)">', page)
    assert [f"#{each}" for each in headings] == re.findall(r'<a href="([^"]+)">', page)
    assert len(set(headings)) == len(headings)
    for fact in ("Imaginary GPU", "commit", "driver", "triton", "0.0.sample"):
        assert fact in page[: page.index("<nav>")]


def test_legends_cover_no_data(sample):
    plots = pytest.importorskip("plots", reason="matplotlib not installed")
    ok = [row for row in sample["rows"] if row["status"] == "ok"]
    figure = plots._roofline(ok, sample["ceilings"])
    figure.draw_without_rendering()
    [legend], [axes] = figure.legends, figure.axes
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_report_replaces_no_file_of_something_else(sample, tmp_path):
    (tmp_path / "report.md").write_text("# Notes\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"out: expected a directory .* report\.md is of"):
        report.write(sample, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a result file"):
        record.read(tmp_path / "x.json")


def _changed(content, place, value):
    """A copy with another entry at a path of keys; without it for `...`."""
    content = copy.deepcopy(content)
    *path, last = place
    inner = content
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("rows",), ..., "results: expected an entry 'rows'; got none"),
        (("kind",), None, "kind: expected str; got None"),
        (("ceilings", "copy_bytes_per_s"), ..., "ceilings: expected an entry 'copy_bytes_per_s'"),
        (("rows", 0), 1, r"rows\[0\]: expected dict; got 1"),
        (("rows", 0, "status"), "okay", r"rows\[0\]\.status: expected one of ok, skip, fail"),
        (("rows", 0, "median_us"), math.nan, r"rows\[0\]\.median_us: expected a finite number"),
        (("rows", 0, "median_us"), 0, r"rows\[0\]\.median_us: expected 1e-12 to 1e\+30; got 0"),
        (("rows", 0, "noise"), ..., r"rows\[0\]: expected an entry 'noise'; got none"),
        (("rows", 0, "power_w"), "x", r"rows\[0\]\.power_w: expected a finite number; got 'x'"),
    ],
)
def test_a_damaged_file_is_a_users_error(place, value, message, sample, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(_changed(sample, place, value)), encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(file), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"{re.escape(str(file))}: expected a result file of .*; {message}", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", (b"[" * 100_000, b"\xff", b'{"schema": 1', None))
def test_a_file_that_cannot_be_read_is_named(text, tmp_path, capsys):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert str(file) in capsys.readouterr().err.splitlines()[-1]


def test_names_in_a_file_are_no_markup(sample, tmp_path):
    """And a file without a timed row makes a page too."""
    for name in ("op", "shape", "backend", "bound", "method", "note"):
        rows = [row | {name: "<img src=x>"} for row in sample["rows"]]
        page = report.write(sample | {"rows": rows, "ceilings": None}, tmp_path / name)
        assert "<img" not in page.read_text(encoding="utf-8")
    nothing = report.write(sample | {"rows": [], "ceilings": None}, tmp_path / "none")
    assert "None beyond the noise." in nothing.read_text(encoding="utf-8")


# --- Tuning ----------------------------------------------------------------------------------


def test_a_patch_of_an_unknown_table_is_refused_and_nothing_stays():
    before = configs.SWIGLU_BLOCK
    with pytest.raises(AttributeError), tune.patched({"SWIGLU_BLOCK": 1, "NO_SUCH_TABLE": 1}):
        pass
    with tune.patched({"SWIGLU_BLOCK": 256}):
        assert configs.SWIGLU_BLOCK == 256
    assert before == configs.SWIGLU_BLOCK


@pytest.mark.parametrize("name", tune.SWEEPS)
def test_sweeps_reach_the_tables(name):
    """Every patch names existing tables; every row is valid Python or a comment."""
    for sweep in tune.SWEEPS[name]():
        values = sweep.patch(sweep.candidates[0])
        assert all(hasattr(configs, table) for table in values)
        compile(sweep.row(sweep.candidates[0]), name, "exec")


def test_a_sweep_proposes_the_fastest_right_candidate(monkeypatch, device):
    sweep = next(s for s in tune.tiny_sweeps() if s.workload.op == "rms_norm")
    clock = Clock(StubDevice())
    with torch.no_grad():
        outcomes = tune.run_sweep(sweep, clock, device)
    assert [o.candidate for o in outcomes] == list(sweep.candidates)
    assert sweep.row(sweep.candidates[0]) in tune.describe(sweep, outcomes)
    right = gate.check

    def wrong_for_one_warp(*arguments, **coarse):
        if configs.NORM_FORWARD[0].num_warps == 1:
            raise gate.GateError("wrong")
        return right(*arguments, **coarse)

    monkeypatch.setattr(gate, "check", wrong_for_one_warp)
    with torch.no_grad():
        outcomes = tune.run_sweep(sweep, clock, device)
    assert [o.seconds is None for o in outcomes] == [False, True]
    assert "GateError" in outcomes[1].reason


# --- What a call costs the host --------------------------------------------------------------


@pytest.mark.skipif(idle_gpu.compiler() is None, reason="no C compiler for the idle GPU's libcuda")
def test_host_time_without_a_gpu():
    """In a process in which Triton compiles: ours and PyTorch's, both passes, in units of empty
    launches."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (str(BENCH / "host_time.py"), "--op", "rms_norm", "--rounds", "2")
    done = subprocess.run(
        [sys.executable, *command, "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    launched = {(row["pass_"], row["name"]): row["launches"] for row in content["rows"]}
    for pass_, ours in ((host_time.FORWARD, 1), (host_time.BOTH, 3)):
        assert launched[pass_, host_time.UNIT] == 1
        assert launched[pass_, "triton"] == ours
        assert launched[pass_, "torch"] == 0
    assert all(row["microseconds"] > 0 for row in content["rows"])
    page = host_time.markdown(content)
    assert content["environment"]["commit"] in page
    for row in content["rows"]:
        if row["name"] == "triton":
            cell = f"{row['units']:.1f} ({row['launches']})"
            assert f"| rms_norm | {row['pass_']} | {cell} |" in page
        if row["name"] == host_time.UNIT:
            assert row["units"] == 1


def test_host_time_knows_every_op_that_a_model_calls():
    left_out = {"flash_attention_varlen", "linear_cross_entropy", "token_log_probs", "adamw_update"}
    assert set(host_time.SIZES) | left_out == set(fused.__all__)


# --- The one command -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(started_dry_run):
    folder, process = started_dry_run
    output, _ = process.communicate(timeout=600)
    return folder / "results", process.returncode, output


def test_dry_run_goes_through_every_stage(dry_run):
    out, code, output = dry_run
    logs = "\n".join(file.read_text(encoding="utf-8")[-2000:] for file in out.glob("*.log"))
    assert code == 0, f"{output}\n{logs}"
    state = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    assert [state[stage.name]["status"] for stage in gpu.STAGES] == ["done"] * len(gpu.STAGES)
    plan = (out / "plan.md").read_text(encoding="utf-8")
    assert plan.count("| done |") == len(gpu.STAGES)
    for name in ("ours/report.html", "peers/report.html", "ceilings.json", "tuning.json"):
        assert (out / name).exists() and name in plan


def test_dry_run_shows_no_time_as_a_kernels(dry_run):
    out, _, _ = dry_run
    for name in ("ours", "peers"):
        content = record.read(out / f"{name}.json")
        assert content["kind"] == record.DRY_RUN
        assert content["environment"]["gpu"] == StubDevice.name
        page = (out / name / "report.md").read_text(encoding="utf-8")
        assert "SIMULATED TIMES, NOT A MEASUREMENT" in page
    ok = [row for row in record.read(out / "peers.json")["rows"] if row["status"] == "ok"]
    assert {row["backend"] for row in ok} >= {"triton", "eager", "torch", "sdpa_flash"}
    assert {row["pass"] for row in ok} == {"fwd", "bwd", "step"}
    noted = {row["backend"]: row["note"] for row in ok if row["note"]}
    assert all(f"- {backend} {note}." in page.replace("\\", "") for backend, note in noted.items())
    assert bool(noted) == hasattr(torch.nn.functional, "linear_cross_entropy")
    # pytest-benchmark reports the samples unchanged.
    raw = out / "peers_samples.json"
    if raw.exists():
        for entry in json.loads(raw.read_text(encoding="utf-8"))["benchmarks"]:
            assert entry["stats"]["median"] == pytest.approx(
                entry["extra_info"]["median_us"] * 1e-6, rel=0.01
            )
            assert entry["group"].startswith("SIMULATED TIMES|")


def test_done_stages_are_not_run_again(dry_run, monkeypatch):
    out, _, _ = dry_run
    monkeypatch.setattr(gpu, "run_stage", lambda *_: pytest.fail("ran a stage that was done"))
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0


def test_a_stage_is_stopped_when_its_time_is_up(monkeypatch, tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu.Stage, "command", lambda *_: sleeper)
    assert gpu.run_stage(gpu.STAGES[0], tmp_path, 1.0, dry=True)["status"] == "cut short"
