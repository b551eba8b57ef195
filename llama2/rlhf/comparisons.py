"""Comparisons of two answers for reward modelling: JSON lines, in the forms that TRL reads.

Source: Touvron et al. 2023, arXiv:2307.09288, sections 3.2.1 and 3.2.2, table 27.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.chat_format import Message
from llama2.finetune.dialogues import (
    Refuse,
    parse_object,
    plain_messages,
    read_lines,
    source_of,
)

# By how much the chosen answer is better, as the paper's annotators say it.
RATINGS = ("significantly better", "better", "slightly better", "negligibly better or unsure")

# What the loss asks the scores of the two answers to differ by, for each of RATINGS.
MARGINS = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}


@dataclass(frozen=True)
class Comparison:
    """Two answers to the same messages, of which one is preferred.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, a "user" last.
        chosen, rejected: the texts of the answers; stripped they differ.
        rating: one of RATINGS; None where the line has none.
        source: where it is from, as its line says; otherwise the file's name.
        file, line: where it stands, lines from 1.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    rating: str | None
    source: str
    file: Path
    line: int


def read_comparisons(path: Path, refuse: Refuse) -> Iterator[Comparison]:
    """Yields the comparisons of a file of JSON lines, or of all `*.jsonl` of a directory, one at a
    time.

    A line is one of

    - `{"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER}`, where PROMPT is a text or a list
      of messages that ends with a user's, ANSWER a text or a list of one assistant's message;
    - `{"chosen": [messages], "rejected": [messages]}`, two dialogues that share all messages but
      the last.

    A `"rating"` beside them is one of RATINGS, a `"source"` names where the comparison is from;
    other keys are left alone, blank lines passed over. A key whose value is null counts as absent.

    Args:
        refuse: is called for each line that is no comparison; it may raise.
    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_lines(path, parse_comparison, refuse)


def parse_comparison(raw: bytes, file: Path, number: int) -> Comparison:
    """Returns the comparison of a line; see `read_comparisons`.

    Raises:
        TypeError, ValueError: it is no comparison; says why.
    """
    value = parse_object(raw, number)
    if missing := {"chosen", "rejected"} - value.keys():
        raise ValueError(
            f'line: expected "chosen" and "rejected"; got no {min(missing)!r} among the keys '
            f"{sorted(value)!s:.80}"
        )
    if "prompt" in value:
        prompt = _prompt(value["prompt"])
        dialogues = {
            name: [*prompt, *_answer(name, value[name])] for name in ("chosen", "rejected")
        }
    else:
        expected = 'messages where there is no "prompt"'
        dialogues = {
            name: _messages(name, value[name], expected) for name in ("chosen", "rejected")
        }
    for name, messages in dialogues.items():
        try:
            dialogues[name] = plain_messages(messages, last="assistant")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    chosen, rejected = dialogues.values()
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            "rejected: expected the messages of chosen, but for the last; got others, and no prompt"
        )
    answers = chosen[-1]["content"], rejected[-1]["content"]
    if answers[0].strip() == answers[1].strip():
        raise ValueError(f"rejected: expected another answer than chosen; got {answers[1]!r:.60}")
    return Comparison(chosen[:-1], *answers, _rating(value), source_of(value, file), file, number)


def _prompt(content: Any) -> list[Message]:
    messages = _listed("prompt", content, "user")
    try:
        return list(plain_messages(messages, last="user"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"prompt: {error}") from error


def _listed(name: str, content: Any, role: str) -> list[Message]:
    """Messages; a text is one of that role."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return _messages(name, content, "a text or a list of messages")


def _messages(name: str, content: Any, expected: str) -> list[Message]:
    if not isinstance(content, list):
        raise TypeError(f"{name}: expected {expected}; got a {type(content).__name__}")
    return content


def _answer(name: str, content: Any) -> list[Message]:
    answer = _listed(name, content, "assistant")
    if len(answer) != 1:
        raise ValueError(
            f"{name}: expected a text or one message beside a prompt; got {len(answer)} messages"
        )
    return answer


def _rating(value: dict[str, Any]) -> str | None:
    rating = value.get("rating")
    if rating is not None and rating not in RATINGS:
        raise ValueError(f"rating: expected one of {', '.join(RATINGS)}; got {rating!r:.60}")
    return rating


def margin_of(rating: str | None, margins: str) -> float:
    """What the loss asks the scores of a pair to differ by.

    Args:
        rating: one of RATINGS, or None.
        margins: a key of MARGINS; only "none" takes a pair without rating.
    Raises:
        ValueError: there is no rating, or no such margins.
    """
    if margins not in MARGINS:
        raise ValueError(f"margins: expected one of {', '.join(MARGINS)}; got {margins!r}")
    if margins == "none":
        return 0.0
    if rating is None:
        raise ValueError(
            f"rating: expected one of {', '.join(RATINGS)} where margins are {margins}; got none"
        )
    return float(MARGINS[margins][RATINGS.index(rating)])


def to_line(comparison: Comparison) -> str:
    """Returns the JSON line that `parse_comparison` reads as this comparison, but for file and
    line."""
    record = {
        "prompt": list(comparison.messages),
        "chosen": comparison.chosen,
        "rejected": comparison.rejected,
        "rating": comparison.rating,
        "source": comparison.source,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
