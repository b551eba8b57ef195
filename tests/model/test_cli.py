"""The `llama2` command, on the checkpoint that comes with the package."""

import io
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from gqa_kernels import get_backend
from llama2 import checkpoint, cli
from llama2.commands.text import stream_text
from llama2.generate import Generator, generate
from llama2.placement import place
from llama2.stops import stop_ids
from llama2.tokenizer import Tokenizer

PROMPT = "def read(self, size=-1):\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(checkpoint.SHIPPED / "tokenizer.model")


@pytest.fixture
def model(device):
    return checkpoint.load(checkpoint.SHIPPED, get_backend("eager"), device=device)


@pytest.fixture
def llama2(device, capfd, monkeypatch):
    """Runs a command in this process on the test's device: (status, stdout, stderr)."""

    def run(command: str, *options: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = cli.main([command, "--backend", "eager", "--device", str(device), *options])
        return status, *capfd.readouterr()

    return run


def in_a_process(*options: str | bytes, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llama2.cli", *options], capture_output=True, timeout=600, **settings
    )


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="llama2")
    assert script.load() is cli.main


def test_one_prompt_streams_its_text(llama2, model, tokenizer):
    status, out, err = llama2("generate", "--prompt", PROMPT, "--max-new-tokens", "12")
    (new,) = generate(model, [tokenizer.encode(PROMPT)], max_new_tokens=12)
    assert (status, err) == (0, "")
    assert out == tokenizer.decode(tokenizer.encode(PROMPT) + new) + "\n"


def test_several_prompts_are_a_batch(llama2, model, tokenizer):
    prompts = [PROMPT, "import"]
    _, out, _ = llama2(
        "generate", "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", "9"
    )
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    new = generate(model, encoded, max_new_tokens=9, stop_ids=stop_ids(tokenizer))
    texts = [tokenizer.decode(p + n) for p, n in zip(encoded, new, strict=True)]
    assert out == f"--- prompt 1 of 2\n{texts[0]}\n--- prompt 2 of 2\n{texts[1]}\n"


def test_sampling_options_reach_generate(llama2):
    def text(*options: str) -> str:
        return llama2("generate", "--prompt", PROMPT, "--max-new-tokens", "30", *options)[1]

    warm = ("--temperature", "1.2", "--seed", "5")
    assert text(*warm) == text(*warm) != text("--temperature", "1.2", "--seed", "6")
    assert text(*warm, "--top-p", "1e-6") == text() != text(*warm)


def test_prompts_come_from_a_file_or_stdin(llama2, tmp_path):
    options = ("--max-new-tokens", "5")
    file = tmp_path / "prompt.txt"
    file.write_text("# é\n", encoding="utf-8")
    from_file = llama2("generate", "--prompt-file", str(file), *options)
    from_stdin = llama2("generate", "--prompt-file", "-", *options, stdin="# é\n".encode())
    assert from_file == from_stdin and from_file[1].startswith("# é\n")


def test_text_ends_with_the_document(model, tokenizer, monkeypatch):
    tokens = [*tokenizer.encode("pass", bos=False), tokenizer.eos_id]

    def stream(_, prompts, *, stop_ids, **settings):
        assert set(stop_ids) == {tokenizer.bos_id, tokenizer.eos_id}
        return iter([(0, token) for token in tokens])

    monkeypatch.setattr(Generator, "stream", stream)
    assert (
        "".join(
            stream_text(
                Generator(model), tokenizer, [1], stops=stop_ids(tokenizer), max_new_tokens=5
            )
        )
        == " pass"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "/nowhere", "--prompt", "a"], "/nowhere: expected a directory"),
        ([], "expected --prompt TEXT or --prompt-file FILE"),
        (["--prompt-file", "/nowhere"], "/nowhere"),
        (["--prompt", "a\udcff"], "--prompt: expected UTF-8"),
        (["--prompt", "a\ud800"], "--prompt: expected UTF-8"),
        (["--prompt-file", "-"], "--prompt-file: expected UTF-8"),
        (["--prompt", "a " * 600], "prompt 1: expected at most max_seq_len (256)"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens: expected"),
        (["--prompt", "a", "--temperature", "nan"], "temperature: expected"),
        (["--prompt", "a", "--top-p", "0"], "top_p: expected"),
        (["--prompt", "a", "--seed", "-1"], "seed: expected"),
        (["--prompt", "a", "--device", "meta"], "device: expected one that is there"),
        (["--prompt", "a", "--device", "nonsense"], "device: expected one that is there"),
        (["--prompt", "a", "--device", "hpu"], "device: expected one that is there"),
        (["--prompt", "a", "--device", "privateuseone"], "device: expected one that is there"),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(llama2, options, message):
    status, out, err = llama2("generate", *options, stdin=b"\xff")
    assert (status, out) == (2, "")
    assert err.startswith("llama2: ") and err.count("\n") == 1 and message in err


def test_a_file_that_is_no_text_is_refused(llama2, tmp_path):
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe")
    status, _, err = llama2("generate", "--prompt-file", str(file))
    assert status == 2 and err.startswith("llama2: --prompt-file: expected UTF-8")


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer"])
def test_a_damaged_checkpoint_is_one_line(llama2, damage, tmp_path):
    names = {
        "weights": "model.safetensors",
        "config": "config.json",
        "tokenizer": "tokenizer.model",
    }
    for name in names.values():
        content = (checkpoint.SHIPPED / name).read_bytes()
        (tmp_path / name).write_bytes(b"damage" if name == names[damage] else content)
    status, out, err = llama2("generate", "--checkpoint", str(tmp_path), "--prompt", "a")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and names[damage] in err


def test_unknown_options_show_the_usage(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "--dtype", "int8"])
    assert exit.value.code == 2 and "usage: llama2 generate" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(llama2, monkeypatch):
    monkeypatch.setattr("llama2.commands.generate.stream_text", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        llama2("generate", "--prompt", "a")


# Placement.


def test_auto_follows_the_device(device):
    placement = place("auto", str(device))
    assert placement.backend == ("triton" if device.type == "cuda" else "torch")
    assert placement.ops is get_backend(placement.backend) and not placement.interpreted


def test_auto_says_what_it_chose_and_why(capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["generate", "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert capfd.readouterr().err == "backend: torch on cpu: there is no GPU\n"


def test_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match="backend: expected one of auto, eager, torch, triton; got 'cuda'"
    ):
        place("cuda")


def test_triton_without_a_gpu_says_interpreter_and_gives_eagers_text():
    options = (
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--prompt",
        "import",
        "--max-new-tokens",
        "3",
    )
    triton = in_a_process("generate", "--backend", "triton", *options)
    eager = in_a_process("generate", "--backend", "eager", *options)
    assert triton.returncode == eager.returncode == 0, triton.stderr.decode()
    assert triton.stdout == eager.stdout
    assert b"Triton's interpreter on the CPU" in triton.stderr
    assert b"use it to check results, not speed" in triton.stderr and eager.stderr == b""


# What only a process shows.


def test_bytes_that_are_not_utf8_leave_no_traceback():
    result = in_a_process("generate", "--prompt", b"\xff\xfe")
    assert result.returncode == 2 and result.stdout == b""
    assert result.stderr.startswith(b"llama2: --prompt: expected UTF-8") and (
        result.stderr.count(b"\n") == 1
    )


def test_utf8_works_in_any_locale():
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = in_a_process(
        "generate", "--prompt", "# é".encode(), "--max-new-tokens", "1", env=plain
    )
    assert result.returncode == 0 and result.stdout.startswith(b"# ?"), result.stderr.decode()


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "llama2.cli", "generate", "--prompt", PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0
