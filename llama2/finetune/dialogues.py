"""Dialogues for fine-tuning: JSON lines, in the forms that Transformers and TRL read."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama2.chat_format import Message, check_messages

T = TypeVar("T")

_FORMS = '"messages", or "prompt" and "completion"'

# What is told of a line that is no dialogue: the file, the line's number and why.
Refuse = Callable[[Path, int, Exception], None]


@dataclass(frozen=True)
class Dialogue:
    """A conversation of which answers are to be learnt.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, an "assistant" last.
        trained: of each answer, whether its tokens bear a loss.
        source: where it is from, as its line says; otherwise the file's name.
        file, line: where it stands, lines from 1.
        obeys: a regular expression that is found (`re.search`) in every stripped answer that obeys
            the system message, where the line states one.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    source: str
    file: Path
    line: int
    obeys: str | None = None


def read_dialogues(path: Path, refuse: Refuse) -> Iterator[Dialogue]:
    """Yields the dialogues of a file of JSON lines, or of all `*.jsonl` of a directory, one at a
    time.

    A line is one of

    - `{"messages": [{"role": ROLE, "content": TEXT}, …]}`, roles "system", "user" and "assistant";
      an assistant's message with `"weight": 0` bears no loss;
    - `{"prompt": TEXT, "completion": TEXT}`, one turn;
    - `{"prompt": [messages], "completion": [messages]}`, of which only the completion's answers
      bear a loss.

    A `"source"` beside them names where the dialogue is from, `"obeys"` is a regular expression
    that tells whether an answer obeys the system message; other keys are left alone, blank lines
    passed over. A key whose value is null counts as absent: tables whose rows have different keys
    are written so.

    Args:
        refuse: is called for each line that is no dialogue; it may raise.
    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_lines(path, parse_dialogue, refuse)


def read_lines(path: Path, parse: Callable[[bytes, Path, int], T], refuse: Refuse) -> Iterator[T]:
    """What the lines of a file of JSON lines, or of all `*.jsonl` of a directory, hold, one at a
    time; blank lines are passed over.

    Args:
        parse: of a line's bytes, its file and its number from 1.
        refuse: is called for each line of which `parse` raises a TypeError or ValueError.
    Raises:
        FileNotFoundError: there is no such file.
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
            f"{path}: expected a file of JSON lines or a directory of *.jsonl; got none"
        )
    return files


def parse_dialogue(raw: bytes, file: Path, number: int) -> Dialogue:
    """Returns the dialogue of a line; see `read_dialogues`.

    Raises:
        TypeError, ValueError: it is no dialogue; says why.
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
        raise ValueError("messages: expected an answer that bears a loss; got none")
    return Dialogue(plain, tuple(trained), source_of(value, file), file, number, _obeys(value))


def parse_object(raw: bytes, number: int) -> dict[str, Any]:
    """Returns the JSON object of a line, without the keys whose value is null.

    Raises:
        TypeError, ValueError: it is none; says why.
    """
    try:
        value = json.loads(utf8(raw, number))  # bytes would be read as UTF-16, too
    except UnicodeDecodeError as error:
        raise ValueError(f"line: expected UTF-8; {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise TypeError(f"line: expected a JSON object; got a {type(value).__name__}")
    return {key: each for key, each in value.items() if each is not None}


def plain_messages(messages: Sequence[Message], *, last: str) -> tuple[Message, ...]:
    """Messages with a role and a content and no other key.

    Args:
        last: the role of the last.
    Raises:
        TypeError, ValueError: as `check_messages`; or a content, but for the system's, is blank, or
            has half a character.
    """
    check_messages(messages, last=last)
    for index, message in enumerate(messages):
        _check_content(index, message)
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def source_of(value: dict[str, Any], file: Path) -> str:
    """Returns the "source" of a line's object; the file's name where it has none.

    Raises:
        TypeError, ValueError: it is no text, or an empty one.
    """
    source = value.get("source", printable_name(file))
    if not isinstance(source, str) or not source:
        raise TypeError(f"source: expected a text; got {source!r:.60}")
    _check_whole("source", source)
    return source


def printable_name(file: Path) -> str:
    """Returns the name of a file, as UTF-8 can hold it: in a file system it may be any bytes."""
    return file.name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def utf8(raw: bytes, number: int) -> str:
    """Returns the text of a line, without the mark that editors put at the beginning of a file."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8")


def parts_of(value: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """Of a line's object, messages that bear no loss, and those after them whose answers may.

    Raises:
        TypeError, ValueError: it has not the keys of a dialogue, or other values than lists and
            texts there. What the lists hold is not looked at.
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
        raise ValueError(
            f"messages[{index}]: expected a content that is not empty; got {content!r}"
        )
    _check_whole(f"messages[{index}]", content)


def _check_whole(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise ValueError(f"{name}: expected whole characters; {error}") from error


def _weight(index: int, message: Message) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise ValueError(f"messages[{index}]: expected a weight of 0 or 1; got {weight!r:.60}")
    return bool(weight)


def to_line(dialogue: Dialogue) -> str:
    """Returns the JSON line that `parse_dialogue` reads as this dialogue, but for file and line."""
    return json.dumps(to_record(dialogue), ensure_ascii=False) + "\n"


def to_record(dialogue: Dialogue) -> dict[str, Any]:
    """What `to_line` writes."""
    weights = iter(dialogue.trained)
    messages = [
        {**message, "weight": 0}
        if message["role"] == "assistant" and not next(weights)
        else message
        for message in dialogue.messages
    ]
    record = {"messages": messages, "source": dialogue.source}
    return record if dialogue.obeys is None else record | {"obeys": dialogue.obeys}
