"""`llama2 warm-up`: nothing is left to compile for a model's calls."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from processes import SUPPORT, compiling

from llama2 import cli
from llama2.config import ModelConfig

BENCH = Path(__file__).parents[2] / "bench"


def asked(*arguments):
    """What a function of `warmed.py` returns in a process of its own."""
    done = compiling(str(SUPPORT / "warmed.py"), *arguments, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return asked("without_compiling")


def test_a_models_calls_launch_nothing_else(found):
    """Of three layers, at other batches and lengths."""
    assert all(count >= 7 for _, _, count, _ in found["left_out"])
    assert not [missing for *_, missing in found["left_out"] if missing]


def test_no_kernel_depends_on_the_number_of_sms(found):
    first, *others = found["on_other_gpus"]
    assert len(first) > 50 and all(other == first for other in others)


def test_what_is_refused(found):
    no_gpu, *others = found["refusals"]
    assert no_gpu.startswith("arch: expected a name such as sm_90, as there is no GPU that Triton ")
    assert others == [
        "arch: expected sm_80 or a later one, such as sm_90; got 'sm_75'",
        "arch: expected sm_80 or a later one, such as sm_90; got 'gfx942'",
        "jobs: expected at least 1; got 0",
    ]


def test_a_users_error_is_one_line(found):
    expected = (
        "llama2: --arch: expected an architecture, such as sm_90, on a machine without a GPU; "
        "got none\n",
        "llama2: arch: expected sm_80 or a later one, such as sm_90; got 'hopper'\n",
        "llama2: dtype: expected torch.float32 or torch.bfloat16 for training; got torch.float16\n",
        "llama2: /nowhere: expected a directory",
    )
    for (status, said), line in zip(found["complaints"], expected, strict=True):
        assert status == 2 and said.startswith(line) and said.count("\n") == 1


def warm_up(*options):
    return compiling("-m", "llama2", "warm-up", *options)


@pytest.mark.machine_code
def test_nothing_is_left_to_compile(tmp_path, monkeypatch):
    """For a prompt and decode steps, a step of training and losses, under Triton's own launcher."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(asdict(ModelConfig(512, 256, 512, 3, 4, 2, 64, max_seq_len=256))))
    options = ("--shape", str(shape), "--arch", "sm_90", "--for", "generate,train,evaluate")
    done = warm_up(*options)
    assert done.returncode == 0, done.stderr
    count = int(done.stdout.split()[0])
    assert done.stdout == f"{count} kernels compiled, 0 were there\n" and count > 30
    assert warm_up(*options).stdout == f"0 kernels compiled, {count} were there\n"
    found = asked("launch_model")
    if found is None:
        pytest.skip("no C compiler, which Triton's launcher needs")
    assert {use: counts["compiled"] for use, counts in found.items()} == {use: [] for use in found}
    assert all(counts["launches"] > 20 for counts in found.values())


def test_an_unknown_use_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["warm-up", "--for", "generate,dance"])
    expected = "expected some of generate, speculation, serve, prefixes, evaluate, train; got 'd"
    assert expected in capsys.readouterr().err
