"""The command `llama2 obedience`: measures for how many turns a model follows an instruction that
it was given once.

Source: the evaluation of Ghost attention in Touvron et al. 2023, arXiv:2307.09288, section 3.3 and
appendix A.3.5; a regular expression replaces the human reader.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama2.checkpoint.files import require
from llama2.commands.dialogue_jobs import (
    Results,
    add_job_options,
    key_of,
    make_sampler,
    read_data,
    results,
    weights_of,
    with_checkpoint,
    write_summary,
)
from llama2.commands.json_lines import Complaints
from llama2.commands.options import path
from llama2.finetune.conversations import converse
from llama2.finetune.dialogues import Dialogue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_job_options(
        parser,
        data='dialogues with a system message and the key "obeys": REGEX; an answer that '
        "contains a match follows the message",
        out="the dialogues with the models' answers, and which answers obeyed",
        several=True,
    )
    parser.add_argument(
        "--summary", type=path, metavar="FILE", help="write the table's numbers as JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    """Asks each dialogue's questions with the system message before the first one only, and prints
    the share of answers that obey it for each turn.

    `"obeys"` of a dialogue's line is a regular expression: an answer obeys if its stripped text
    contains a match. Earlier answers are the model's own. An interrupted run resumes.

    Returns:
        0; 1 if a line was bad or a dialogue ended in an error.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about a file, an option or the model.
    """
    checkpoints = arguments.checkpoint
    if len({str(checkpoint) for checkpoint in checkpoints}) < len(checkpoints):
        raise ValueError("--checkpoint: expected different checkpoints; got one twice")
    complaints = Complaints()
    read = read_data(arguments, complaints)
    dialogues = [
        dialogue
        for dialogue in read
        if dialogue.obeys is not None and dialogue.messages[0]["role"] == "system"
    ]
    if not dialogues:
        raise ValueError(
            f'--data: expected dialogues with a system message and "obeys"; got none in '
            f"{arguments.data}"
        )
    with results(arguments.out, dialogues, ("messages", "obeyed"), weights_of(*checkpoints)) as out:
        for checkpoint in checkpoints:
            todo = [each for each in dialogues if key_of(each, checkpoint) not in out.done]
            if todo:
                _ask(with_checkpoint(arguments, checkpoint), todo, out, complaints)
        counted = [count(out, dialogues, checkpoint) for checkpoint in checkpoints]
    print(table(counted), end="")
    write_summary(arguments, {"checkpoints": counted})
    print(
        f'{len(read) - len(dialogues)} dialogues have no system message or no "obeys", '
        f"{complaints.count} bad lines",
        file=sys.stderr,
    )
    return 1 if complaints.count else 0


def _ask(
    arguments: argparse.Namespace, todo: list[Dialogue], out: Results, complaints: Complaints
) -> None:
    tqdm = require("tqdm").tqdm
    sampler = make_sampler(arguments, todo, whole=True)
    out.begin()
    with tqdm(total=len(todo), unit="dialogue", disable=None) as progress:
        for conversation in converse(sampler, todo, system_in_every_turn=False, whole_only=False):
            dialogue = conversation.dialogue
            if conversation.error is not None:
                progress.clear()
                complaints.add(dialogue.file, dialogue.line, ValueError(conversation.error))
            else:
                record = {
                    "messages": conversation.messages,
                    "obeyed": [
                        obeys(dialogue.obeys, answer.text) for answer in conversation.answers
                    ],
                }
                out.write(key_of(dialogue, arguments.checkpoint), record)
            progress.update()


def obeys(pattern: str, answer: str) -> bool:
    """Returns whether the stripped answer contains a match of the pattern."""
    return re.search(pattern, answer.strip()) is not None


def count(out: Results, dialogues: Iterable[Dialogue], checkpoint: Path) -> dict[str, Any]:
    """Counts, for each turn, the answers that were asked for and those that obeyed."""
    keys = [key_of(dialogue, checkpoint) for dialogue in dialogues]
    obeyed = [out.done[key]["obeyed"] for key in keys if key in out.done]
    turns = []
    for turn in range(max(map(len, obeyed), default=0)):
        of_turn = [each[turn] for each in obeyed if len(each) > turn]
        turns.append({"turn": turn + 1, "asked": len(of_turn), "obeyed": sum(of_turn)})
    return {"checkpoint": str(checkpoint), "turns": turns}


def table(counted: Sequence[dict[str, Any]]) -> str:
    """Returns a table with a row for each turn and a column for each checkpoint."""
    names = [each["checkpoint"] for each in counted]
    cells = [[_share(turn) for turn in each["turns"]] for each in counted]
    widths = [max(map(len, [name, *column])) for name, column in zip(names, cells, strict=True)]
    rows = [["turn", *names]]
    for turn in range(max(map(len, cells), default=0)):
        rows.append([str(turn + 1), *(each[turn] if turn < len(each) else "–" for each in cells)])
    return "".join(
        f"{first:>4}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(rest, widths, strict=True))
        + "\n"
        for first, *rest in rows
    )


def _share(turn: dict[str, int]) -> str:
    return f"{turn['obeyed'] / turn['asked']:.1%} ({turn['obeyed']} of {turn['asked']})"
