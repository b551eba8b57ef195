"""Every op of the table as it is compiled, executed without a GPU.

`ptx_emulator.check` runs the small cases in a process of its own, one per architecture and dtype:
results, gradients, data races, missing waits and fences, accesses outside of tensors.
"""

import json
from collections import Counter

import pytest
from processes import compiling

from gqa_kernels.spec import IN_PLACE_OPS, OPS

TABLE = Counter(
    {spec.name: len(spec.test_cases()) for spec in (*OPS, *IN_PLACE_OPS) if spec.test_cases()}
)

ARCHS = pytest.mark.parametrize(
    "arch", (pytest.param("sm_80", marks=pytest.mark.machine_code), "sm_90")
)


def checked(folder, *options):
    """The records of `ptx_emulator.check` with these options, none of which may have failed."""
    results = folder / "results.jsonl"
    command = ("-m", "ptx_emulator.check", *options, "--results", str(results))
    done = compiling(*command)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    records = [json.loads(line) for line in lines]
    failed = [
        f"{r['op']} {r['case']} {r['dtype']} on {r['arch']}: {complaint}"
        for r in records
        if r["status"] == "failed"
        for complaint in r["complaints"]
    ]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr[-4000:]
    return records


# `make test` leaves out the ops whose cases take most of the time, of which others have the same
# kernels, and runs a few cases of the others.
_SLOW = ("flash_attention", "linear_cross_entropy", "prefill_attention")
_QUICK = tuple(op for op in TABLE if op not in _SLOW)
_FEW = (0, 2, 5)


@pytest.mark.parametrize(
    ("arch", "ops", "cases"),
    (
        pytest.param("sm_90", _QUICK, _FEW, id="sm_90-quick"),
        *(
            pytest.param(arch, tuple(TABLE), None, id=arch, marks=pytest.mark.machine_code)
            for arch in ("sm_80", "sm_90")
        ),
    ),
)
def test_small_cases(arch, ops, cases, tmp_path):
    options = [option for op in ops for option in ("--op", op)]
    options += [option for case in cases or () for option in ("--case", str(case))]
    expected = {op: sum(cases is None or n in cases for n in range(TABLE[op])) for op in ops}
    records = checked(tmp_path, "--arch", arch, "--dtype", "bfloat16", *options)
    assert Counter(record["op"] for record in records) == expected
    refused = {record["case"] for record in records if record["status"] == "refused"}
    assert all(arch == "sm_80" and "float8" in case for case in refused)


NAN_IN_AN_INT8_CACHE = """
import sys, torch
from gqa_kernels.spec import Case, IN_PLACE_OPS
from ptx_emulator.check import Call
spec = next(spec for spec in IN_PLACE_OPS if spec.name == "rope_append_kv")
sizes = spec.test_cases()[0].sizes | {"cache_dtype": torch.int8, "scale_per_head": True}
call = Call(spec, Case(sizes, "NaN"), torch.bfloat16)
call.inputs["v"][..., ::2] = float("nan")
call.inputs["v_cache"].fill_(5)
outcome = call.run(sys.argv[1])
assert not outcome.complaints, outcome.complaints
stored = outcome.results["v_cache"].flatten(0, 1)[call.inputs["slots"].flatten()]
assert (stored[..., ::2] == 0).all() and (stored[..., 1::2] != 0).any(), stored
"""


@ARCHS
def test_nan_in_an_int8_cache_is_stored_as_0(arch):
    done = compiling("-c", NAN_IN_AN_INT8_CACHE, arch)
    assert done.returncode == 0, done.stderr[-4000:]


BITS_OF_PREFILL = """
import sys, torch
from gqa_kernels import prefill_attention
from ptx_emulator.driver import emulating
num_new, length = 150, 400
draw = torch.Generator().manual_seed(0)
q, k, v = (
    torch.randn(shape, generator=draw).bfloat16()
    for shape in ((num_new, 4, 64), (1, length, 2, 64), (1, length, 2, 64))
)
def call(q, length, **options):
    bounds, lengths = torch.tensor([0, len(q)]), torch.tensor([length])
    return prefill_attention(q, k, v, bounds, lengths, return_lse=True, **options)
with emulating(sys.argv[1]):
    for options in ({}, {"window": (60, None), "softcap": 3.0}):
        out, lse = call(q, length, **options)
        for i in (0, 1, 64, 149):
            alone, lse_alone = call(q[i : i + 1], length - num_new + 1 + i, **options)
            assert torch.equal(alone, out[i : i + 1]), (options, i)
            assert torch.equal(lse_alone, lse[:, i : i + 1]), (options, i)
"""


@ARCHS
def test_a_row_of_a_prefill_has_the_same_bits_in_a_separate_call(arch):
    """Whether or not other rows of its block see further tiles, and whether a tile is masked."""
    done = compiling("-c", BITS_OF_PREFILL, arch)
    assert done.returncode == 0, done.stderr[-4000:]


SPLITS_OF_PREFILL = """
import sys, torch
from gqa_kernels.runtime import configs
from gqa_kernels.spec import OPS, Case
from ptx_emulator.check import Call
configs.PREFILL = tuple(config._replace(split_keys=64) for config in configs.PREFILL)
configs.PREFILL_PROGRAMS_PER_SM = int(sys.argv[2])
spec = next(spec for spec in OPS if spec.name == "prefill_attention")
sizes = {"total": 72, "num_sequences": 3, "cached": 150, "num_q_heads": 2, "num_kv_heads": 1}
sizes |= {"head_dim": 64, "causal": True, "mixed": True, "page_size": 16}
outcome = Call(spec, Case(sizes, "mixed"), torch.bfloat16).run(sys.argv[1])
assert not outcome.complaints, outcome.complaints
"""
BITS_OF_SPLITS = """
import sys, torch
from gqa_kernels import prefill_attention
from gqa_kernels.runtime import configs
from ptx_emulator.driver import emulating
configs.PREFILL = tuple(config._replace(split_keys=64) for config in configs.PREFILL)
draw = torch.Generator().manual_seed(0)
q, k, v = (
    torch.randn(shape, generator=draw).bfloat16()
    for shape in ((64, 1, 64), (1, 400, 1, 64), (1, 400, 1, 64))
)
with emulating(sys.argv[1]):
    for window in ((180, None), None):
        out, alone = (
            prefill_attention(
                q[-n:], k, v, torch.tensor([0, n]), torch.tensor([400]), window=window
            )
            for n in (64, 1)
        )
        assert torch.equal(alone, out[-1:]), window
"""


@pytest.mark.parametrize(
    ("arch", "programs_per_sm"),
    (("sm_90", 8), pytest.param("sm_80", 0, marks=pytest.mark.machine_code)),
)
def test_split_keys_of_a_prefill(arch, programs_per_sm):
    """A chunk of a prompt with two decode steps of three and two splits; each computed by a program
    of its own, or all of a step by one."""
    done = compiling("-c", SPLITS_OF_PREFILL, arch, str(programs_per_sm))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.machine_code
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_splits_that_only_other_rows_see_leave_a_row_its_bits(arch):
    done = compiling("-c", BITS_OF_SPLITS, arch)
    assert done.returncode == 0, done.stderr[-4000:]


BITS_OF_DECODE = """
import sys, torch
from gqa_kernels import decode_attention
from ptx_emulator.driver import emulating
num_new, length = 16, 200
draw = torch.Generator().manual_seed(0)
q, k, v = (
    torch.randn(1, rows, heads, 64, generator=draw).bfloat16()
    for rows, heads in ((num_new, 4), (length, 2), (length, 2))
)
with emulating(sys.argv[1]):
    for end in (194, 193, 66):  # the tokens' keys end in different tiles
        lengths = torch.tensor([end])
        out, lse = decode_attention(q, k, v, lengths, return_lse=True)
        for i in (0, 12, 14, 15):
            new = slice(i, i + 1)
            lengths = torch.tensor([end - num_new + 1 + i])
            alone, lse_alone = decode_attention(q[:, new], k, v, lengths, return_lse=True)
            assert torch.equal(alone, out[:, new]), (end, i)
            assert torch.equal(lse_alone, lse[:, :, new]), (end, i)
"""


@ARCHS
def test_several_new_tokens_have_the_bits_of_one_by_one(arch):
    done = compiling("-c", BITS_OF_DECODE, arch)
    assert done.returncode == 0, done.stderr[-4000:]
