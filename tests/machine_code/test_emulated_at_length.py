"""What `make test-machine-code` executes beyond `test_emulated.py`: all dtypes, longer cases, other
views of the inputs, and the orders that a GPU may choose."""

import itertools

import pytest
from test_emulated import checked

pytestmark = pytest.mark.machine_code

ARCHS = ("sm_80", "sm_90")
DTYPES = ("bfloat16", "float16", "float32")
BFLOAT16 = ("--dtype", "bfloat16")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_small_cases_of_other_dtypes(arch, dtype, tmp_path):
    assert checked(tmp_path, "--arch", arch, "--dtype", dtype)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_longer_cases(arch, dtype, tmp_path):
    assert checked(tmp_path, "--arch", arch, "--dtype", dtype, "--extra")


@pytest.mark.parametrize("arch", ARCHS)
def test_strided_and_misaligned_views(arch, tmp_path):
    assert checked(tmp_path, "--arch", arch, *BFLOAT16, "--views", "--case", "0", "--case", "1")


@pytest.mark.parametrize("arch", ARCHS)
def test_one_processor(arch, tmp_path):
    """Persistent programs take many rows."""
    assert checked(tmp_path, "--arch", arch, *BFLOAT16, "--sms", "1", "--extra")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", (0, 1))
def test_warps_in_random_order(arch, seed, tmp_path):
    options = ("--schedule", "random", "--seed", str(seed))
    assert checked(tmp_path, "--arch", arch, *BFLOAT16, *options)


@pytest.mark.parametrize("arch", ARCHS)
def test_programs_in_any_order(arch, tmp_path):
    """The same bits, whoever comes first."""
    found = []
    for order in ("forward", "backward", "random", "interleaved"):
        folder = tmp_path / order
        folder.mkdir()
        records = checked(folder, "--arch", arch, *BFLOAT16, "--ctas", order)
        found.append({(r["op"], r["case"]): r.get("bits") for r in records})
    assert all(found) and all(one == other for one, other in itertools.pairwise(found))
