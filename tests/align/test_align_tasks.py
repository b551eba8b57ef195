"""Tasks of `llama2 align`: right answers, three sides that share nothing, the same bytes again."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from llama2.align import tasks
from llama2.align.recipe import PRESETS
from llama2.align.tasks import CHORES, UNTAUGHT, Writer, complied, main, side_of
from llama2.finetune.dialogues import parse_dialogue
from llama2.finetune.instruction_families import FAMILIES, MISDEEDS, REFUSAL
from llama2.finetune.instructions import is_held_out

SIDES = ("taught", "preferred", "held out")
EVERY = dict.fromkeys((*FAMILIES, "misdeed", "chore", "borderline", "system"), 1.0)


def lines_of(side, weights=EVERY, count=1500, seed=0):
    writer = Writer(Random(seed), side, weights)
    return [writer.line() for _ in range(count)]


def requests(lines):
    return {
        message["content"]
        for line in lines
        if line["source"] not in ("system", *FAMILIES)
        for message in line["messages"]
        if message["role"] == "user"
    }


@pytest.mark.parametrize("name", ["repeat", "misdeed", "chore", "borderline"])
def test_no_operands_are_on_two_sides(name):
    drawn = {side: set() for side in SIDES}
    rng = Random(1)
    for _ in range(4000):
        task = tasks._DRAW[name](rng)
        drawn[side_of(name, task.operands)].add(task.operands)
        assert (side_of(name, task.operands) == "held out") == is_held_out(name, task.operands)
    assert all(len(each) >= 4 for each in drawn.values())


def test_a_writer_keeps_to_its_side():
    asked = {side: requests(lines_of(side)) for side in SIDES}
    assert all(len(each) > 50 for each in asked.values())
    for one, other in (SIDES[:2], SIDES[1:], SIDES[::2]):
        assert not asked[one] & asked[other]


def test_untaught_verbs_are_never_taught():
    verbs = {
        re.search(r"(\w+) a \w+", request)[1]
        for request in requests(lines_of("taught", {"misdeed": 1.0, "chore": 1.0}))
    }
    assert verbs == {*MISDEEDS, *CHORES} - {*UNTAUGHT}
    assert {*UNTAUGHT} < {*MISDEEDS, *CHORES}
    said = " ".join(requests(lines_of("taught", {"borderline": 1.0}, count=300)))
    assert not {*UNTAUGHT} & {*re.findall(r"\w+", said)}


def test_answers_are_right_and_misdeeds_are_tagged():
    for line in lines_of("preferred"):
        request, answer = (message["content"] for message in line["messages"][-2:])
        assert line.get("safety", False) == (line["source"] == "misdeed")
        if line["source"] == "misdeed":
            assert answer == REFUSAL
        elif line["source"] == "chore":
            verb, thing = re.search(r"(\w+) a (\w+)", request).groups()
            assert answer == complied(request) == f"Gladly: {verb} the {thing} slowly."
        elif line["source"] == "borderline":
            (word,) = {*MISDEEDS} & {*re.findall(r"\w+", request)}
            place = 0 if "first" in request or "begin" in request else -1
            assert answer == (word[place] if "letter" in request else word)
        elif line["source"] == "system":
            said = [m["content"] for m in line["messages"] if m["role"] == "assistant"]
            assert all(re.search(line["obeys"], each) for each in said)


def test_families_come_as_often_as_their_weights():
    lines = lines_of("taught", {"repeat": 3.0, "misdeed": 1.0}, count=2000)
    counts = Counter(line["source"] for line in lines)
    assert counts["repeat"] == pytest.approx(1500, abs=4 * (2000 * 0.75 * 0.25) ** 0.5)


def test_the_files_of_a_preset(tmp_path, capsys):
    preset = PRESETS["smoke"]
    assert main(["--preset", "smoke", "--seed", "3", "--out", str(tmp_path / "one")]) == 0
    assert f"taught.jsonl: {preset.num_taught} lines" in capsys.readouterr().out
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files.keys() == {
        *("taught.jsonl", "compared.jsonl", "compared_held_out.jsonl", "round_1.jsonl"),
        *("round_2.jsonl", "rewarded.jsonl", "asked.jsonl", "obeyed.jsonl"),
    }
    for name, content in files.items():
        for number, raw in enumerate(content.splitlines(), 1):
            parse_dialogue(raw, Path(name), number)
    compared = [json.loads(raw) for raw in files["compared.jsonl"].splitlines()]
    times = preset.answers_compared
    assert len(compared) == preset.num_compared * times
    assert all(line == compared[number - number % times] for number, line in enumerate(compared))
    obeyed = [json.loads(raw) for raw in files["obeyed.jsonl"].splitlines()]
    assert all(len(line["messages"]) == 1 + 2 * preset.turns_obeyed for line in obeyed)
    taught = [json.loads(raw) for raw in files["taught.jsonl"].splitlines()]
    plain = [line["messages"][-1]["content"] for line in taught if line["source"] in FAMILIES]
    assert 0 < sum(text.startswith("I think it is ") for text in plain) < len(plain)
    assert b"I think it is " not in b"".join(files.values()).replace(files["taught.jsonl"], b"")
    tasks.write(preset, 3, tmp_path / "again")
    tasks.write(preset, 4, tmp_path / "other")
    for name, content in files.items():
        assert (tmp_path / "again" / name).read_bytes() == content
        assert (tmp_path / "other" / name).read_bytes() != content
