"""What the kernels for Hopper compile to, asserted from PTX and binaries without a GPU.

`make test` compiles one row of each table; `make test-hopper`, `make test-machine-code` and `make
compile-check-3.6` all of them.
"""

import json
import re
from importlib.metadata import version

import pytest
from hopper_forward import SHARED_BYTES
from processes import SUPPORT, compiling
from test_compile import BENCH, count

from gqa_kernels.ops.attention.hopper.pipeline import start_add

# Accesses to local memory by version of Triton; PyTorch 2.12 and 2.13 pin 3.7. In a loop over keys
# or queries, at most, by form, by head_dim for training, or by kernel; none where nothing is said.
# fused has no register to spare. Triton 3.9 assembles with ptxas 13.4, which needs more of them:
# in the forward kernel, where the residue is kept; in dkdv, five of seven are under the mask.
LOCAL_IN_LOOPS = {
    "3.6": {
        "forward": 2,
        "forward 96 causal softcap packed training": 10,
        "forward 128 causal softcap packed training": 6,
        "forward 256 causal softcap packed training": 8,
    },
    "3.7": {
        "forward 96 causal window packed training": 2,
        "forward 96 causal softcap packed training": 2,
        "forward 128 causal softcap packed training": 4,
    },
    "3.8": {
        "forward": 2,
        "forward 64 causal softcap packed training": 4,
        "forward 128 causal window packed training": 3,
        "forward 128 causal softcap packed training": 6,
        "fused 128 causal": 21,
        "fused 128": 20,
    },
    "3.9": {
        "forward 64 training": 1,
        "forward 80 training": 18,
        "forward 96 training": 51,
        "forward 128 training": 96,
        "forward 256 training": 36,
        "forward 256 causal window packed": 1,
        "dkdv 128 causal": 7,
        "fused 128 causal": 48,
        "fused 128": 30,
    },
}
# Elsewhere, a few numbers of a block of rows: at most (in inference, in training). dq has none.
LOCAL_ELSEWHERE = {"3.9": (69, 259)}
TRITON = ".".join(version("triton").split(".")[:2])


def compiled(*options):
    done = compiling(str(SUPPORT / "hopper_binaries.py"), *options, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


class Complaints(list):
    def expect(self, what, actual, expected):
        if actual != expected:
            self.append(f"{what}: expected {expected}, got {actual}")

    def at_most(self, what, actual, limit):
        if actual > limit:
            self.append(f"{what}: expected at most {limit}, got {actual}")


def complaints(entry):
    """What is wrong with one binary of the forward kernel."""
    row, form, loops = entry["row"], entry["form"], entry["loops"]
    consumers, head_dim, block_n = row["num_consumers"], row["head_dim"], row["block_n"]
    parts = 1 if head_dim & (head_dim - 1) == 0 else 2
    found = Complaints()
    loops_of_consumer = 3 if form["window"] else 2 if form["causal"] else 1
    found.expect("key loops", len(loops), consumers * loops_of_consumer)
    for loop in loops:
        products = (head_dim + parts * block_n) // 16
        found.expect("products in a loop", count(loop["mix"], "HGMMA"), products)
        # One per score and thread, two with a cap, and two rescaled rows; all while a product
        # runs.
        exponentials = 64 * block_n // 128 * (2 if form["softcap"] else 1) + 2
        found.expect("exponentials", count(loop["mix"], "MUFU.EX2"), exponentials)
        found.expect("those under a product", loop["under_wgmma"]["MUFU.EX2"], exponentials)
        # Of the maxima of two rows in four threads; sums are added up after the loops.
        found.expect("shuffles", count(loop["mix"], "SHFL"), 4)
    # A copy moves up to 64 features; k and v are copied for the first tile and in the loop.
    found.expect("copies in", count(entry["mix"], "UTMALDG"), (4 + consumers) * -(-head_dim // 64))
    found.expect("copies out", count(entry["mix"], "UTMASTG"), parts * consumers)
    found.expect("turns", entry["named"], [str(8 + i) for i in range(consumers)])
    found += common_complaints(entry, consumers)
    return [f"head_dim {head_dim}, {form}: {complaint}" for complaint in found]


def backward_complaints(entry):
    """What is wrong with one binary of a backward kernel."""
    row, loops = entry["row"], entry["loops"]
    head_dim, block, kernel = row["head_dim"], row["block"], entry["kernel"].rpartition(".")[2]
    found = Complaints()
    # dq has a second loop with a mask, for its last tile in any case.
    found.expect("loops", len(loops), 4 if kernel == "dq" else 2)
    # The rows that the products after the first two sum over; fused has 128 keys, too.
    rows = {"dkdv": 2 * block, "dq": block, "fused": 2 * block + 128}[kernel]
    for loop in loops:
        found.expect("products in a loop", count(loop["mix"], "HGMMA"), (2 * head_dim + rows) // 16)
        found.expect("exponentials", count(loop["mix"], "MUFU.EX2"), block // 2)
        found.expect("those under a product", loop["under_wgmma"]["MUFU.EX2"], block // 2)
    found.expect("copies in", count(entry["mix"], "UTMALDG"), 6 * head_dim // 64)
    found.expect("copies out", count(entry["mix"], "UTMASTG"), 2 if kernel == "dq" else 4)
    found.expect("additions", count(entry["mix"], "UTMAREDG"), 2 if kernel == "fused" else 0)
    found += common_complaints(entry, 2)
    where = f"{entry['kernel']}, head_dim {head_dim}, causal {entry['causal']}"
    return [f"{where}: {complaint}" for complaint in found]


def common_complaints(entry, consumers):
    row, order = entry["row"], entry["order"]
    found = Complaints()
    kernel = entry["kernel"].rpartition(".")[2]
    form = entry.get("form", {"causal": entry.get("causal")})
    name = " ".join(
        [kernel, str(row["head_dim"]), *(flag for flag, given in form.items() if given)]
    )
    in_loops = [count(loop["mix"], "LDL", "STL") for loop in entry["loops"]]
    limits = LOCAL_IN_LOOPS.get(TRITON, {})
    names = [name, kernel]
    if form.get("training"):
        names.insert(1, f"{kernel} {row['head_dim']} training")
    limit = next((limits[name] for name in names if name in limits), 0)
    found.at_most("local memory in a loop", max(in_loops), limit)
    of_inference, of_training = LOCAL_ELSEWHERE.get(TRITON, (24, 64))
    limit = of_training if form.get("training", True) else of_inference
    num_options = sum(bool(form.get(option)) for option in ("window", "softcap", "packed"))
    limit = 0 if kernel == "dq" else limit + 48 * num_options
    found.at_most("local memory elsewhere", entry["local"] - sum(in_loops), limit)
    found.expect("serialised products", entry["serialized"], [])
    found.expect("too much shared memory", entry["shared"] > SHARED_BYTES, False)
    found.expect("threads", entry["threads"], 128 * (consumers + 1))
    held = entry["threads"] * entry["max_registers"]
    found.expect("registers of all threads", held <= 65536, True)
    budget = consumers * row["consumer_registers"] + row["copy_registers"]
    found.expect("register budgets", budget * 128 <= held, True)
    budgets = {row["consumer_registers"], row["copy_registers"]}
    found.expect("budgets in the PTX", budgets - set(entry["registers"]), set())
    found.expect("Triton's barriers below ours", all(int(n) < 8 for n in entry["barriers"]), True)
    for what, rule in (
        ("a copy out without fence and barrier after its writes", r"(?<!SF\|)(?<!SF\|O)O"),
        ("an arrival without a barrier of its partition", r"(?<!\|)A"),
        ("a write after a copy out without a barrier", r"w(?!\|)"),
        ("products that are not waited for", r"M[^g]*\|A"),
    ):
        found.expect(what, re.findall(rule, order), [])
    return found


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--fewer",), id="fewer"),
        pytest.param((), id="all", marks=pytest.mark.machine_code),
    ],
)
def test_binaries(options):
    forward, backward = compiled(*options)
    num_backward = 12 if start_add else 8
    assert (len(forward), len(backward)) == ((1, 1) if options else (84, num_backward))
    assert not [complaint for entry in forward for complaint in complaints(entry)]
    assert not [complaint for entry in backward for complaint in backward_complaints(entry)]


@pytest.mark.machine_code
def test_a_bad_configuration_is_noticed():
    """Three consumers with 128 keys each have too few registers."""
    change = (
        "import hopper_binaries as binaries, json\n"
        "from gqa_kernels.runtime import hopper_configs\n"
        "wide = hopper_configs.HopperConfig(64, 3, 128, 2, True, 160, 32)\n"
        "hopper_configs.HOPPER_FORWARD = binaries.HOPPER_FORWARD = (wide,)\n"
        "print(json.dumps(list(binaries.entries(False))))"
    )
    done = compiling("-c", f"import sys; sys.path.append({str(SUPPORT)!r})\n{change}", folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [complaint for entry in json.loads(done.stdout) for complaint in complaints(entry)]
    assert any("local memory in a loop" in complaint for complaint in found), found


@pytest.mark.machine_code
@pytest.mark.parametrize(
    ("module", "cases"),
    [("hopper_forward", 8), ("hopper_backward", 4)],
    ids=["forward", "backward"],
)
def test_ptx_of_random_calls(module, cases):
    """Executed without a GPU: the error budget, races, missing waits and fences, the same bits
    under two schedules. Runs with Triton 3.6, 3.7, 3.8 and 3.9; the faults of `make test-hopper`
    are listed for 3.7."""
    done = compiling("-m", module, "--ptx", "--cases", str(cases))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
