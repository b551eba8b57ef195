"""The command `llama2 answer`: compares a model's answers with those of held-out dialogues."""

import argparse
import sys
from collections.abc import Iterable
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
    write_summary,
)
from llama2.commands.json_lines import Complaints
from llama2.commands.options import integer, path
from llama2.finetune.conversations import answer_last
from llama2.finetune.dialogues import Dialogue
from llama2.finetune.review_sheet import Reviewed, review_sheet
from llama2.storage import write_text

_KEYS = ("source", "messages", "answer", "expected")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_job_options(
        parser,
        data="dialogues; the last answer of each is the expected one",
        out="the prompts with the model's answers and the expected ones",
    )
    add = parser.add_argument
    add("--summary", type=path, metavar="FILE", help="write the table's numbers as JSON")
    add(
        "--sheet",
        type=path,
        metavar="FILE",
        help="write an HTML page that shows prompts with both answers, in an order drawn by --seed "
        "(default here: 0), on which a person marks the better one",
    )
    add(
        "--sample",
        type=integer,
        default=180,
        metavar="N",
        help="prompts on the --sheet page; default: %(default)s, as in Llama 2's paper",
    )


def run(arguments: argparse.Namespace) -> int:
    """Answers the last question of each dialogue, with the dialogue's own earlier answers, and
    prints for each source the share of stripped answers that equal the expected ones.

    An interrupted run resumes.

    Returns:
        0; 1 if a line was bad or an answer ended in an error.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about a file, an option or the model.
    """
    if arguments.sample < 1:
        raise ValueError(f"--sample: expected at least 1; got {arguments.sample}")
    complaints, checkpoint = Complaints(), arguments.checkpoint
    dialogues = read_data(arguments, complaints)
    settings = {"checkpoint": str(checkpoint)}
    with results(arguments.out, dialogues, _KEYS, weights_of(checkpoint), settings=settings) as out:
        todo = [dialogue for dialogue in dialogues if key_of(dialogue, checkpoint) not in out.done]
        if todo:
            _answer(arguments, todo, out, complaints)
        keys = [key_of(dialogue, checkpoint) for dialogue in dialogues]
        records = [out.done[key] for key in keys if key in out.done]
    counted = count(records)
    print(table(counted), end="")
    write_summary(arguments, {"checkpoint": str(checkpoint)} | counted)
    if arguments.sheet is not None:
        reviewed = [
            Reviewed(each["place"], each["messages"], each["answer"], each["expected"])
            for each in records
        ]
        page = review_sheet(reviewed, sample=arguments.sample, seed=arguments.seed or 0)
        write_text(arguments.sheet, page)
    before = len(dialogues) - len(todo)
    print(
        f"{len(records) - before} answers done, {before} were done before, {complaints.count} bad "
        "lines",
        file=sys.stderr,
    )
    return 1 if complaints.count else 0


def _answer(
    arguments: argparse.Namespace, todo: list[Dialogue], out: Results, complaints: Complaints
) -> None:
    tqdm = require("tqdm").tqdm
    sampler = make_sampler(arguments, todo, whole=False)
    out.begin()
    with tqdm(total=len(todo), unit="answer", disable=None) as progress:
        for dialogue, answer in answer_last(sampler, todo):
            if isinstance(answer, ValueError):
                progress.clear()
                complaints.add(dialogue.file, dialogue.line, answer)
            else:
                record = {
                    "source": dialogue.source,
                    "messages": dialogue.messages[:-1],
                    "answer": answer.text,
                    "expected": dialogue.messages[-1]["content"].strip(),
                    "num_new_tokens": answer.num_new_tokens,
                    "finish_reason": answer.finish_reason,
                }
                out.write(key_of(dialogue, arguments.checkpoint), record)
            progress.update()


def count(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of answers and of exact answers, of all dialogues and by source."""
    total, sources = {"answers": 0, "exact": 0}, {}
    for record in records:
        of_source = sources.setdefault(record["source"], {"answers": 0, "exact": 0})
        for counts in (total, of_source):
            counts["answers"] += 1
            counts["exact"] += record["answer"] == record["expected"]
    return {"all": total, "sources": dict(sorted(sources.items()))}


def table(counted: dict[str, Any]) -> str:
    """Returns a table with a row for each source and one for all."""
    rows = [*counted["sources"].items(), ("all", counted["all"])]
    width = max(len(name) for name, _ in [*rows, ("source", {})])
    lines = [f"{'source':<{width}}  answers  exact   share"]
    for name, counts in rows:
        share = f"{counts['exact'] / counts['answers']:.1%}" if counts["answers"] else "–"
        lines.append(f"{name:<{width}}  {counts['answers']:>7}  {counts['exact']:>5}  {share:>6}")
    return "\n".join(lines) + "\n"
