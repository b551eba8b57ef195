"""Writes dialogues to fine-tune a small chat model and to evaluate it:

    python -m llama2.finetune.instructions --out build/instructions

- train.jsonl: single requests, some with an instruction such as "Begin every answer with …" in a
  system message or in the request, and dialogues of several turns without a system message. A model
  trained on them obeys in the turn with the instruction and tends to forget it later; Ghost
  attention corrects that.
- held_out.jsonl: the same with operands that train.jsonl does not have in that family; for facts,
  which must be known, with phrasings that train.jsonl does not use for them. The last answer of
  each dialogue is the one to ask for.
- ghost.jsonl, ghost_held_out.jsonl: dialogues of several turns under a system message that all
  answers obey, with operands of train.jsonl and with held-out ones: to make Ghost attention's data
  and to measure its effect.

A line is `{"messages": [{"role": …, "content": …}, …], "source": …}`, where the source is a
family's name, "system", "instructed" or "turns". A line with a system message also has "obeys", the
regular expression for `llama2 obedience`. The seed determines everything.

Source: the kinds of data of Touvron et al. 2023, arXiv:2307.09288, sections 3.1 and 3.3, in
miniature.
"""

import argparse
import json
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llama2.finetune.instruction_families import FAMILIES, Task, word
from llama2.storage import write_text
from llama2.terminal import answered

_HELD_OUT_SHARE = 8  # one in this many of a family's operands
# Not asked under an instruction, as their answers have a form already.
_UNBOUND = ("refusal", "greeting", "identity")
# As many turns as fit in 256 tokens with the system message in every turn, as Ghost attention
# samples.
_GHOST_CHARACTERS = 220
Dialogue = dict[str, Any]


class Instruction(NamedTuple):
    """An instruction on the form of answers.

    Attributes:
        pattern: its text, optionally with a placeholder for a word.
        form: an obedient answer, with placeholders for the plain answer and the word.
        obeyed: a regular expression that matches in obedient answers, with a placeholder for the
            word.
    """

    pattern: str
    form: str
    obeyed: str

    def word_of(self, text: str) -> str | None:
        """Returns the word of an instruction of this pattern, "" if the pattern has none; None for
        another instruction."""
        before, place, after = self.pattern.partition("{word}")
        if not place:
            return "" if text == self.pattern else None
        matches = text.startswith(before) and text.endswith(after)
        return text[len(before) : len(text) - len(after)] if matches else None


_CAPITALS = "Answer in capital letters."

INSTRUCTIONS = (
    Instruction(_CAPITALS, "{answer}", r"^[^a-z]*[A-Z][^a-z]*$"),
    Instruction("End every answer with !", "{answer}!", r"!$"),
    Instruction("Put every answer in brackets.", "({answer})", r"^\(.*\)$"),
    Instruction("Say please after every answer.", "{answer} please", r" please$"),
    Instruction("Begin every answer with Sir,", "Sir, {answer}", r"^Sir, "),
    Instruction("Begin every answer with the word {word}.", "{word} {answer}", r"^{word} "),
    Instruction("End every answer with the word {word}.", "{answer} {word}", r" {word}$"),
)


def _instruction_of(text: str) -> tuple[Instruction, str]:
    for instruction in INSTRUCTIONS:
        if (asked := instruction.word_of(text)) is not None:
            return instruction, asked
    raise ValueError(f"instruction: expected the text of one of INSTRUCTIONS; got {text!r:.60}")


def obeyed_by(instruction: str) -> str:
    """Returns a regular expression that matches in answers, right or wrong, of the form that the
    instruction asks for.

    Raises:
        ValueError: it is not an instruction of this script.
    """
    form, asked = _instruction_of(instruction)
    return form.obeyed.replace("{word}", re.escape(asked))


def obeys(instruction: str, answer: str) -> bool:
    """Returns whether an answer obeys; errors as `obeyed_by`."""
    return re.search(obeyed_by(instruction), answer) is not None


def obedient(instruction: str, answer: str) -> str:
    """Returns the plain answer in the form that the instruction asks for; errors as `obeyed_by`."""
    form, asked = _instruction_of(instruction)
    plain = answer.upper() if form.pattern == _CAPITALS else answer
    return form.form.format(answer=plain, word=asked)


def is_held_out(family: str, operands: tuple[Any, ...]) -> bool:
    """Returns whether a task is held out, by a hash of its family and operands."""
    return zlib.crc32(repr((family, operands)).encode()) % _HELD_OUT_SHARE == 0


class _Writer:
    """Draws the dialogues of one side of the split.

    Args:
        evenly: draw all families equally often instead of by weight.
    """

    def __init__(self, rng: Random, *, held_out: bool, evenly: bool) -> None:
        self._rng, self._held_out = rng, held_out
        self._names = list(FAMILIES)
        self._weights = [1.0 if evenly else family.weight for family in FAMILIES.values()]

    def _task(self) -> tuple[str, Task]:
        while True:
            (name,) = self._rng.choices(self._names, self._weights)
            task = FAMILIES[name].draw(self._rng)
            if is_held_out(name, task.operands) == self._held_out:
                return name, task

    def _instruction(self) -> str:
        pattern = self._rng.choice(INSTRUCTIONS).pattern
        while True:
            asked = word(self._rng)
            if is_held_out("instruction", (asked,)) == self._held_out:
                return pattern.format(word=asked)

    def _bound_task(self, instruction: str) -> Task:
        """Draws a task whose answer the instruction changes."""
        while True:
            name, task = self._task()
            plain = task.answer
            formed = obedient(instruction, plain)
            if name not in _UNBOUND and formed != plain and not obeys(instruction, plain):
                return task._replace(answer=formed)

    def _instructed(self) -> Task:
        """Draws a task with an instruction before or after its request."""
        instruction = self._instruction()
        task = self._bound_task(instruction)
        parts = [instruction, task.request]
        if self._rng.random() < 0.5:
            parts.reverse()
        return task._replace(request=self._rng.choice((" ", "\n")).join(parts))

    def single(self) -> Dialogue:
        name, task = self._task()
        return _dialogue([task], name)

    def instructed(self) -> Dialogue:
        return _dialogue([self._instructed()], "instructed")

    def system(self, turns: int = 1) -> Dialogue:
        instruction = self._instruction()
        tasks = [self._bound_task(instruction) for _ in range(turns)]
        return _dialogue(tasks, "system", system=instruction)

    def turns(self) -> Dialogue:
        tasks: list[Task] = []
        for _ in range(self._rng.randint(2, 4)):
            chance = self._rng.random()
            if tasks and chance < 0.2:
                request = self._rng.choice(("Say that again.", "Repeat your answer.", "Again."))
                tasks.append(Task((), request, tasks[-1].answer))
            elif chance < 0.4:
                tasks.append(self._instructed())
            else:
                tasks.append(self._task()[1])
        return _dialogue(tasks, "turns")

    def ghost(self) -> Dialogue:
        turns = self._rng.randint(2, 4)
        while True:
            dialogue = self.system(turns)
            contents = [message["content"] for message in dialogue["messages"]]
            if sum(map(len, contents)) + (turns - 1) * len(contents[0]) <= _GHOST_CHARACTERS:
                return dialogue

    def mixed(self) -> Dialogue:
        kinds = (self.single, self.instructed, self.system, self.turns)
        return self._rng.choices(kinds, (60, 10, 15, 15))[0]()


def _dialogue(tasks: Sequence[Task], source: str, *, system: str | None = None) -> Dialogue:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for task in tasks:
        messages.append({"role": "user", "content": task.request})
        messages.append({"role": "assistant", "content": task.answer})
    dialogue = {"messages": messages, "source": source}
    return dialogue if system is None else dialogue | {"obeys": obeyed_by(system)}


def dialogues(seed: int, count: int) -> dict[str, list[Dialogue]]:
    """Returns the dialogues of each file by name: `count` in train.jsonl and a tenth as many in
    each other file.

    Raises:
        ValueError: `count` is below 10.
    """
    if count < 10:
        raise ValueError(f"count: expected at least 10; got {count}")
    files = {}
    for name, held_out in (("train", False), ("held_out", True)):
        writer = _Writer(Random(f"{name} {seed}"), held_out=held_out, evenly=held_out)
        files[name] = [writer.mixed() for _ in range(count // 10 if held_out else count)]
    for name, held_out in (("ghost", False), ("ghost_held_out", True)):
        writer = _Writer(Random(f"{name} {seed}"), held_out=held_out, evenly=True)
        files[name] = [writer.ghost() for _ in range(count // 10)]
    return {f"{name}.jsonl": lines for name, lines in files.items()}


def _run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in dialogues(args.seed, args.count).items():
        write_text(args.out / name, "".join(f"{json.dumps(line)}\n" for line in lines))
        print(f"{args.out / name}: {len(lines)} dialogues")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and returns 0, or 2 after a one-line error on stderr about the user's
    input."""
    parser = argparse.ArgumentParser(
        prog="python -m llama2.finetune.instructions",
        description="Write dialogues to fine-tune a small chat model and to evaluate it.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the files")
    parser.add_argument("--seed", type=int, default=0, help="random seed; default: %(default)s")
    parser.add_argument(
        "--count",
        type=int,
        default=80_000,
        help="dialogues in train.jsonl, and a tenth as many in each of the other three files; "
        "default: %(default)s",
    )
    args = parser.parse_args(arguments)
    return answered("llama2.finetune.instructions", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
