"""Comparisons of two answers for reward modelling: JSON lines in the formats of TRL.

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

# How much better the chosen answer is, in the paper's words.
RATINGS = ("significantly better", "better", "slightly better", "negligibly better or unsure")

# The loss's margin between the two scores, for each of RATINGS.
MARGINS = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}


@dataclass(frozen=True)
class Comparison:
    """Two answers to the same messages, one of which is preferred.

    Attributes:
        messages: an optional "system", then "user" and "assistant" in turn, a "user" last.
        chosen, rejected: the texts of the answers, which differ after stripping.
        rating: one of RATINGS; None if the line has none.
        source: the line's "source", otherwise the file's name.
        file, line: its place; lines count from 1.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    rating: str | None
    source: str
    file: Path
    line: int


def read_comparisons(path: Path, refuse: Refuse) -> Iterator[Comparison]:
    """Yields the comparisons of a JSON-lines file, or of all `*.jsonl` of a directory.

    A line is one of

    - `{"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER}`, where PROMPT is a string or a list
      of messages that ends with a user's, and ANSWER is a string or a list of one assistant's
      message;
    - `{"chosen": [messages], "rejected": [messages]}`, two dialogues with the same messages except
      the last.

    Optional keys are `"rating"`, one of RATINGS, and `"source"`, the comparison's origin. Other
    keys and blank lines are ignored. A key with the value null counts as absent.

    Args:
        refuse: called for each line that is not a comparison; it may raise.
    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return read_lines(path, parse_comparison, refuse)


def parse_comparison(raw: bytes, file: Path, number: int) -> Comparison:
    """Returns the comparison of a line; see `read_comparisons`.

    Raises:
        TypeError, ValueError: it is not a comparison; the message gives the reason.
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
        expected = 'messages without a "prompt"'
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
            "rejected: expected the messages of chosen, except the last; got others, without a "
            "prompt"
        )
    answers = chosen[-1]["content"], rejected[-1]["content"]
    if answers[0].strip() == answers[1].strip():
        raise ValueError(f"rejected: expected an answer other than chosen; got {answers[1]!r:.60}")
    return Comparison(chosen[:-1], *answers, _rating(value), source_of(value, file), file, number)


def _prompt(content: Any) -> list[Message]:
    messages = _listed("prompt", content, "user")
    try:
        return list(plain_messages(messages, last="user"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"prompt: {error}") from error


def _listed(name: str, content: Any, role: str) -> list[Message]:
    """Returns a list of messages; a string becomes one message with the given role."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return _messages(name, content, "a string or a list of messages")


def _messages(name: str, content: Any, expected: str) -> list[Message]:
    if not isinstance(content, list):
        raise TypeError(f"{name}: expected {expected}; got a {type(content).__name__}")
    return content


def _answer(name: str, content: Any) -> list[Message]:
    answer = _listed(name, content, "assistant")
    if len(answer) != 1:
        raise ValueError(
            f"{name}: expected a string or one message with a prompt; got {len(answer)} messages"
        )
    return answer


def _rating(value: dict[str, Any]) -> str | None:
    rating = value.get("rating")
    if rating is not None and rating not in RATINGS:
        raise ValueError(f"rating: expected one of {', '.join(RATINGS)}; got {rating!r:.60}")
    return rating


def margin_of(rating: str | None, margins: str) -> float:
    """Returns the loss's margin between the scores of a pair.

    Args:
        rating: one of RATINGS, or None.
        margins: a key of MARGINS; only "none" accepts a pair without a rating.
    Raises:
        ValueError: the rating is missing, or `margins` is unknown.
    """
    if margins not in MARGINS:
        raise ValueError(f"margins: expected one of {', '.join(MARGINS)}; got {margins!r}")
    if margins == "none":
        return 0.0
    if rating is None:
        raise ValueError(
            f"rating: expected one of {', '.join(RATINGS)} with margins {margins}; got none"
        )
    return float(MARGINS[margins][RATINGS.index(rating)])


def to_line(comparison: Comparison) -> str:
    """Returns the JSON line from which `parse_comparison` reads this comparison, except file and
    line."""
    record = {
        "prompt": list(comparison.messages),
        "chosen": comparison.chosen,
        "rejected": comparison.rejected,
        "rating": comparison.rating,
        "source": comparison.source,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
