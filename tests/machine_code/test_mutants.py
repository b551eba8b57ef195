"""Faults that Triton's interpreter cannot see turn the emulated tests red."""

import json
import re
from typing import NamedTuple

import pytest
from processes import compiling


class Fault(NamedTuple):
    """A mutation of the PTX of one kernel, and what is said of it at one place at least of so many:
    of two barriers in a row, either does."""

    kind: str
    says: str
    op: str
    kernel: str
    case: int
    places: int
    options: tuple[str, ...] = ()


LONG = ("--extra", "--forward", "--sizes", '{"num_q_heads":1,"seq_len_q":40,"seq_len_kv":200}')
FAULTS = (
    Fault("drop bar.sync", "read after write without barrier", "rms_norm", "_forward", 4, 2),
    Fault("wait for one group less", "before its wait", "flash_attention", "_forward", 0, 3, LONG),
    Fault("other swizzle", "error .*, budget", "flash_attention", "_forward", 0, 2, LONG),
    Fault("drop the mask of a store", "write over another program's", "swiglu", "_forward", 0, 2),
    Fault(
        "arrive before the barrier",
        "another program's write without acquire",
        "decode_attention",
        "_decode",
        1,
        1,
    ),
)


@pytest.mark.mutants
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind.replace(" ", "-"))
def test_a_fault_is_seen(fault, tmp_path):
    results = tmp_path / "mutants.jsonl"
    done = compiling(
        *("-m", "ptx_emulator.mutations", "--arch", "sm_80", "--op", fault.op),
        *("--case", str(fault.case), "--kernel", fault.kernel, "--kind", fault.kind),
        *("--each", str(fault.places), "--results", str(results), *fault.options),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    mutants = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert any(re.search(fault.says, mutant["detail"]) for mutant in mutants), done.stdout
