"""Generated dialogues: valid, right, short enough, and held out what they say is."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from llama2.chat_format import CHAT_TAGS
from llama2.checkpoint import SHIPPED, load_config
from llama2.finetune import instructions
from llama2.finetune.dialogues import parse_dialogue
from llama2.finetune.encoding import encode_dialogue
from llama2.finetune.instruction_families import FAMILIES, REFUSAL
from llama2.finetune.instructions import INSTRUCTIONS, dialogues, is_held_out, obedient, obeys
from llama2.tokenizer import Tokenizer

FILES = ("train.jsonl", "held_out.jsonl", "ghost.jsonl", "ghost_held_out.jsonl")
COUNT = 2000


@pytest.fixture(scope="module")
def files():
    return dialogues(seed=0, count=COUNT)


def contents(dialogue, role):
    return [message["content"] for message in dialogue["messages"] if message["role"] == role]


def words_of(request):
    """Everything but the phrasing's first words, to be looked at by the checks below."""
    return request.rstrip("?.").replace(",", " ").split()


def numbers_of(request):
    return [int(digits) for digits in re.findall(r"\d+", request)]


# From a request, without the generator, what may be answered.
CHECKS = {
    "upper": lambda request, answer: answer.lower() in words_of(request) and answer.isupper(),
    "lower": lambda request, answer: answer.upper() in words_of(request) and answer.islower(),
    "repeat": lambda request, answer: answer == words_of(request)[-1],
    "spell": lambda request, answer: answer.replace(" ", "") == words_of(request)[-1],
    "larger": lambda request, answer: int(answer) == sorted(numbers_of(request))[-1],
    "smaller": lambda request, answer: int(answer) == sorted(numbers_of(request))[0],
    "add": lambda request, answer: int(answer) == sum(numbers_of(request)),
    "next_number": lambda request, answer: int(answer) - 1 == numbers_of(request)[0],
    "sort": lambda request, answer: numbers_of(answer) == sorted(numbers_of(request)),
    "backwards": lambda request, answer: numbers_of(answer)[::-1] == numbers_of(request),
    "parity": lambda request, answer: answer == ("even", "odd")[numbers_of(request)[0] % 2],
    "refusal": lambda request, answer: answer == REFUSAL,
    "member": lambda request, answer: (
        (answer == "yes") == (max(Counter(words_of(request)).values()) > 1)
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_answers_are_right(files, name):
    asked = [line for file in FILES[:2] for line in files[file] if line["source"] == name]
    assert len(asked) >= 15
    pairs = [(contents(line, "user")[0], contents(line, "assistant")[0]) for line in asked]
    for request, answer in pairs:
        assert CHECKS[name](request, answer), (request, answer)
        other = next((other for _, other in pairs if other != answer), None)
        assert other is None or not CHECKS[name](request, other), (request, other)


def test_the_seed_alone_decides():
    first = dialogues(seed=0, count=100)
    assert dialogues(seed=0, count=100) == first
    other = dialogues(seed=1, count=100)
    assert all(other[file] != first[file] for file in FILES)


def test_all_families_and_kinds_occur(files):
    kinds = {*FAMILIES, "instructed", "system", "turns"}
    for file in FILES[:2]:
        assert {line["source"] for line in files[file]} == kinds
    assert [len(files[file]) for file in FILES] == [COUNT, *[COUNT // 10] * 3]


def test_turns_and_system_messages(files):
    """No dialogue to train on has several turns under a system message; all of Ghost's do."""
    for file in FILES:
        for line in files[file]:
            system, turns = contents(line, "system"), len(contents(line, "user"))
            assert len(system) <= 1 and 1 <= turns <= 4
            if file.startswith("ghost"):
                assert system and turns >= 2
            else:
                assert bool(system) == (line["source"] == "system")
                assert (turns > 1) == (line["source"] == "turns")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SHIPPED / "tokenizer.model")


def test_every_line_is_a_dialogue_that_fits_the_shipped_model(files, tokenizer):
    longest = load_config(SHIPPED).max_seq_len
    for file in FILES:
        for number, line in enumerate(files[file], 1):
            dialogue = parse_dialogue(json.dumps(line).encode(), Path(file), number)
            assert dialogue.source == line["source"] and all(dialogue.trained)
            assert all(text == text.strip() != "" for text in contents(line, "assistant"))
            assert not [tag for tag in CHAT_TAGS if tag in json.dumps(line)]
            assert len(encode_dialogue(tokenizer, dialogue).ids) <= longest


def test_ghost_attention_has_room(files, tokenizer):
    """The system message is put before each question to sample the answers."""
    longest = load_config(SHIPPED).max_seq_len
    for line in [*files["ghost.jsonl"], *files["ghost_held_out.jsonl"]]:
        *questions, answer = line["messages"]
        prompt = tokenizer.encode_chat(questions, system_in_every_turn=True)
        answer = tokenizer.encode(answer["content"], bos=False, eos=True)
        assert len(prompt) + len(answer) <= longest


def test_held_out_is_what_was_never_asked(files):
    asked = {}
    for file in FILES[:2]:
        lines = [line for line in files[file] if line["source"] in FAMILIES]
        asked[file] = {(line["source"], contents(line, "user")[0]) for line in lines}
    assert asked["train.jsonl"].isdisjoint(asked["held_out.jsonl"])
    # No phrasing tells the operands of "add", nor their order.
    sums = {
        file: {tuple(sorted(numbers_of(request))) for name, request in pairs if name == "add"}
        for file, pairs in asked.items()
    }
    assert sums["held_out.jsonl"] and sums["train.jsonl"].isdisjoint(sums["held_out.jsonl"])
    words = {
        file: {words_of(request)[-1] for name, request in pairs if name == "spell"}
        for file, pairs in asked.items()
    }
    assert words["held_out.jsonl"] and words["train.jsonl"].isdisjoint(words["held_out.jsonl"])
    ghosts = [
        {tuple(contents(line, "user")) for line in files[file]} for file in FILES if "ghost" in file
    ]
    assert ghosts[0].isdisjoint(ghosts[1])


def test_both_sides_of_the_split_have_tasks():
    for name, family in FAMILIES.items():
        rng = Random(0)
        sides = Counter(is_held_out(name, family.draw(rng).operands) for _ in range(500))
        assert sides[True] > 5 and sides[False] > 300, name


@pytest.mark.parametrize("pattern", [instruction.pattern for instruction in INSTRUCTIONS])
def test_obedience(pattern):
    """A right answer under an instruction has the form that is asked for, a plain one has not."""
    instruction = pattern.format(word="lamp")
    for plain in ("garden", "Goodbye.", "b e d"):
        assert not obeys(instruction, plain)
        assert obeys(instruction, obedient(instruction, plain))
    with pytest.raises(ValueError, match="instruction: expected the text of one of INSTRUCTIONS"):
        obeys(instruction[1:], "garden")


def test_answers_under_an_instruction_obey_it(files):
    seen = set()
    for line in [line for lines in files.values() for line in lines]:
        for instruction in contents(line, "system"):
            seen.add(instruction)
            answers = contents(line, "assistant")
            assert all(obeys(instruction, answer) for answer in answers)
            assert all(re.search(line["obeys"], answer) for answer in answers)
    for pattern in (instruction.pattern.partition("{word}")[0] for instruction in INSTRUCTIONS):
        assert any(instruction.startswith(pattern) for instruction in seen)


def test_the_command_writes_what_the_function_says(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert instructions.main(["--out", str(out), "--seed", "3", "--count", "50"]) == 0
    written = {path.name: path.read_text(encoding="utf-8").splitlines() for path in out.iterdir()}
    assert {name: [*map(json.loads, lines)] for name, lines in written.items()} == dialogues(3, 50)
    assert instructions.main(["--out", str(out), "--count", "9"]) == 2
    assert "count: expected at least 10; got 9" in capsys.readouterr().err
