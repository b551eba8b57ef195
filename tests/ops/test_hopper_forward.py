"""The forward kernel for Hopper: when it runs, and what it computes, without a GPU.

The kernel runs in the emulator of Gluon, in random interleavings; `make test-hopper` runs many more
of them. `test_hopper_compile.py` reads what it compiles to.
"""

import ast
import itertools
import random
import sys
from pathlib import Path

import hopper_backward
import hopper_forward
import pytest
import torch
from hopper_forward import Case, as_written, complaints, draw_case, faults, how_noticed

from gqa_kernels import ops
from gqa_kernels.ops.attention import hopper, launch
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime import hopper_configs, layout, target

SM_90 = target.Target("sm_90", 132, True, 32)


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed):
    case = draw_case(random.Random(seed))
    assert not complaints(case, seed, as_written(case, seed))


@pytest.mark.parametrize("config", hopper_configs.HOPPER_FORWARD, ids=lambda row: str(row.head_dim))
def test_rows_of_the_table(config):
    """Blocks with and without keys, in one program."""
    case = Case(config, seq_len_q=257, seq_len_kv=130, num_programs=1)
    assert not complaints(case, 0, as_written(case, 0))
    assert hopper_forward.shared_bytes(config) <= hopper_forward.SHARED_BYTES
    consumers = 4 * config.num_consumers * config.consumer_registers
    assert 32 * (consumers + 4 * config.copy_registers) <= 65536


# One of each kind: a copy too early, a deadlock, a wait for fewer products, a store too early.
SAMPLE = ("mbarrier.wait(ring.empty", "release(shared.v, n + i", "mma_wait(0, deps=values_soon")
ALL = list(faults())


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=str(fault)[:60],
            marks=() if any(part in fault.text for part in SAMPLE) else pytest.mark.mutants,
        )
        for fault in ALL
    ],
)
def test_a_missing_synchronisation_is_noticed(fault):
    assert how_noticed(fault)


@pytest.mark.parametrize(
    ("window", "lengths"),
    [
        ((64, 0), (300, 300)),  # as causal models have it: a tile of both ends, none between them
        ((200, 30), (257, 513)),
        ((0, 0), (200, 200)),
        ((5, 3), (129, 640)),  # narrower than a tile
        ((None, 5), (300, 129)),  # queries without keys
        ((70, None), (300, 64)),
        ((2**40, 2**40), (65, 130)),  # which a call limits to 2**30
    ],
    ids=str,
)
def test_windows(window, lengths):
    config = hopper_configs.HOPPER_FORWARD[0]._replace(block_n=64)
    case = Case(config, 1, 1, 1, *lengths, causal=False, window=window, need_residue=True)
    assert not complaints(case, 0, as_written(case, 0))


def test_capped_scores():
    """Both branches of tanh, with and without a window."""
    for window in (None, (100, 0)):
        case = Case(hopper_configs.HOPPER_FORWARD[0], softcap=0.7, window=window)
        assert not complaints(case, 0, as_written(case, 0))


@pytest.mark.parametrize("need_residue", [False, True])
def test_packed_sequences(need_residue):
    """Without rows or keys, shorter and longer than a block, and rows after the last one. Tiles
    reach into NaN of the next sequence, and out is written where it belongs."""
    lengths = (30, 129, 0, 60, 1, 200), (64, 200, 100, 0, 129, 30)
    bounds = tuple(tuple(itertools.accumulate(of, initial=0)) for of in lengths)
    for causal, window in ((True, None), (False, (70, 3))):
        case = Case(
            hopper_configs.HOPPER_FORWARD[0], 1, 2, 1, 450, 550, causal=causal, window=window,
            bounds=bounds, num_programs=3, section=1, need_residue=need_residue,
        )  # fmt: skip
        assert not complaints(case, 0, as_written(case, 0))


@pytest.mark.parametrize("config", hopper_configs.HOPPER_FORWARD[:2], ids=lambda row: row.head_dim)
def test_every_operand_is_copied_where_tma_cannot_address_it(config):
    odd = torch.randn(1, 40, 1, config.head_dim + 1, dtype=torch.float32).bfloat16()[..., 1:]
    inputs = {"q": odd, "k": odd, "v": odd}
    assert not layout.fits_tma(odd)
    case = Case(config)
    out, lse = as_written(case, 0)(**inputs, causal=True, return_lse=True)
    whole = {name: x.contiguous() for name, x in inputs.items()}
    again, lse_again = as_written(case, 1)(**whole, causal=True, return_lse=True)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_a_row_has_the_same_bits_alone():
    """Whatever other rows of its block see, and however the blocks are dealt to programs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 150, heads, 64).half() for heads in (2, 1, 1))
    config = hopper_configs.HOPPER_FORWARD[0]._replace(block_n=64)
    out = as_written(Case(config), 0)(q, k, v, causal=True, return_lse=False)
    for rows in (1, 64, 149):
        one = Case(config._replace(num_consumers=3), num_programs=1)
        last = as_written(one, rows)(q[:, :rows], k[:, :rows], v[:, :rows], True, False)
        assert torch.equal(last, out[:, :rows])


def a_call(head_dim=64, dtype=torch.bfloat16, packed=False, **options):
    q = torch.zeros(8, 2, head_dim, dtype=dtype)
    bounds = torch.tensor([0, 8], dtype=torch.int32) if packed else None
    if not packed:
        q = q[None]
    call = Call(q, q, q, bounds, bounds, *[None] * 6, 0, None)
    return prepared(call._replace(**options))


def test_what_the_kernel_covers(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: SM_90)
    table = hopper_configs.HOPPER_FORWARD
    for options in (
        *({}, {"packed": True}),
        *({"window_left": 3}, {"window_right": 3}, {"softcap": 2.0}),
    ):
        call = a_call(**options)
        assert launch.hopper_config(call, table, unmeasured=True) == table[0]
        of_gradient = launch.hopper_config(call, hopper_configs.HOPPER_BACKWARD, unmeasured=True)
        assert (of_gradient is None) == bool(options)
        measured = tuple(row._replace(measured=True) for row in table)
        found = launch.hopper_config(call, measured, unmeasured=False)
        assert found == (None if options else measured[0])
        measured = tuple(row._replace(options_measured=True) for row in measured)
        assert launch.hopper_config(call, measured, unmeasured=False) == measured[0]
    call = a_call(window_left=3, softcap=2.0)
    assert launch.hopper_config(call, table, unmeasured=True) == table[0]
    for call in (
        a_call(head_dim=112),
        a_call(dtype=torch.float32),
        a_call(head_dim=128, window_left=3, softcap=2.0),
        a_call(head_dim=256, window_right=3, softcap=2.0),
        a_call(sinks=torch.zeros(2)),
        a_call(alibi_slopes=torch.ones(2)),
        a_call(key_mask=torch.ones(1, 8, dtype=torch.bool)),
        a_call(key_ranges=torch.ones(1, 8, 2, dtype=torch.int32)),
    ):
        assert launch.hopper_config(call, table, unmeasured=True) is None
    for arch in ("sm_80", "sm_100", "gfx942"):
        monkeypatch.setattr(target, "current", lambda arch=arch: SM_90._replace(arch=arch))
        assert launch.hopper_config(a_call(), table, unmeasured=True) is None


def test_only_measured_rows_run_without_being_asked_for(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: SM_90)
    ran = []
    module = hopper_forward.load(hopper_forward.MODULES)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hopper, "forward", module, raising=False)
    monkeypatch.setattr(module, "launch_forward", lambda call, *_, **__: ran.append(call))
    monkeypatch.setattr(launch.forward, "launch_forward", lambda call, **_: (call.q, None, None))
    options = {"need_lse": False, "need_residue": False}
    launch.launch_forward(a_call(), **options)
    assert not ran and not any(row.measured for row in hopper_configs.HOPPER_FORWARD)
    launch.launch_forward(a_call(), **options, unmeasured=True)
    assert len(ran) == 1
    measured = tuple(row._replace(measured=True) for row in hopper_configs.HOPPER_FORWARD)
    monkeypatch.setattr(hopper_configs, "HOPPER_FORWARD", measured)
    launch.launch_forward(a_call(), **options)
    assert len(ran) == 2


def test_asking_elsewhere_says_what_is_missing():
    q = torch.zeros(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match=r"float32, head_dim 64, on interpreter"):
        hopper.flash_attention(q, q, q)
    with pytest.raises(ValueError, match="v: expected"):
        hopper.flash_attention(q, q, q[:, :4])


def test_nothing_imports_gluon_before_it_is_asked_for():
    """`triton.experimental` may change with every version."""
    package = Path(ops.__file__).parents[1]
    folder = package / "ops" / "attention" / "hopper"
    gluons = {path for path in folder.glob("*.py") if path.name != "__init__.py"}
    assert len(gluons) == len({*hopper_forward.GLUON, *hopper_backward.GLUON})
    for path in set(package.rglob("*.py")) - gluons:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # not what functions import
            text = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
            assert "triton.experimental" not in text and "attention.hopper" not in text, path
