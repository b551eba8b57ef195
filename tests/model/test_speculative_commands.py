"""`llama2 generate` and `llama2 chat` with --prompt-lookup and --draft."""

import io
import re
import shutil
import sys
from dataclasses import replace

import pytest

from gqa_kernels import get_backend
from llama2 import Llama2, checkpoint, cli
from llama2.checkpoint import SHIPPED, SHIPPED_CHAT

TEXT = ("--prompt", "import os\nimport sys\nimport ", "--max-new-tokens", "21")
GAIN = (
    r"speculation: (\d\.\d\d) new tokens per step of a sequence, after its first token "
    r"\((\d+) in (\d+)\)\n"
)


@pytest.fixture
def llama2(device, capfd, monkeypatch):
    """Runs a command in this process on the test's device: (status, stdout, stderr)."""

    def run(command: str, *options: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = cli.main(
            [command, "--backend", "torch", "--device", str(device), "--dtype", "float32", *options]
        )
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def small(tmp_path):
    """Saves an untrained draft model of the shipped model's vocabulary, changed in its shape."""

    def save(**changes) -> str:
        config = replace(checkpoint.load_config(SHIPPED), num_layers=1, **changes)
        checkpoint.save_hf(Llama2(config, get_backend("torch")), tmp_path / "draft")
        shutil.copy(SHIPPED / "tokenizer.model", tmp_path / "draft")
        return str(tmp_path / "draft")

    return save


def test_the_text_is_the_same_and_the_gain_is_printed(llama2):
    sampled = ("--temperature", "0.8", "--seed", "1")
    for sampling in ((), sampled):
        _, plain, _ = llama2("generate", *TEXT, *sampling)
        for options in (("--prompt-lookup", "5"), ("--draft", str(SHIPPED), "--draft-tokens", "3")):
            status, out, err = llama2("generate", *TEXT, *options, *sampling)
            assert (status, out) == (0, plain)
            gained = re.fullmatch(GAIN, err)
            assert "--draft" not in options or gained.groups() == ("4.00", "20", "5")
    _, _, err = llama2("generate", *TEXT, *TEXT, "--draft", str(SHIPPED))
    assert re.fullmatch(GAIN, err).groups() == (
        "5.00",
        "40",
        "8",
    )  # 4 drafted unless told otherwise


def test_chat(llama2):
    options = ("--max-new-tokens", "6", "--checkpoint", str(SHIPPED_CHAT))
    stdin = b"What is the opposite of hot?\nSort 9 2 8 from small to large.\n"
    _, plain, _ = llama2("chat", *options, stdin=stdin)
    status, out, err = llama2("chat", *options, "--prompt-lookup", "2", stdin=stdin)
    assert (status, out) == (0, plain) and len(re.findall(GAIN, err)) == 2


def test_a_draft_model_with_a_shorter_context(llama2, small):
    draft = ("--draft", small(max_seq_len=40), "--checkpoint", str(SHIPPED_CHAT))
    _, out, err = llama2("chat", *draft, stdin=b"Sort 9 2 8 from small to large. " * 3 + b"\nhi\n")
    assert "tokens; it holds 40, with" in err and out.count("you> ") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--prompt-lookup", "1.5"),
            "--prompt-lookup: expected an int from 1 to 15; got '1.5'",
        ),
        (
            ("--prompt-lookup", "16"),
            "--prompt-lookup: expected an int from 1 to 15; got 16",
        ),
        (
            ("--draft", "x", "--draft-tokens", "0"),
            "--draft-tokens: expected an int from 1",
        ),
        (("--prompt-lookup", "3", "--draft", "x"), "argument --draft: not allowed with argument"),
        (("--draft-tokens", "3"), "--draft-tokens: expected --draft DIR with it; got none"),
        (("--draft", "/nowhere"), "llama2: /nowhere: expected a directory"),
    ],
)
def test_wrong_options_are_named(options, message, llama2, capfd, monkeypatch):
    monkeypatch.delattr(checkpoint, "load")  # no weights are read before
    try:
        status, _, err = llama2("generate", *TEXT, *options)
    except SystemExit as error:
        status, err = error.code, capfd.readouterr().err
    assert status == 2 and message in err


def test_another_tokenizer_is_refused(llama2, small):
    folder = small()
    file = checkpoint.SHIPPED / "tokenizer.model"
    data = file.read_bytes()
    at = data.index(b"return")
    changed = data[:at] + b"nruter" + data[at + 6 :]
    with open(f"{folder}/tokenizer.model", "wb") as out:
        out.write(changed)
    status, _, err = llama2("generate", *TEXT, "--draft", folder)
    assert status == 2 and "/tokenizer.model: expected the model's tokenizer, with b'" in err


def test_another_vocabulary_is_refused(llama2, small):
    status, _, err = llama2("generate", *TEXT, "--draft", small(vocab_size=1100))
    assert status == 2 and "speculation: expected a draft model with the model's vocabulary" in err
