"""What the kernels compile to, asserted from the binaries: no GPU is needed.

`bench/compiled.py` compiles them in a process of its own, since Triton's interpreter, in which the
tests of this process run, is switched on or off for a whole process. Its results are kept in
Triton's cache: the first run takes minutes, the next ones seconds. `make test` compiles the cases
that take the most registers, of most ops, for sm_90; `make test-machine-code` all of them, for
every target.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import compiling

from gqa_kernels.spec import IN_PLACE_OPS, OPS

BENCH = Path(__file__).parents[2] / "bench"
ARCHS = ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942")

# Triton 3.6, which PyTorch 2.11 brings, allocates a little worse.
IS_36 = version("triton").startswith("3.6.")
FEW_SPILLS = 8 if IS_36 else 0  # instructions that touch local memory
LEAST_OVERLAPPED = 0.7 if IS_36 else 0.8

SPILLS_ALLOWED = (
    # float32 attention multiplies outside the tensor cores; at this head_dim no tile fits.
    ("flash_attention", "float32", "head_dim=256"),
    # The widest heads have no tile that does not, but for one too small for wgmma.
    ("sm_90", "flash_attention", "head_dim=192", "training"),
    # After the loop, where the residue is made: a dozen accesses per thread.
    ("sm_90", "flash_attention_varlen", "head_dim=128", "training"),
    # Outside the loop: seven numbers of a thread, stored and read once.
    ("sm_90", "linear_cross_entropy", "vocab_size=50257", "training"),
    # Outside the loops: four numbers of a thread, stored and read once.
    ("sm_90", "prefill_attention", "head_dim=256-causal=True-cache_dtype", "page_size=16"),
    # ptxas keeps to 64 registers here and reads 8 bytes back, once per thread.
    ("sm_100", "add_rms_norm", "hidden_size=8192", "inference"),
    # Likewise to 128, and to 80 in float32.
    ("sm_90", "prefill_attention", "float32", "head_dim=256"),
    ("sm_120", "decode_attention", "head_dim=128-cache_dtype=torch.int8-scale_per_head=True"),
    ("decode_attention", "float32", "head_dim=128"),
)

# Accesses of a row kernel that are not 16 bytes wide: one rstd per row; the scale of a gradient;
# the float32 angles, half as many as features; the sums of columns, one per thread.
NARROW_ALLOWED = {
    "norm.forward": {"STG.32"},
    "norm.backward": {"LDG.32"},
    "norm.sum_partials": {"STG.U16"},
    "glu.forward": set(),
    "adamw.step": {"LDG.32"},
    "glu.backward": set(),
    "rope.rotate": {"LDG.64"},
    # The positions, slots and scales of a program, the angles, and half heads of quantised values.
    "cache.append": {"LDG.64", "LDG.32", "STG.32", "STG.64"},
}

# `make test` leaves out what other ops have the kernels of; `test_emulated.py` compiles them.
_SAME_KERNELS = ("flash_attention_varlen", "token_log_probs")
FEWER = [
    option
    for spec in (*OPS, *IN_PLACE_OPS)
    if spec.name not in _SAME_KERNELS
    for option in ("--op", spec.name)
]

ATTENTION = ("attention.forward", "attention.dkdv", "attention.dq")
PREFILL = ("cache.prefill",)
PRODUCTS = tuple(f"linear_cross_entropy.products.{name}_product" for name in ("rows", "weight"))


def python(*arguments: str) -> str:
    """What a fresh interpreter prints, with bench/ on its path and Triton compiling."""
    done = compiling(*arguments, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def count(mix: dict[str, int], *names: str) -> int:
    return sum(n for opcode, n in mix.items() if opcode.startswith(names))


def complaints(entry: dict) -> list[str]:
    """What is wrong with one launch. Shared memory beyond the target's limit is an error."""
    if entry["error"]:
        return [entry["error"]]
    binary, kernel = entry["binary"], entry["launch"]["kernel"]
    loop, found = binary["loop"], []
    where = f"{entry['arch']} {entry['op']} {entry['dtype']} {entry['case']} {entry['mode']}"
    spills_allowed = any(all(part in where for part in parts) for parts in SPILLS_ALLOWED)
    if not spills_allowed and (
        binary["spills"] > FEW_SPILLS or (binary["local_bytes"] and not binary["spills"])
    ):
        found.append(f"{binary['spills']} spills, {binary['local_bytes']} bytes of local memory")
    if binary["serialized"]:
        found.append(f"serialised wgmma: {binary['serialized']}")
    if binary["transposed_dots"]:
        found.append("a transposed dot result is an operand of a dot")
    if kernel in NARROW_ALLOWED and entry["arch"].startswith("sm_"):
        accesses = {op for op in binary["mix"] if op.startswith(("LDG", "STG"))}
        if narrow := accesses - {"LDG.128", "STG.128"} - NARROW_ALLOWED[kernel]:
            found.append(f"accesses narrower than 16 bytes: {sorted(narrow)}")
    on_hopper = entry["arch"] == "sm_90" and entry["dtype"] != "float32"
    if kernel in ATTENTION + PREFILL + PRODUCTS and on_hopper and not count(loop, "HGMMA"):
        found.append("the main loop has no wgmma")
    if kernel == "attention.forward" and on_hopper:
        # ptxas lets a few slip behind the wait (Triton 3.6.0: 4 of 34); what it sinks as a whole,
        # a broken pipeline, is nearly all of them.
        overlapped, exponentials = count(binary["under_wgmma"], "MUFU.EX2"), count(loop, "MUFU.EX2")
        if "softcap" in entry["case"]:
            exponentials //= 2  # half of them are the cap's, which waits for the product
        in_order = "head_dim=64" in entry["case"]  # where programs hide each other's softmax
        if not exponentials or (overlapped < LEAST_OVERLAPPED * exponentials and not in_order):
            found.append(f"{overlapped} of {exponentials} exponentials issue under a wgmma")
    shares_an_sm = kernel in ("attention.forward", "attention.dq") and on_hopper
    if shares_an_sm and "head_dim=64" in entry["case"] and binary["registers"] > 128:
        found.append(f"{binary['registers']} registers leave no room for a second program")
    return [f"{kernel} of {where}: {complaint}" for complaint in found]


@pytest.mark.parametrize(
    "options",
    (
        pytest.param(("sm_90", "--fewer", *FEWER), id="sm_90-fewer"),
        *(pytest.param((arch,), id=arch, marks=pytest.mark.machine_code) for arch in ARCHS),
    ),
)
def test_binaries(options):
    entries = json.loads(python(str(BENCH / "compiled.py"), "--json", "--arch", *options))
    expected = set(FEWER) - {"--op"} if "--fewer" in options else {"flash_attention_varlen"}
    assert {entry["op"] for entry in entries} >= expected
    assert not [complaint for entry in entries for complaint in complaints(entry)]


@pytest.mark.machine_code
def test_one_binary_serves_every_number_of_tokens():
    counted = json.loads(python(str(BENCH / "compiled.py"), "--count", "--arch", "sm_90"))["sm_90"]
    # A kernel may serve both passes, with a binary for each.
    more = {key: counts for key, counts in counted.items() if counts[0] != counts[1]}
    assert not more and max(of_one for of_one, _ in counted.values()) <= 2


@pytest.mark.machine_code
def test_decode_has_enough_bytes_in_flight():
    """On sm_90, by Little's law: contiguous, paged and quantised caches."""
    found = json.loads(
        python(
            "-c",
            "import json, compiled, prediction\n"
            "entries = compiled.compile_all(['sm_90'], ['decode_attention'])\n"
            "print(json.dumps([(str(e.case), e.dtype, prediction.bytes_in_flight(e.arch, e.launch,"
            " e.binary), prediction.BYTES_IN_FLIGHT_NEEDED) for e in entries]))",
        )
    )
    assert len(found) > 15
    assert not [entry for entry in found if entry[1] != "float32" and entry[2] < entry[3]]


@pytest.mark.parametrize("op", ("decode_attention", "prefill_attention"))
@pytest.mark.parametrize(
    "arch",
    (
        "sm_90",
        *(
            pytest.param(arch, marks=pytest.mark.machine_code)
            for arch in ("sm_80", "sm_100", "sm_120")
        ),
    ),
)
def test_partial_results_are_published(arch, op):
    """A program's stores, a barrier of its threads, one thread's release and acquire, a barrier,
    and loads past the L1 cache: nothing weaker is right, and no test of results could tell."""
    ptx = python(
        "-c",
        "import capture, compiled\n"
        f"spec = compiled.SPECS[[s.name for s in compiled.SPECS].index({op!r})]\n"
        "case = [case for case in spec.cases if not case.test][-1]\n"
        "(_, call), = compiled._calls(spec, case, compiled.torch.bfloat16)\n"
        f"launch, = capture.capture({arch!r}, call)\n"
        "print(open(launch.files()['ptx']).read())",
    )
    steps = {"st.global": "S", "bar.sync": "|", "atom.": "A", "ld.global.cg": "L", "ld.global": "l"}
    order = ""
    for line in ptx.splitlines():
        found = [letter for name, letter in steps.items() if re.search(rf"\b{name}", line)]
        order += found[0] if found else ""
    assert re.search(r"\batom\.global\.gpu\.acq_rel\.add", ptx)
    before, _, after = order.partition("A")
    assert "A" not in after
    assert "S" in before and re.search(r"\|$", before)
    # The counter is cleared, the partial results are loaded, and what is combined is stored.
    assert re.match(r"\|S?L[L|]*S", after)


def test_an_int8_cache_asks_for_nan_before_it_bounds():
    """A bound may stand for NaN, so that what was bounded is no NaN: each value itself is asked,
    and the answer chooses what is stored."""
    ptx = python(
        "-c",
        "import capture, compiled\n"
        "from gqa_kernels.spec import Case\n"
        "spec = compiled.SPECS[[s.name for s in compiled.SPECS].index('rope_append_kv')]\n"
        "case = Case(spec.tiny | {'cache_dtype': compiled.torch.int8}, 'small')\n"
        "(_, call), = compiled._calls(spec, case, compiled.torch.bfloat16)\n"
        "launch, = capture.capture('sm_90', call)\n"
        "print(open(launch.files()['ptx'], encoding='utf-8').read())",
    )
    bounded = re.findall(r"max\.f32\s+%r\d+, (%r\d+), 0fC2FE0000;", ptx)  # −127
    asked = re.findall(r"setp\.(?:num|nan)\.f32\s+(%p\d+), (%r\d+), \2;", ptx)
    chosen = re.findall(r"selp\.\w+\s+%\w+, [^;]*, (%p\d+);", ptx)
    assert bounded and set(bounded) <= {x for answer, x in asked if answer in chosen}


def test_programs_that_a_launch_lacks_load_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import prediction
    from binary import Binary
    from capture import Launch

    binary = Binary(registers=64, spills=0, local_bytes=0, mix={"LDG.128": 6})
    launch = Launch("norm.backward", "_", (264, 1, 1), 8, num_stages=3, shared=8192, hash="")
    assert prediction.programs_per_sm("sm_90", launch, binary) == 4
    assert prediction.launched_per_sm("sm_90", launch, binary) == 2
    assert prediction.bytes_in_flight("sm_90", launch, binary) == 2 * 8 * 32 * 6 * 16
    wide = launch._replace(grid=(8192, 1, 1))
    assert prediction.bytes_in_flight("sm_90", wide, binary) == 4 * 8 * 32 * 6 * 16


def test_two_programs_hide_each_others_latencies(monkeypatch):
    """A product of 32 cycles, awaited, and 16 exponentials of 8: alone a program pays for both and
    the latency, two of them for the exponentials."""
    monkeypatch.syspath_prepend(str(BENCH))
    from binary import Scheduled
    from simulation import simulate

    def step(opcode, **changes):
        return Scheduled(opcode, 1, (), None, None, False, None)._replace(**changes)

    loop = (
        step("HGMMA.64x64x16", closes_group=True),
        step("WARPGROUP", groups_left=0),
        *[step("MUFU.EX2")] * 16,
        step("BRA"),
    )
    alone, together = simulate(loop, 4, 1), simulate(loop, 4, 2)
    assert (alone.tensor_cycles, together.tensor_cycles) == (32, 64)
    assert 32 + 16 * 8 < alone.cycles < 220
    assert 2 * 16 * 8 <= together.cycles < 1.1 * 2 * 16 * 8
    chain = (step("MUFU.EX2", waits=(0,), sets=0),)  # each awaits the one before
    assert [simulate(chain, 4, programs).cycles for programs in (1, 2, 4)] == [22, 22, 4 * 8]


@pytest.mark.machine_code
def test_a_spilling_config_is_found():
    """The check can fail: 128 × 128 tiles do not fit the registers of four warps."""
    entries = json.loads(
        python(
            "-c",
            "import compiled\n"
            "from gqa_kernels.runtime import configs\n"
            "wide = configs.AttentionConfig('', 2, 256, 128, 128, num_warps=4, num_stages=2)\n"
            "configs.ATTENTION_FORWARD = (wide,)\n"
            "(spec,) = [s for s in compiled.SPECS if s.name == 'flash_attention']\n"
            "case = compiled._variants(spec)[6]\n"
            "compiled.representative = lambda *_: [case]\n"
            "compiled.main(['--json', '--arch', 'sm_90', '--op', 'flash_attention'])",
        )
    )
    found = " ".join(complaint for entry in entries for complaint in complaints(entry))
    assert "bytes of local memory" in found
    assert "serialised wgmma" in found


@pytest.mark.machine_code
def test_more_shared_memory_than_the_target_has_is_found():
    entries = json.loads(
        python(
            "-c",
            "import compiled\n"
            "from gqa_kernels.runtime import configs\n"
            "deep = configs.AttentionConfig('', 2, 256, 128, 64, num_warps=8, num_stages=4)\n"
            "configs.ATTENTION_FORWARD = (deep,)\n"
            "(spec,) = [s for s in compiled.SPECS if s.name == 'flash_attention']\n"
            "case = compiled._variants(spec)[6]\n"
            "compiled.representative = lambda *_: [case]\n"
            "compiled.main(['--json', '--arch', 'sm_120', '--op', 'flash_attention'])",
        )
    )
    assert "shared memory" in entries[0]["error"]


TRANSPOSED = """
module {
  tt.func public @k(%q: tensor<64x64xf16>, %k: tensor<64x64xf16>, %n: i32) {
    %first = tt.dot %q, %k, %zero : tensor<64x64xf16> * tensor<64x64xf16> -> tensor<64x64xf32>
    %out:2 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %zero, %s = %first) -> (x, y) : i32 {
      %p = math.exp2 %s : tensor<64x64xf32>
      %h = arith.truncf %p : tensor<64x64xf32> to tensor<64x64xf16>
      %t = tt.trans %h {order = array<i32: 1, 0>} : tensor<64x64xf16> -> tensor<64x64xf16>
      %d = tt.dot OPERANDS, %a : tensor<64x64xf16> * tensor<64x64xf16> -> tensor<64x64xf32>
      scf.yield %d, %s : tensor<64x64xf32>, tensor<64x64xf32>
    }
    tt.return
  }
}
"""


@pytest.mark.parametrize(("operands", "expected"), (("%t, %k", 1), ("%h, %k", 0), ("%k, %q", 0)))
def test_a_transposed_dot_result_is_found(operands, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import binary

    assert binary.count_transposed_dots(TRANSPOSED.replace("OPERANDS", operands)) == expected
