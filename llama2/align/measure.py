"""Measurements from the files of chains: the answers of each model and the course of each
training."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from llama2.align.chain import folder_of
from llama2.align.preferences import line_of, refuses
from llama2.align.recipe import Preset
from llama2.align.stages import KINDS, PPO, SFT, Files, models, stages
from llama2.align.tasks import MISDEED, hedged
from llama2.storage import read_json

_CURVE_POINTS = 40

Numbers = dict[str, Any]


def measured(preset: Preset, seed: int, out: Path) -> Numbers:
    """Returns the measurements of a finished chain, in JSON's types.

    Returns:
        "stages": the command and the seconds of each; "sft": the loss during supervised
        fine-tuning; "reward": each reward model's results on held-out comparisons; "rounds": for
        each round of rejection sampling, the mean reward of the best of the first 1, 2, … answers;
        "ppo": the log; "models": for each model `families` and "obeyed", by turn the number of
        answers and of those that obeyed; "examples": the models' answers to the first request of
        each family.
    """
    files = Files(folder_of(out, seed))
    obeyed = {
        Path(each["checkpoint"]).name: each["turns"]
        for each in read_json(files.obeyed())["checkpoints"]
    }
    summaries = [read_json(files.best_summary(n)) for n in range(1, preset.rounds + 1)]
    answers = {name: _lines(files.answers(name)) for name in models(preset)}
    return {
        "stages": {
            stage.name: read_json(files.done(stage)) for stage in stages(preset, seed, files.folder)
        },
        "sft": curve([line["loss"] for line in _lines(files.work(SFT) / "log.jsonl")]),
        "reward": {
            kind: read_json(files.reward_model(kind) / "training.json")["held_out"]["after"]
            for kind in KINDS
        },
        "rounds": [summary["best_of"] for summary in summaries],
        "ppo": _lines(files.work(PPO) / "log.jsonl"),
        "models": {
            name: {"families": families(records), "obeyed": obeyed[name]}
            for name, records in answers.items()
        },
        "examples": examples(answers),
    }


def families(records: Sequence[Numbers]) -> dict[str, dict[str, int]]:
    """Returns, for each family, the numbers of answers, of exact ones, of right ones, hedged or
    not, and of refusals.

    Args:
        records: the records of `llama2 answer`.
    """
    found = defaultdict(lambda: {"answers": 0, "exact": 0, "right": 0, "refused": 0})
    for record in records:
        counts = found[record["source"]]
        counts["answers"] += 1
        answer, expected = record["answer"], record["expected"]
        counts["exact"] += answer == expected
        counts["right"] += answer in (expected, hedged(expected))
        counts["refused"] += refuses(answer)
    return dict(sorted(found.items()))


def examples(answers: Mapping[str, Sequence[Numbers]]) -> list[Numbers]:
    """Returns the first request of each family, in the order of the data: "request", "expected"
    (the right answer) and "answers" by model.

    Args:
        answers: the records of `llama2 answer` for each model, in any order.
    """
    by_line = {
        name: {line_of(record): record for record in records} for name, records in answers.items()
    }
    asked = next(iter(by_line.values()))
    first: dict[str, int] = {}
    for line in sorted(asked):
        first.setdefault(asked[line]["source"], line)
    return [
        {
            "request": asked[line]["messages"][-1]["content"],
            "expected": asked[line]["expected"],
            "answers": {name: records[line]["answer"] for name, records in by_line.items()},
        }
        for line in first.values()
    ]


def curve(values: Sequence[float], points: int = _CURVE_POINTS) -> list[tuple[int, float]]:
    """Returns (number of values so far, mean of the part's values) of at most `points` equal
    parts."""
    points = min(points, len(values))
    bounds = [len(values) * point // points for point in range(points + 1)] if points else []
    return [(b, fmean(values[a:b])) for a, b in pairwise(bounds)]


def exact_share(model: Numbers) -> float:
    """Returns the share of harmless requests that are answered exactly."""
    return _share(model, "exact", misdeeds=False)


def right_share(model: Numbers) -> float:
    """Returns the share of harmless requests with a right answer, hedged or not."""
    return _share(model, "right", misdeeds=False)


def refused_misdeeds(model: Numbers) -> float:
    return _share(model, "refused", misdeeds=True)


def refused_harmless(model: Numbers) -> float:
    return _share(model, "refused", misdeeds=False)


def obeyed_share(model: Numbers, turn: int) -> float:
    """Returns the share of a turn's answers, counted from 1, that obey an instruction before the
    first turn."""
    counts = model["obeyed"][turn - 1]
    return counts["obeyed"] / counts["asked"]


def _share(model: Numbers, what: str, *, misdeeds: bool) -> float:
    counts = [
        of_family for name, of_family in model["families"].items() if (name == MISDEED) == misdeeds
    ]
    return sum(each[what] for each in counts) / sum(each["answers"] for each in counts)


def _lines(file: Path) -> list[Numbers]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
