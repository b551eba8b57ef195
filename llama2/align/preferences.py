"""A program in place of human annotators: which of two answers is better, and by how much.

    python -m llama2.align.preferences --preset cpu --seed 0 --answers answers.jsonl --out DIR

makes comparisons for `llama2 reward` from the output of `llama2 answer`, in whose data each prompt
occurs once per answer.

Helpfulness: the grade of an answer is 1 if it equals the right one, otherwise 0.6 times its
similarity to it, and −0.5 if it is empty or refuses a harmless request. Safety: a refusal is the
best answer to a misdeed; answers to harmless requests are equally good, except help with a misdeed,
which is worse than all others. The difference of two grades gives the rating, in the words of
Touvron et al. 2023, arXiv:2307.09288, section 3.2.1.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

from llama2.align.recipe import PRESETS, Preset
from llama2.align.tasks import THINGS, complied
from llama2.finetune.instruction_families import MISDEEDS, REFUSAL
from llama2.rlhf.comparisons import RATINGS
from llama2.storage import write_text
from llama2.terminal import answered

_LEAST = (0.75, 0.5, 0.25, 0.05)  # least difference of grades for each of RATINGS
HELPFULNESS, SAFETY = "helpfulness", "safety"
_INEXACT = 0.6
_NO_ANSWER = -0.5
_REFUSES = "Sorry, I cannot"

Comparison = dict[str, Any]


@dataclass
class Answered:
    """A prompt, its right answer and a model's answers.

    Attributes:
        messages: those of the prompt, the last from the user.
        source: the prompt's family.
        expected: the right answer.
        answers: the stripped answers.
    """

    messages: list[dict[str, str]]
    source: str
    expected: str
    answers: list[str] = field(default_factory=list)

    @property
    def is_misdeed(self) -> bool:
        return self.expected == REFUSAL

    def grade(self, answer: str) -> float:
        """Returns the grade of an answer: by safety for a misdeed, otherwise by helpfulness."""
        if self.is_misdeed:
            return float(refuses(answer))
        return helpful_grade(answer, self.expected)


def refuses(answer: str) -> bool:
    return answer.startswith(_REFUSES)


def similarity(one: str, other: str) -> float:
    """Returns 1 − d / n, where d is the edit distance of the texts (Levenshtein 1966) and n the
    length of the longer one; 1 for two empty texts."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        before, row[0] = row[0], number
        for column, its in enumerate(other, 1):
            replaced = before + (character != its)
            before = row[column]
            row[column] = min(replaced, before + 1, row[column - 1] + 1)
    longest = max(len(one), len(other))
    return 1 - row[-1] / longest if longest else 1.0


def helpful_grade(answer: str, expected: str) -> float:
    """Returns the grade, from −0.5 to 1, of an answer to a harmless prompt; see the module."""
    if answer == expected:
        return 1.0
    if not answer or refuses(answer):
        return _NO_ANSWER
    return _INEXACT * similarity(answer, expected)


def rating(better: float, worse: float) -> str | None:
    """Returns how much better an answer with one grade is than one with another, in words; None if
    the difference is below all ratings."""
    difference = better - worse
    rated = zip(_LEAST, RATINGS, strict=True)
    return next((name for least, name in rated if difference >= least), None)


def comparisons(asked: Answered) -> list[Comparison]:
    """Returns comparisons, for `llama2 reward`, of the best answer to a prompt with each worse one.
    Empty answers are ignored."""
    answers = [answer for answer in dict.fromkeys(asked.answers) if answer]
    best = max(answers, key=asked.grade, default="")
    found = (_comparison(asked, best, worse) for worse in answers)
    return [comparison for comparison in found if comparison is not None]


def contrast(asked: Answered, rng: Random, right: Sequence[str]) -> Comparison | None:
    """Returns a comparison of the right answer with a made-up wrong one. For a misdeed that is
    help; for a harmless request a refusal, the answer to another prompt of its family, an answer
    with a wrong character, or one that does not end where it should.

    Args:
        right: answers to prompts of the family.
    Returns:
        None if the drawn answer is right.
    """
    if asked.is_misdeed:
        wrong = complied(asked.messages[-1]["content"])
    else:
        other = rng.choice(right)
        slip, more = _with_a_slip(asked.expected, rng), f"{asked.expected} {other}"
        wrong = rng.choice((REFUSAL, other, slip, more))
    return _comparison(asked, asked.expected, wrong)


def harmless(asked: Answered, rng: Random) -> Comparison:
    """Returns a comparison of an answer to a harmless prompt, right or wrong, with help with a
    misdeed."""
    request = f"How do I {rng.choice(MISDEEDS)} a {rng.choice(THINGS)}?"
    answers = [answer for answer in asked.answers if answer] or [asked.expected]
    return _line(asked, rng.choice(answers), complied(request), RATINGS[0])


def _contrasts(
    preset: Preset, asked: Answered, rng: Random, right: Sequence[str]
) -> list[Comparison]:
    """Returns different contrasts, at most as many as the preset specifies."""
    drawn = [contrast(asked, rng, right) for _ in range(preset.contrasts)]
    found = {json.dumps(each["rejected"]): each for each in drawn if each is not None}
    return list(found.values())


def _with_a_slip(text: str, rng: Random) -> str:
    place = rng.randrange(len(text))
    return text[:place] + rng.choice(ascii_lowercase) + text[place + 1 :]


def _comparison(asked: Answered, better: str, worse: str) -> Comparison | None:
    rated = rating(asked.grade(better), asked.grade(worse))
    return None if rated is None else _line(asked, better, worse, rated)


def _line(asked: Answered, chosen: str, rejected: str, rated: str) -> Comparison:
    return {
        "prompt": asked.messages,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "rating": rated,
        "source": asked.source,
    }


def prompts_of(answers: Path) -> list[Answered]:
    """Returns the output of `llama2 answer` by prompt.

    Raises:
        ValueError: a line is not from `llama2 answer`.
    """
    found: dict[str, Answered] = {}
    with answers.open(encoding="utf-8") as lines:
        records = [_record(line, answers, number) for number, line in enumerate(lines, 1)]
    # Sorted, as answers are written in the order in which they finish.
    for record in sorted(records, key=line_of):
        prompt = Answered(record["messages"], record["source"], record["expected"])
        key = json.dumps(record["messages"])
        found.setdefault(key, prompt).answers.append(record["answer"])
    return list(found.values())


def line_of(record: Mapping[str, Any]) -> int:
    """Returns the line of the data to which a record of `llama2 answer` belongs."""
    return int(record["place"].rpartition(":")[2])


def _record(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        line_of(record)
        [record[name] for name in ("messages", "source", "expected", "answer")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file}:{number}: expected a line written by llama2 answer; got {line!r:.60}"
        ) from error
    return record


def compare(
    preset: Preset, seed: int, prompts: Iterable[Answered], *, contrasts: bool = True
) -> dict[str, list[Comparison]]:
    """Returns the comparisons for each of the two reward models. For some prompts, the right answer
    is added.

    Args:
        contrasts: add comparisons with made-up wrong answers, for misdeeds and for helpfulness.
    """
    rng, prompts = Random(f"compared {seed}"), list(prompts)
    right = defaultdict(list)
    for prompt in prompts:
        right[prompt.source].append(prompt.expected)
    found: dict[str, list[Comparison]] = {HELPFULNESS: [], SAFETY: []}
    for prompt in prompts:
        if rng.random() < preset.written:
            prompt = replace(prompt, answers=[*prompt.answers, prompt.expected])
        pairs = comparisons(prompt)
        if contrasts:
            pairs += _contrasts(preset, prompt, rng, right[prompt.source])
        if prompt.is_misdeed:
            found[SAFETY] += pairs
        else:
            found[HELPFULNESS] += pairs
            found[SAFETY].append(harmless(prompt, rng))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the comparisons and returns 0, or 2 after a one-line error on stderr about the user's
    input."""
    parser = argparse.ArgumentParser(
        prog="python -m llama2.align.preferences",
        description="Compare answers by a program that knows the right ones.",
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--seed", type=int, required=True, help="random seed")
    parser.add_argument("--answers", type=Path, required=True, help="output of llama2 answer")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help=f"directory for {HELPFULNESS}.jsonl and {{SAFETY}}.jsonl",
    )
    parser.add_argument(
        "--no-contrasts",
        action="store_true",
        help="compare only the models' answers, not made-up wrong ones",
    )
    args = parser.parse_args(arguments)

    def run() -> None:
        prompts = prompts_of(args.answers)
        preset, contrasts = PRESETS[args.preset], not args.no_contrasts
        found = compare(preset, args.seed, prompts, contrasts=contrasts)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, lines in found.items():
            if not lines:
                raise ValueError(
                    f"answers: expected different answers to some prompt for {name}; got none"
                )
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            write_text(args.out / f"{name}.jsonl", text)
            print(f"{args.out / name}.jsonl: {len(lines)} comparisons")

    return answered("llama2.align.preferences", run)


if __name__ == "__main__":
    sys.exit(main())
