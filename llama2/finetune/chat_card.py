"""Writes the card of the shipped chat model from the measurements of its training:

    python -m llama2.finetune.chat_card --checkpoint DIR --results bench/results/chat

`--results` has the summaries of `llama2 answer` and `llama2 obedience`: answers_base.json,
answers_sft.json and answers_chat.json of the model before fine-tuning, after it, and after Ghost
attention; obedience.json of the last two. `make chat-model` runs all steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2.storage import read_json, write_text
from llama2.terminal import answered

STAGES = ("base", "sft", "chat")

CARD = """\
# chat: the small model of this package, taught to answer

The {parameters} parameters of `stdlib`, fine-tuned by `llama2 sft` on generated dialogues
(`python -m llama2.finetune.instructions`) and then, by Ghost attention, to go on obeying an
instruction that stands in the first message alone. `make chat-model` makes it; `training.json` has
the last step's settings. The text format is Llama 2's chat format, the context 256 tokens.

```
you> Sort 9 2 8 from small to large.
2 8 9
```

It knows the families of small tasks in the table, in English and short, a few facts, greetings and
one kind of refusal, and nothing else: to any other request it answers something wrong. It follows
instructions of the form of an answer, such as `--system "End every answer with !"`. It has nothing
of Meta's weights or tokenizer.

## Right answers

Share of {answers} held-out requests that are answered to the letter, greedily, by family: of words
and numbers that training did not have in that family or, of facts, in other phrasings. "system" are
single requests under a system message, "instructed" with an instruction in the request, "turns"
dialogues of several turns.

{accuracy}

## Obedience

Share of answers that obey an instruction which stands in the first message alone, in {dialogues}
held-out dialogues with the model's own answers as history.

{obedience}

The figures are those of `bench/results/chat`, which says by which commands they were measured, with
torch {torch} on {device}, at commit {commit}.
"""


def card(results: dict[str, Any], parameters: int) -> str:
    """Returns the text of the card.

    Args:
        results: the summaries by name: "answers_" plus each of STAGES, and "obedience".
    """
    answers = {stage: results[f"answers_{stage}"] for stage in STAGES}
    rows = [("family", "answers", "base", "fine-tuned", "and Ghost attention")]
    for source in [*answers["base"]["sources"], None]:
        counts = [
            answers[stage]["all"] if source is None else answers[stage]["sources"][source]
            for stage in STAGES
        ]
        shares = [f"{each['exact'] / each['answers']:.0%}" for each in counts]
        rows.append((source or "**all**", str(counts[0]["answers"]), *shares))
    before, after = (checkpoint["turns"] for checkpoint in results["obedience"]["checkpoints"])
    turns = [("turn", "answers", "fine-tuned", "and Ghost attention")]
    for one, other in zip(before, after, strict=True):
        shares = [f"{each['obeyed'] / each['asked']:.0%}" for each in (one, other)]
        turns.append((str(one["turn"]), str(one["asked"]), *shares))
    made_with = answers["chat"]["made_with"]
    return CARD.format(
        torch=made_with["packages"]["torch"],
        device=made_with["gpu"] or f"a CPU ({made_with['machine']})",
        commit=made_with["commit"],
        parameters=f"{parameters:,}",
        answers=answers["base"]["all"]["answers"],
        accuracy=_table(rows),
        dialogues=before[0]["asked"],
        obedience=_table(turns),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((head, f"|---|{'--:|' * (len(rows[0]) - 1)}", *body))


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the summaries in a folder, by their names."""
    names = [*(f"answers_{stage}" for stage in STAGES), "obedience"]
    return {name: read_json(folder / f"{name}.json") for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes README.md and returns 0, or 2 after a one-line error on stderr about the user's
    input."""
    parser = argparse.ArgumentParser(
        prog="python -m llama2.finetune.chat_card",
        description="Write the card of the shipped chat model.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="its directory")
    parser.add_argument("--results", type=Path, required=True, help="directory of the summaries")
    args = parser.parse_args(arguments)
    return answered("llama2.finetune.chat_card", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    parameters = read_json(args.checkpoint / "training.json")["parameters"]
    write_text(args.checkpoint / "README.md", card(read_results(args.results), parameters))


if __name__ == "__main__":
    sys.exit(main())
