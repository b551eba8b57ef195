"""Dialogues for fine-tuning: JSON lines in the formats of Transformers and TRL."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama2.chat_format import Message, check_messages

T = TypeVar("T")

_FORMS = '"messages", or "prompt" and "completion"'

# Called with the file, the line's number and the error of a line that is not a dialogue.
Refuse = Callable[[Path, int, Exception], None]


@dataclass(frozen=True)
class Dialogue:
    """A conversation with answers to train on.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, an "assistant" last.
        trained: for each answer, whether its tokens have a loss.
        source: the line's "source", otherwise the file's name.
        file, line: its place; lines count from 1.
        obeys: the line's "obeys", a regular expression: an answer obeys the system message if its
            stripped text contains a match (`re.search`). None without one.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    source: str
    file: Path
    line: int
    obeys: str | None = None


def read_dialogues(path: Path, refuse: Refuse) -> Iterator[Dialogue]:
    """Yields the dialogues of a JSON-lines file, or of all `*.jsonl` of a directory.

    A line is one of

    - `{"messages": [{"role": ROLE, "content": TEXT}, …]}`, roles "system", "user" and "assistant";
      an assistant's message with `"weight": 0` has no loss;
    - `{"prompt": TEXT, "completion": TEXT}`, one turn;
    - `{"prompt": [messages], "completion": [messages]}`, in which only the completion's answers
      have a loss.

    Optional keys are `"source"`, the dialogue's origin, and `"obeys"`, a regular expression that
    decides whether an answer obeys the system message. Other keys and blank lines are ignored. A
    key with the value null counts as absent, as in tables whose rows have different keys.

    Args:
        refuse: called for each line that is not a dialogue; it may raise.
    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return read_lines(path, parse_dialogue, refuse)


def read_lines(path: Path, parse: Callable[[bytes, Path, int], T], refuse: Refuse) -> Iterator[T]:
    """Yields what `parse` returns for the lines of a JSON-lines file, or of all `*.jsonl` of a
    directory, without blank lines.

    Args:
        parse: called with a line's bytes, its file and its number from 1.
        refuse: called for each line for which `parse` raises TypeError or ValueError.
    Raises:
        FileNotFoundError: `path` does not exist.
    """
    for file in dialogue_files(path):
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if not raw.strip():
                    continue
                try:
                    parsed = parse(raw, file, number)
                except (TypeError, ValueError) as error:
                    refuse(file, number, error)
                    continue
                yield parsed


def dialogue_files(path: Path) -> list[Path]:
    """Returns the files that `read_dialogues` reads; errors as there."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"{path}: expected a JSON-lines file or a directory of *.jsonl; got none"
        )
    return files


def parse_dialogue(raw: bytes, file: Path, number: int) -> Dialogue:
    """Returns the dialogue of a line; see `read_dialogues`.

    Raises:
        TypeError, ValueError: it is not a dialogue; the message gives the reason.
    """
    value = parse_object(raw, number)
    prompt, answers = parts_of(value)
    messages = [*prompt, *answers]
    plain = plain_messages(messages, last="assistant")
    trained = [_weight(index, message) for index, message in enumerate(messages)]
    trained = [
        weight and index >= len(prompt)
        for index, (weight, message) in enumerate(zip(trained, messages, strict=True))
        if message["role"] == "assistant"
    ]
    if not any(trained):
        raise ValueError("messages: expected at least one answer with a loss; got none")
    return Dialogue(plain, tuple(trained), source_of(value, file), file, number, _obeys(value))


def parse_object(raw: bytes, number: int) -> dict[str, Any]:
    """Returns the JSON object of a line without keys whose value is null.

    Raises:
        TypeError, ValueError: it is not a JSON object; the message gives the reason.
    """
    try:
        value = json.loads(utf8(raw, number))  # json.loads would also accept UTF-16 bytes
    except UnicodeDecodeError as error:
        raise ValueError(f"line: expected UTF-8; {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise TypeError(f"line: expected a JSON object; got a {type(value).__name__}")
    return {key: each for key, each in value.items() if each is not None}


def plain_messages(messages: Sequence[Message], *, last: str) -> tuple[Message, ...]:
    """Returns the messages reduced to role and content.

    Args:
        last: the role of the last message.
    Raises:
        TypeError, ValueError: as `check_messages`; or a content, except the system's, is blank, or
            one contains a lone surrogate.
    """
    check_messages(messages, last=last)
    for index, message in enumerate(messages):
        _check_content(index, message)
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def source_of(value: dict[str, Any], file: Path) -> str:
    """Returns the "source" of a line's object, or the file's name if it has none.

    Raises:
        TypeError, ValueError: it is not a string, or it is empty.
    """
    source = value.get("source", printable_name(file))
    if not isinstance(source, str) or not source:
        raise TypeError(f"source: expected a non-empty string; got {source!r:.60}")
    _check_whole("source", source)
    return source


def printable_name(file: Path) -> str:
    """Returns a file's name with replacements for bytes that are not UTF-8."""
    return file.name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def utf8(raw: bytes, number: int) -> str:
    """Returns the text of a line, without a byte-order mark at the beginning of the file."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8")


def parts_of(value: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """Returns the messages of a line's object without a loss, and the following ones, whose answers
    may have a loss.

    Raises:
        TypeError, ValueError: the keys are not those of a dialogue, or their values are not lists
            or strings. The contents of lists are not checked.
    """
    if ("messages" in value) == ("prompt" in value or "completion" in value):
        raise ValueError(f"line: expected {_FORMS}; got the keys {sorted(value)!s:.80}")
    if "messages" in value:
        if not isinstance(value["messages"], list):
            got = type(value["messages"]).__name__
            raise TypeError(f"messages: expected a list; got a {got}")
        return [], value["messages"]
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        answer = {"role": "assistant", "content": completion}
        return [{"role": "user", "content": prompt}], [answer]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt, completion
    raise TypeError(
        'line: expected texts or lists of messages as "prompt" and "completion"; got '
        f"{type(prompt).__name__} and {type(completion).__name__}"
    )


def _obeys(value: dict[str, Any]) -> str | None:
    pattern = value.get("obeys")
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise TypeError(f"obeys: expected a regular expression; got {pattern!r:.60}")
    _check_whole("obeys", pattern)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"obeys: expected a regular expression; got {pattern!r:.60}: {error}"
        ) from error
    return pattern


def _check_content(index: int, message: Message) -> None:
    content = message["content"]
    if not content.strip() and message["role"] != "system":
        raise ValueError(f"messages[{index}]: expected a non-empty content; got {content!r}")
    _check_whole(f"messages[{index}]", content)


def _check_whole(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
        raise ValueError(f"{name}: expected no lone surrogates; {error}") from error


def _weight(index: int, message: Message) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise ValueError(f"messages[{index}]: expected a weight of 0 or 1; got {weight!r:.60}")
    return bool(weight)


def to_line(dialogue: Dialogue) -> str:
    """Returns the JSON line from which `parse_dialogue` reads this dialogue, except file and
    line."""
    return json.dumps(to_record(dialogue), ensure_ascii=False) + "\n"


def to_record(dialogue: Dialogue) -> dict[str, Any]:
    """Returns the JSON object of `to_line`."""
    weights = iter(dialogue.trained)
    messages = [
        {**message, "weight": 0}
        if message["role"] == "assistant" and not next(weights)
        else message
        for message in dialogue.messages
    ]
    record = {"messages": messages, "source": dialogue.source}
    return record if dialogue.obeys is None else record | {"obeys": dialogue.obeys}
