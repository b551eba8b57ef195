"""The command `llama2 ghost-attention`: makes dialogues that train a model to keep following a
system message.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.3.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama2.chat_format import check_messages
from llama2.checkpoint.files import require
from llama2.commands.dialogue_jobs import (
    Results,
    add_job_options,
    key_of,
    make_sampler,
    place_of,
    read_data,
    results,
    weights_of,
)
from llama2.commands.json_lines import Complaints
from llama2.commands.options import path
from llama2.finetune.conversations import converse, ghost_dialogue
from llama2.finetune.dialogues import Dialogue, to_record, utf8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_job_options(
        parser,
        data="dialogues with a system message that every answer should follow",
        out="the dialogues with the model's answers; only the last one has a loss",
    )
    parser.add_argument(
        "--instructions",
        type=path,
        metavar="FILE",
        help="instructions, one per line: a dialogue without a system message gets one of them, "
        "drawn by --seed (default here: 0). Without this option such dialogues are skipped",
    )


def run(arguments: argparse.Namespace) -> int:
    """Samples every answer of each dialogue with the system message before every question, and
    writes the dialogue with the system message before the first question only.

    A dialogue with an empty or truncated answer is reported and left out; the next run tries it
    again. A killed run leaves whole lines and at most one partial line; the next run cuts the
    partial line off and does the missing dialogues.

    Returns:
        0; 1 if a line was bad or a dialogue ended in an error.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about a file, an option or the model.
    """
    complaints, checkpoint = Complaints(), arguments.checkpoint
    read = read_data(arguments, complaints)
    instructions = []
    if arguments.instructions is not None:
        instructions = read_instructions(arguments.instructions, complaints)
    dialogues = [
        dialogue
        for dialogue in (under_instruction(each, instructions, arguments.seed) for each in read)
        if dialogue.messages[0]["role"] == "system"
    ]
    num_left_out = 0
    keys, settings = ("messages", "source"), {"checkpoint": str(checkpoint)}
    with results(arguments.out, dialogues, keys, weights_of(checkpoint), settings=settings) as out:
        todo = [dialogue for dialogue in dialogues if key_of(dialogue, checkpoint) not in out.done]
        if todo:
            num_left_out = _sample(arguments, todo, out, complaints)
        num_there = sum(key_of(dialogue, checkpoint) in out.done for dialogue in dialogues)
    before = len(dialogues) - len(todo)
    print(
        f"{num_there - before} dialogues done, {before} were done before, {num_left_out} left out, "
        f"{len(read) - len(dialogues)} have no system message, {complaints.count} bad lines",
        file=sys.stderr,
    )
    return 1 if complaints.count else 0


def _sample(
    arguments: argparse.Namespace, todo: list[Dialogue], out: Results, complaints: Complaints
) -> int:
    """Writes the missing dialogues and returns the number of those left out."""
    tqdm = require("tqdm").tqdm
    sampler = make_sampler(arguments, todo, whole=True, system_in_every_turn=True)
    out.begin()
    num_left_out = 0
    with tqdm(total=len(todo), unit="dialogue", disable=None) as progress:
        for conversation in converse(sampler, todo, system_in_every_turn=True, whole_only=True):
            dialogue, turn = conversation.dialogue, len(conversation.answers) + 1
            if conversation.error is not None:
                progress.clear()
                complaints.add(dialogue.file, dialogue.line, ValueError(conversation.error))
            elif conversation.fault is not None:
                progress.clear()
                print(
                    f"{dialogue.file}:{dialogue.line}: left out: its answer {turn} is "
                    f"{conversation.fault}",
                    file=sys.stderr,
                )
                num_left_out += 1
            else:
                out.write(
                    key_of(dialogue, arguments.checkpoint), to_record(ghost_dialogue(conversation))
                )
            progress.update()
    return num_left_out


def under_instruction(
    dialogue: Dialogue, instructions: Sequence[str], seed: int | None
) -> Dialogue:
    """Returns the dialogue; one without a system message gets one of the instructions as its system
    message, drawn from the seed and the dialogue's place."""
    if dialogue.messages[0]["role"] == "system" or not instructions:
        return dialogue
    rng = random.Random(f"{seed or 0} {place_of(dialogue)}")
    system = {"role": "system", "content": rng.choice(instructions)}
    return replace(dialogue, messages=(system, *dialogue.messages))


def read_instructions(file: Path, complaints: Complaints) -> list[str]:
    """Returns the stripped lines of a file without the blank ones.

    Raises:
        ValueError: there are none.
    """
    instructions = []
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                text = utf8(raw, number).strip()
                check_messages(
                    [{"role": "system", "content": text}, {"role": "user", "content": ""}]
                )
            except ValueError as error:
                complaints.add(file, number, error)
                continue
            if text:
                instructions.append(text)
    if not instructions:
        raise ValueError(f"--instructions: expected at least one instruction; got none in {file}")
    return instructions
