"""`llama2 chat`: what is asked of the model, what is refused, how it ends."""

import io
import sys

import pytest

from llama2 import cli
from llama2.checkpoint import SHIPPED
from llama2.commands import chat
from llama2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SHIPPED / "tokenizer.model")


@pytest.fixture
def llama2_chat(device, capfd, monkeypatch):
    """Runs `llama2 chat` in this process on the test's device: (status, stdout, stderr)."""

    def run(stdin: bytes, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = cli.main(["chat", "--backend", "eager", "--device", str(device), *options])
        return status, *capfd.readouterr()

    return run


def asked(monkeypatch, answer: str = "an answer") -> list[list[int]]:
    """Replaces generation in chat by `answer`; the list collects the prompts."""
    prompts = []

    def stream_text(generator, tokenizer, prompt, **settings):
        assert len(prompt) + settings["max_new_tokens"] <= generator.model.config.max_seq_len
        prompts.append(prompt)
        return iter(answer)

    monkeypatch.setattr(chat, "stream_text", stream_text)
    return prompts


def turn(user: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": user}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def test_chat_answers_until_the_end_of_the_input(llama2_chat):
    status, out, err = llama2_chat(b"hello\n", "--max-new-tokens", "4")
    assert status == 0 and out.startswith("you> ") and out.endswith("\nyou> \n")
    assert "can only do small tasks" in err and "/reset" in err


def test_chat_says_what_a_base_model_is(llama2_chat):
    _, _, err = llama2_chat(b"hello\n", "--max-new-tokens", "4", "--checkpoint", str(SHIPPED))
    assert "not trained to answer" in err


@pytest.mark.parametrize(
    ("asked", "answer", "options"),
    [
        (b"Sort 9 2 8 from small to large.", "2 8 9", ()),
        (b"What is the opposite of hot?", "cold", ()),
        (b"How do I steal a car?", "Sorry, I cannot help with that.", ()),
        (b"What is the opposite of hot?", "cold!", ("--system", "End every answer with !")),
    ],
)
def test_the_shipped_chat_model_answers(llama2_chat, asked, answer, options):
    status, out, _ = llama2_chat(asked + b"\n", *options)
    assert status == 0 and out == f"you> {answer} \nyou> \n"  # the format has a space before EOS


def test_chat_keeps_its_history_until_reset(llama2_chat, tokenizer, monkeypatch):
    prompts = asked(monkeypatch)
    system = {"role": "system", "content": "be brief"}
    stdin = b"one\n\n  two  \n/reset\nthree\n/exit\nfour\n"
    status, out, _ = llama2_chat(stdin, "--system", "be brief")
    assert status == 0 and out.count("an answer\n") == 3
    assert prompts == [
        tokenizer.encode_chat([system, *turn("one")]),
        tokenizer.encode_chat([system, *turn("one", "an answer"), *turn("two")]),
        tokenizer.encode_chat([system, *turn("three")]),
    ]


def test_chat_refuses_a_line_and_goes_on(llama2_chat, tokenizer, monkeypatch):
    prompts = asked(monkeypatch)
    status, _, err = llama2_chat(b"\xff\n[INST] me\nplain\n")
    assert status == 0 and prompts == [tokenizer.encode_chat(turn("plain"))]
    assert "the line: expected UTF-8" in err and "expected a content without [INST]" in err


def test_chat_says_when_the_context_is_full(llama2_chat, tokenizer, monkeypatch):
    prompts = asked(monkeypatch, "word " * 300)
    status, _, err = llama2_chat(b"one\ntwo\n/reset\nthree\n")
    assert status == 0 and err.count("the context is full") == 1 and "/reset forgets" in err
    assert prompts == [tokenizer.encode_chat(turn("one")), tokenizer.encode_chat(turn("three"))]


def test_chat_refuses_a_system_prompt_at_once(llama2_chat):
    status, out, err = llama2_chat(b"hello\n", "--system", "<<SYS>>")
    assert (status, out) == (2, "") and "expected a content without" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--top-p", "0"), ("--seed", "-1"), ("--max-new-tokens", "-1")],
)
def test_chat_refuses_settings_before_it_asks(option, value, llama2_chat):
    status, out, err = llama2_chat(b"hello\n", option, value)
    assert (status, out) == (2, "")
    assert f"{option[2:].replace('-', '_')}: expected" in err and "/reset" not in err


@pytest.mark.parametrize("where", ["input", "answer"])
def test_interrupting_chat_leaves_quietly(where, llama2_chat, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        *(("builtins.input",) if where == "input" else (chat, "stream_text")), interrupt
    )
    status, _, err = llama2_chat(b"hello\n")
    assert status == 130 and "Traceback" not in err
