"""What the forward kernel for Hopper compiles to, asserted from PTX and binaries without a GPU.

`make test` compiles one row of the table; `make test-hopper`, `make test-machine-code` and `make
compile-check-3.6` all of them.
"""

import json
import re
from importlib.metadata import version

import pytest
from hopper_forward import SHARED_BYTES
from processes import SUPPORT, compiling
from test_compile import BENCH, count

# Accesses to local memory in a loop over keys. Triton 3.6 has two in one binary of twelve, in the
# loop without a mask; 3.8 a few in the loop with a mask of one. PyTorch 2.12 and 2.13 pin 3.7.
FEW_LOCAL = 0 if version("triton").startswith("3.7.") else 8


def compiled(*options):
    done = compiling(str(SUPPORT / "hopper_binaries.py"), *options, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def complaints(entry):
    """What is wrong with one binary."""
    row, loops, order = entry["row"], entry["loops"], entry["order"]
    consumers, head_dim, block_n = row["num_consumers"], row["head_dim"], row["block_n"]
    found = []

    def expect(what, actual, expected):
        if actual != expected:
            found.append(f"{what}: expected {expected}, got {actual}")

    expect("key loops", len(loops), consumers * (2 if entry["causal"] else 1))
    for loop in loops:
        expect("products in a key loop", count(loop["mix"], "HGMMA"), (head_dim + block_n) // 16)
        # One per score and thread, and two rescaled rows; all while a product runs.
        expect("exponentials", count(loop["mix"], "MUFU.EX2"), 64 * block_n // 128 + 2)
        expect("those under a product", loop["under_wgmma"]["MUFU.EX2"], 64 * block_n // 128 + 2)
        local = count(loop["mix"], "LDL", "STL")
        expect("much local memory in a key loop", local > FEW_LOCAL, False)
    # Outside these loops, a few numbers of a block may lie there.
    expect("much local memory", entry["local"] > (64 if entry["training"] else 24), False)
    # A copy moves 64 features; k and v are copied for the first tile and in the loop.
    expect("copies in", count(entry["mix"], "UTMALDG"), (4 + consumers) * head_dim // 64)
    expect("copies out", count(entry["mix"], "UTMASTG"), consumers)
    expect("serialised products", entry["serialized"], [])
    expect("too much shared memory", entry["shared"] > SHARED_BYTES, False)
    expect("threads", entry["threads"], 128 * (consumers + 1))
    expect("registers of all threads", entry["threads"] * entry["max_registers"] <= 65536, True)
    budget = consumers * row["consumer_registers"] + row["copy_registers"]
    expect("register budgets", budget * 128 <= entry["threads"] * entry["max_registers"], True)
    expect(
        "budgets in the PTX",
        {row["consumer_registers"], row["copy_registers"]} - set(entry["registers"]),
        set(),
    )
    expect("turns", entry["named"], [str(8 + i) for i in range(consumers)])
    expect("Triton's barriers below ours", all(int(n) < 8 for n in entry["barriers"]), True)
    for what, rule in (
        ("a copy out without fence and barrier after its writes", r"(?<!SF\|)O"),
        ("an arrival without a barrier of its partition", r"(?<!\|)A"),
        ("a write after a copy out without a barrier", r"w(?!\|)"),
        ("products that are not waited for", r"M[^g]*\|A"),
    ):
        expect(what, re.findall(rule, order), [])
    where = f"head_dim {head_dim}, causal {entry['causal']}, training {entry['training']}"
    return [f"{where}: {complaint}" for complaint in found]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--fewer",), id="fewer"),
        pytest.param((), id="all", marks=pytest.mark.machine_code),
    ],
)
def test_binaries(options):
    entries = compiled(*options)
    assert len(entries) == (1 if options else 12)
    assert not [complaint for entry in entries for complaint in complaints(entry)]


@pytest.mark.machine_code
def test_a_bad_configuration_is_noticed():
    """Three consumers with 128 keys each have too few registers."""
    change = (
        "import hopper_binaries as binaries, json\n"
        "from gqa_kernels.runtime import configs\n"
        "wide = configs.HopperConfig(64, 3, 128, 2, True, 160, 32)\n"
        "configs.HOPPER_FORWARD = binaries.HOPPER_FORWARD = (wide,)\n"
        "print(json.dumps(list(binaries.entries(False))))"
    )
    done = compiling("-c", f"import sys; sys.path.append({str(SUPPORT)!r})\n{change}", folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [complaint for entry in json.loads(done.stdout) for complaint in complaints(entry)]
    assert any("local memory in a key loop" in complaint for complaint in found), found


@pytest.mark.machine_code
def test_ptx_of_random_calls():
    """Executed without a GPU: the error budget, races, missing waits and fences, the same bits
    under two schedules."""
    done = compiling("-m", "hopper_forward", "--ptx", "--cases", "8")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
