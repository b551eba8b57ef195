"""A page for a blind comparison, by a person, of a model's answers with written ones.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.1, a manual comparison of 180 answers.
"""

import html
import random
from collections.abc import Sequence
from typing import NamedTuple

from llama2.chat_format import Message

_STYLE = """
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; }
section { border-top: 1px solid #999; margin-top: 1.5rem; break-inside: avoid; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem; padding: .6rem;
  border: 1px solid #ccc; border-radius: 4px; font: inherit; }
h3 { font-size: .9rem; margin: .5rem 0 .2rem; } label { margin-right: 1.5rem; }
td, th { padding: .1rem 1rem; text-align: left; }
"""


class Reviewed(NamedTuple):
    """A prompt and its two answers.

    Attributes:
        place: its name in the key.
    """

    place: str
    prompt: Sequence[Message]
    model: str
    written: str


def review_sheet(reviewed: Sequence[Reviewed], *, sample: int, seed: int) -> str:
    """Returns a self-contained HTML page: `sample` of the prompts, or all if there are fewer, in
    random order, answers A and B in random order, and a collapsed key at the end. The prompts and
    the seed determine the page.

    Raises:
        ValueError: `sample` is below 1.
    """
    if sample < 1:
        raise ValueError(f"sample: expected at least 1; got {sample}")
    rng = random.Random(seed)
    drawn = rng.sample(reviewed, min(sample, len(reviewed)))
    sections, key = [], []
    for number, each in enumerate(drawn, 1):
        model_first = rng.random() < 0.5
        left, right = (each.model, each.written) if model_first else (each.written, each.model)
        sections.append(_section(number, each.prompt, left, right))
        key.append((str(number), "A" if model_first else "B", each.place))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in key
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Which answer is better?</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Which answer is better?</h1>\n<p>{len(drawn)} of {len(reviewed)} prompts, each with "
        "a model's answer and a written one.</p>\n"
        f"{''.join(sections)}<details>\n<summary>Which answers are the model's</summary>\n<table>\n"
        "<tr><th>prompt</th><th>the model's</th><th>line</th></tr>\n"
        f"{rows}</table>\n</details>\n</body>\n</html>\n"
    )


def _section(number: int, prompt: Sequence[Message], left: str, right: str) -> str:
    asked = "".join(
        f"<h3>{html.escape(message['role'])}</h3>\n{_text(message['content'])}"
        for message in prompt
    )
    answers = "".join(
        f"<div><h3>{name}</h3>\n{_text(text)}</div>\n" for name, text in (("A", left), ("B", right))
    )
    choices = "".join(
        f'<label><input type="radio" name="better-{number}"> {choice}</label>\n'
        for choice in ("A is better", "B is better", "neither")
    )
    return (
        f'<section>\n<h2>{number}</h2>\n{asked}<div class="answers">\n{answers}</div>\n'
        f"<p>{choices}</p>\n</section>\n"
    )


def _text(text: str) -> str:
    # HTML drops one line end after <pre>; this one keeps a text's own.
    return f"<pre>\n{html.escape(text)}</pre>\n"
