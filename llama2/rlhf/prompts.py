"""Prompts that a model is to answer and reward models are to judge: JSON lines."""

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
    """A conversation whose last message is to be answered.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, a "user" last.
        is_safety: whether the line tags it as written to provoke an unsafe answer: the safety
            reward alone counts.
        source: where it is from, as its line says; otherwise the file's name.
        file, line: where it stands, lines from 1.
    """

    messages: tuple[Message, ...]
    is_safety: bool
    source: str
    file: Path
    line: int


def read_prompts(path: Path, refuse: Refuse) -> Iterator[TaggedPrompt]:
    """Yields the prompts of a file of JSON lines, or of all `*.jsonl` of a directory, one at a
    time.

    A line is one of

    - `{"messages": [{"role": ROLE, "content": TEXT}, …]}`, the last from the user;
    - `{"prompt": TEXT}` or `{"prompt": [messages]}`, likewise;
    - a dialogue as `read_dialogues` reads it, whose last answer is dropped.

    Beside them, `"safety": true` tags a prompt as written to provoke an unsafe answer, `"source"`
    names where it is from; other keys are left alone, blank lines passed over, and a key whose
    value is null counts as absent.

    Args:
        refuse: is called for each line that is no prompt, with the file, the line's number and a
            TypeError or ValueError that says why; it may raise.
    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_lines(path, parse_prompt, refuse)


def parse_prompt(raw: bytes, file: Path, number: int) -> TaggedPrompt:
    """Returns the prompt of a line; see `read_prompts`.

    Raises:
        TypeError, ValueError: it is no prompt; says why.
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
                f"prompt: expected a text or a list of messages; got a {type(prompt).__name__}"
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
