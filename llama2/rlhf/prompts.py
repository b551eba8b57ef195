"""Prompts for a model to answer and for reward models to judge: JSON lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.chat_format import Message
from llama2.finetune.dialogues import (
    Refuse,
    parse_object,
    parts_of,
    plain_messages,
    read_lines,
    source_of,
)


@dataclass(frozen=True)
class TaggedPrompt:
    """A conversation with a last message to answer.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, a "user" last.
        is_safety: whether the line marks it as written to provoke an unsafe answer; then only the
            safety reward counts.
        source: the line's "source", otherwise the file's name.
        file, line: its place; lines count from 1.
    """

    messages: tuple[Message, ...]
    is_safety: bool
    source: str
    file: Path
    line: int


def read_prompts(path: Path, refuse: Refuse) -> Iterator[TaggedPrompt]:
    """Yields the prompts of a JSON-lines file, or of all `*.jsonl` of a directory.

    A line is one of

    - `{"messages": [{"role": ROLE, "content": TEXT}, …]}`, the last from the user;
    - `{"prompt": TEXT}` or `{"prompt": [messages]}`, likewise;
    - a dialogue as `read_dialogues` reads it, whose last answer is dropped.

    Optional keys are `"safety"`, true for a prompt that is written to provoke an unsafe answer, and
    `"source"`, its origin. Other keys and blank lines are ignored, and a key with the value null
    counts as absent.

    Args:
        refuse: called for each line that is not a prompt, with the file, the line's number and a
            TypeError or ValueError with the reason; it may raise.
    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return read_lines(path, parse_prompt, refuse)


def parse_prompt(raw: bytes, file: Path, number: int) -> TaggedPrompt:
    """Returns the prompt of a line; see `read_prompts`.

    Raises:
        TypeError, ValueError: it is not a prompt; the message gives the reason.
    """
    value = parse_object(raw, number)
    messages = _messages(value)
    is_safety = value.get("safety", False)
    if not isinstance(is_safety, bool):
        raise TypeError(f"safety: expected true or false; got {is_safety!r:.60}")
    return TaggedPrompt(messages, is_safety, source_of(value, file), file, number)


def _messages(value: dict[str, Any]) -> tuple[Message, ...]:
    if not {"messages", "prompt"} & value.keys():
        raise ValueError(
            f'line: expected "messages" or "prompt"; got the keys {sorted(value)!s:.80}'
        )
    if "prompt" in value and not {"messages", "completion"} & value.keys():
        prompt = value["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list):
            raise TypeError(
                f"prompt: expected a string or a list of messages; got a {type(prompt).__name__}"
            )
        return plain_messages(prompt, last="user")
    before, after = parts_of(value)
    messages = [*before, *after]
    is_dialogue = "completion" in value or (
        bool(messages)
        and isinstance(messages[-1], dict)
        and messages[-1].get("role") == "assistant"
    )
    if is_dialogue:
        return plain_messages(messages, last="assistant")[:-1]
    return plain_messages(messages, last="user")
