"""The command `llama2 chat`: a conversation on the terminal, in Llama 2's chat format."""

import argparse
import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from llama2.chat_format import without_tags
from llama2.checkpoint import SHIPPED, SHIPPED_CHAT
from llama2.commands.options import add_generation_options, load, make_generator, sampling
from llama2.commands.speculation import (
    add_speculation_options,
    check_options,
    report,
    speculation,
)
from llama2.commands.text import require_utf8, stream_text
from llama2.finetune.encoding import encode_prompt
from llama2.generate import Generator, check_settings
from llama2.stops import stop_ids
from llama2.taught_format import taught_format
from llama2.tokenizer import Tokenizer

_NOTES = {
    SHIPPED: "the shipped model continues Python source; it was not trained to answer",
    SHIPPED_CHAT: "the shipped chat model can only do small tasks, such as 'What is the "
    "opposite of hot?' or 'Sort 9 2 8 from small to large.'; its README.md lists them",
}
_COMMANDS = "/reset forgets the conversation, /exit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_generation_options(parser, max_new_tokens=512, chat=True)
    add_speculation_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions for the conversation")


def run(arguments: argparse.Namespace) -> int:
    """Converses until the user leaves, and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `load`, `speculation` and
            `chat`.
    """
    system = arguments.system and require_utf8("--system", arguments.system)
    check_options(arguments)
    model, tokenizer = load(arguments)
    if arguments.checkpoint in _NOTES:
        print(f"note: {_NOTES[arguments.checkpoint]}", file=sys.stderr)
    drafter = speculation(arguments, tokenizer)
    generator = make_generator(arguments, model, tokenizer, drafter)
    stops = stop_ids(tokenizer, arguments.checkpoint)
    form = taught_format(arguments.checkpoint)
    chat(generator, tokenizer, stops=stops, system=system, form=form, **sampling(arguments))
    return 0


def chat(
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    stops: Iterable[int],
    system: str | None = None,
    form: str = "chat",
    max_new_tokens: int,
    **settings: Any,
) -> None:
    """Reads lines from stdin and streams answers to stdout, until /exit or the end of the input.

    It never shortens the conversation: once the context is full, it refuses the next line and names
    the commands that help.

    Args:
        stops: ids that end an answer.
        system: instructions that hold for the whole conversation.
        form: of the conversation, see `encode_prompt`.
        max_new_tokens: of one answer; fewer where the context ends.
        settings: `generate`'s temperature, top_p and seed.
    Raises:
        ValueError: the system prompt contains one of the chat format's tags or fills the context;
            or a setting is wrong.
    """
    check_settings(max_new_tokens=max_new_tokens, **settings)  # before the first question
    max_seq_len = generator.max_seq_len
    opening = [] if system is None else [{"role": "system", "content": system}]
    _tokens(max_seq_len, tokenizer, form, [*opening, {"role": "user", "content": ""}])
    # Line editing, where Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    _note(_COMMANDS)
    history = opening
    while (line := _ask()) != "/exit":
        if line == "/reset":
            history = opening
            _note("forgotten")
        elif line:
            try:
                asked = [*history, {"role": "user", "content": require_utf8("the line", line)}]
                tokens = _tokens(max_seq_len, tokenizer, form, asked)
            except ValueError as error:
                _note(f"{error}; {_COMMANDS}")
                continue
            room = max_seq_len - len(tokens)
            settings["max_new_tokens"] = min(max_new_tokens, room)
            answer = ""
            for piece in stream_text(generator, tokenizer, tokens, stops=stops, **settings):
                shown = piece if answer else piece.lstrip()  # a space follows "[/INST]"
                print(shown, end="", flush=True)
                answer += shown
            print()
            report(generator)
            kept = without_tags(answer)
            if kept != answer:
                _note("removed the chat format's tags from the answer that the conversation keeps")
            history = [*asked, {"role": "assistant", "content": kept}]


def _ask() -> str:
    if sys.stdin is None:  # closed
        return "/exit"
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return "/exit"


def _tokens(
    max_seq_len: int, tokenizer: Tokenizer, form: str, messages: list[dict[str, str]]
) -> list[int]:
    tokens = encode_prompt(tokenizer, messages, form)
    if len(tokens) >= max_seq_len:
        raise ValueError(
            f"the context is full: the conversation takes {len(tokens)} tokens; it "
            f"holds {max_seq_len}, with the answer"
        )
    return tokens


def _note(text: str) -> None:
    print(text, file=sys.stderr)
