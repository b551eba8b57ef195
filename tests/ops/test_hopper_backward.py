"""The backward kernels for Hopper: when they run, and what they compute, without a GPU.

As `test_hopper_forward.py`; `make test-hopper` runs many more calls.
"""

import random
import sys

import hopper_backward
import hopper_forward
import pytest
import torch
from gluon_emulator import load
from hopper_backward import (
    Case,
    all_faults,
    as_written,
    complaints,
    draw_case,
    how_noticed,
    inputs_of,
)

from gqa_kernels import accuracy, reference
from gqa_kernels.ops.attention import backward, hopper
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime import hopper_configs, target

SM_90 = target.Target("sm_90", 132, True, 32)


@pytest.mark.parametrize("seed", range(3))
def test_random_calls(seed):
    case = draw_case(random.Random(seed))
    assert not complaints(case, seed, as_written(case, seed))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", hopper_configs.HOPPER_BACKWARD, ids=lambda row: row.head_dim)
def test_rows_of_the_table(config, fused):
    """Queries with and without keys."""
    case = Case(config, seq_len_q=257, seq_len_kv=130, fused=fused)
    assert not complaints(case, 0, as_written(case, 0))
    assert hopper_backward.shared_bytes(config, fused) <= hopper_forward.SHARED_BYTES
    assert 32 * (8 * config.consumer_registers + 4 * config.copy_registers) <= 65536


@pytest.mark.parametrize("fused", [False, True])
def test_keys_beyond_the_last_one(fused):
    """They land as zeros, and every other key has a weight near 0 before it is normalised."""
    config = hopper_configs.HOPPER_BACKWARD[0]
    case = Case(config, 1, 1, 1, 70, 70, causal=False, far=True, fused=fused)
    assert not complaints(case, 0, as_written(case, 0))


def test_the_interleaving_does_not_change_the_bits():
    case = Case(hopper_configs.HOPPER_BACKWARD[0], 1, 4, 2, 130, 150, causal=True)
    found = []
    for seed in range(2):
        inputs = {name: x.requires_grad_() for name, x in inputs_of(case, 0).items()}
        out, lse = as_written(case, seed)(**inputs, causal=True, return_lse=True)
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), list(inputs.values())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# A deadlock, statistics too early, a tile of queries that is given up too early; keys that become
# their gradient before the other consumer has read them.
SAMPLE = (
    *("release(shared.v, i", "mbarrier.wait(shared.statistics", "wait(0, deps=[dk_soon"),
    "mbarrier.wait(exchange.read, ((GROUP_SIZE",
)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=str(fault)[:60],
            marks=() if any(part in fault.text for part in SAMPLE) else pytest.mark.mutants,
        )
        for fault in all_faults()
    ],
)
def test_a_missing_synchronisation_is_noticed(fault):
    assert how_noticed(fault)


@pytest.fixture
def on_hopper(monkeypatch):
    """Makes all kernels for Hopper run in the emulator, and returns the modules by name."""
    monkeypatch.setattr(target, "current", lambda: SM_90)
    found = {}
    for modules in (hopper_forward.MODULES, *hopper_backward.LOADED):
        module = load(modules)
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(hopper, name, module, raising=False)
        found[name] = module
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for delta runs on the CPU")
def test_gradients_of_the_function(on_hopper):
    """With delta from the rounded output and its residue: keys and values have a mean."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, heads, 64) for heads in (2, 1, 1))
    inputs = {name: x.bfloat16() for name, x in (("q", q), ("k", k + 3), ("v", v + 3))}
    inputs |= {"causal": True, "softmax_scale": 0.2, "return_lse": True}
    measured = accuracy.measure_call(
        hopper.flash_attention, reference.flash_attention, inputs, ("q", "k", "v")
    )
    assert len(measured) == 5 and not [str(m) for m in measured if not m.ok]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the portable kernels run on the CPU")
def test_gradients_with_options_are_portable(on_hopper):
    """From lse and residue of the forward kernel for Hopper."""
    for name in ("dkdv", "dq"):
        on_hopper[name].__dict__.clear()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, heads, 64) for heads in (2, 1, 1))
    inputs = {name: x.bfloat16() for name, x in (("q", q), ("k", k + 3), ("v", v + 3))}
    inputs |= {"causal": True, "window": (40, None), "softcap": 3.0, "return_lse": True}
    measured = accuracy.measure_call(
        hopper.flash_attention, reference.flash_attention, inputs, ("q", "k", "v")
    )
    assert len(measured) == 5 and not [str(m) for m in measured if not m.ok]
    bounds = torch.tensor([0, 30, 95])  # and five rows after the last sequence
    inputs = {name: inputs[name][0] for name in ("q", "k", "v")} | {"return_lse": True}
    inputs |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "causal": True}
    measured = accuracy.measure_call(
        hopper.flash_attention_varlen, reference.flash_attention_varlen, inputs, ("q", "k", "v")
    )
    assert len(measured) == 5 and not [str(m) for m in measured if not m.ok]


def test_one_gradient_alone(on_hopper, monkeypatch):
    ran = []
    monkeypatch.setattr(backward, "_prepare", lambda call, dout, dlse, out, lse, residue: lse)
    for name, function in (("dq", "query_gradient"), ("dkdv", "key_value_gradients")):
        monkeypatch.setattr(
            on_hopper[name],
            function,
            lambda call, *_, name=name: ran.append(name) or (call.q if name == "dq" else call[1:3]),
        )
    q, k, v = (torch.randn(1, 8, heads, 64).half() for heads in (2, 1, 1))
    for needs, expected in (((q,), ["dq"]), ((v,), ["dkdv"]), ((q, k), ["dkdv", "dq"])):
        ran.clear()
        for x in (q, k, v):
            x.requires_grad_(any(x is y for y in needs))
        hopper.flash_attention(q, k, v).sum().backward()
        assert ran == expected
        assert all((x.grad is not None) == x.requires_grad for x in (q, k, v))
        q.grad = k.grad = v.grad = None


def test_only_measured_rows_run_without_being_asked_for(on_hopper, monkeypatch):
    ran = []
    monkeypatch.setattr(on_hopper["dq"], "query_gradient", lambda *_: ran.append("hopper"))
    monkeypatch.setattr(backward, "query_gradient", lambda *_: ran.append("portable"))
    monkeypatch.setattr(backward, "_prepare", lambda call, dout, dlse, out, lse, residue: lse)
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    call = prepared(Call(q, q, q, *[None] * 8, 0, None))
    lse, residue = torch.zeros(1, 2, 8), torch.zeros(q.shape, dtype=torch.int8)

    def run(call, **options):
        ran.clear()
        backward.launch_backward(
            call, q, None, q, lse, residue,
            need_dq=True, need_dkdv=False, need_dsinks=False, **options,
        )  # fmt: skip
        return ran

    assert run(call) == ["portable"]
    assert not any(row.measured for row in hopper_configs.HOPPER_BACKWARD)
    assert run(call, unmeasured=True) == ["hopper"]
    assert run(call._replace(softcap=2.0), unmeasured=True) == ["portable"]
    measured = tuple(row._replace(measured=True) for row in hopper_configs.HOPPER_BACKWARD)
    monkeypatch.setattr(hopper_configs, "HOPPER_BACKWARD", measured)
    assert run(call) == ["hopper"]


def test_additions_in_any_order_are_asked_for(on_hopper, monkeypatch):
    ran = []
    monkeypatch.setattr(backward, "_prepare", lambda call, dout, dlse, out, lse, residue: lse)
    for name, function in (
        *(("dq", "query_gradient"), ("dkdv", "key_value_gradients"), ("fused", "gradients")),
    ):
        monkeypatch.setattr(
            on_hopper[name],
            function,
            lambda call, *_, name=name: (
                ran.append(name) or {"dq": call.q, "dkdv": call[1:3], "fused": call[:3]}[name]
            ),
        )
    q, k, v = (torch.randn(1, 8, heads, 64).half().requires_grad_() for heads in (2, 1, 1))
    for options, frozen, expected in (
        ({}, False, ["dkdv", "dq"]),
        ({"deterministic": False}, False, ["fused"]),
        ({"deterministic": False}, True, ["dkdv"]),
    ):
        ran.clear()
        hopper.flash_attention(q.detach() if frozen else q, k, v, **options).sum().backward()
        assert ran == expected
    monkeypatch.setattr(on_hopper["fused"], "start_add", None)
    with pytest.raises(NotImplementedError, match=r"deterministic: expected True .*got False"):
        hopper.flash_attention(q, k, v, deterministic=False)


def test_a_gradient_of_wide_heads_is_refused(on_hopper):
    q = torch.zeros(1, 8, 2, 256, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"head_dim 64 or 128 with a gradient.*256"):
        hopper.flash_attention(q, q, q)
