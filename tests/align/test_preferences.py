"""The program that prefers: grades, ratings, and the comparisons that follow from answers."""

import json
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from llama2.align.preferences import (
    Answered,
    compare,
    comparisons,
    contrast,
    harmless,
    helpful_grade,
    main,
    prompts_of,
    rating,
    refuses,
    similarity,
)
from llama2.align.recipe import PRESETS
from llama2.finetune.instruction_families import REFUSAL

SMOKE = PRESETS["smoke"]


def asked(request="Say cat.", expected="cat", answers=(), source="repeat"):
    return Answered([{"role": "user", "content": request}], source, expected, list(answers))


def misdeed(*answers):
    return asked("How do I rob a bank?", REFUSAL, answers, "misdeed")


def distance(one, other):
    """By the recursion that defines it."""

    @cache
    def of(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return of(a[1:], b[1:])
        return 1 + min(of(a[1:], b), of(a, b[1:]), of(a[1:], b[1:]))

    return of(one, other)


def test_similarity_is_that_of_the_definition():
    rng = Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abA", k=rng.randint(0, 6))) for _ in range(2))
        longest = max(len(one), len(other), 1)
        assert similarity(one, other) == pytest.approx(1 - distance(one, other) / longest)
        assert similarity(one, other) == similarity(other, one)
    assert similarity("cat", "CAT") == 0


def test_the_order_of_grades():
    """Right, nearly right, wrong, and no help at all."""
    grades = [helpful_grade(answer, "banana") for answer in ("banana", "banan", "x", REFUSAL)]
    assert grades == sorted(grades, reverse=True) and len({*grades}) == 4
    assert grades[0] == 1 and grades[1] == pytest.approx(0.6 * 5 / 6)
    assert helpful_grade("", "banana") == helpful_grade(REFUSAL, "banana") == -0.5


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (1.5, "significantly better"),
        (0.75, "significantly better"),
        (0.74, "better"),
        (0.5, "better"),
        (0.3, "slightly better"),
        (0.1, "negligibly better or unsure"),
        (0.01, None),
        (0.0, None),
        (-1.0, None),
    ],
)
def test_ratings(difference, expected):
    assert rating(difference, 0.0) == expected


def test_the_best_answer_is_chosen_before_every_worse_one():
    found = comparisons(asked(answers=["dog", "cat", "cat", "", "car"]))
    pairs = {(each["chosen"][0]["content"], each["rejected"][0]["content"]) for each in found}
    assert pairs == {("cat", "dog"), ("cat", "car")}
    assert {each["rating"] for each in found} == {"significantly better", "better"}
    assert found[0]["prompt"] == [{"role": "user", "content": "Say cat."}]
    assert found[0]["source"] == "repeat"


@pytest.mark.parametrize("answers", [[], ["cat"], ["cat", "cat"], ["", ""], ["dog", "dog"]])
def test_answers_that_are_alike_are_not_compared(answers):
    assert comparisons(asked(answers=answers)) == []


def test_a_misdeed_is_judged_by_safety_alone():
    (found,) = comparisons(misdeed("Gladly: rob the bank slowly.", "Sorry, I cannot help."))
    assert refuses(found["chosen"][0]["content"]) and found["rating"] == "significantly better"
    assert comparisons(misdeed("Gladly: rob the bank slowly.", "no")) == []
    assert comparisons(misdeed(REFUSAL, "Sorry, I cannot help.")) == []


def test_contrasts_have_a_wrong_answer_rejected():
    rng = Random(0)
    drawn = [contrast(asked(), rng, ["cat", "dog", "owl"]) for _ in range(300)]
    wrong = {each["rejected"][0]["content"] for each in drawn if each is not None}
    assert {REFUSAL, "dog", "owl"} < wrong and "cat" not in wrong and None in drawn
    longer = {"cat cat", "cat dog", "cat owl"}
    assert longer < wrong
    slips = wrong - {REFUSAL, "dog", "owl"} - longer
    assert len(slips) > 20 and all(distance(each, "cat") == 1 for each in slips)
    assert {each["chosen"][0]["content"] for each in drawn if each is not None} == {"cat"}
    pair = contrast(misdeed(), rng, [REFUSAL])
    assert pair["chosen"][0]["content"] == REFUSAL
    assert pair["rejected"][0]["content"] == "Gladly: rob the bank slowly."


def test_safety_prefers_any_harmless_answer_to_help_with_a_misdeed():
    rng = Random(0)
    drawn = [harmless(asked(answers=["dog", ""]), rng) for _ in range(20)]
    assert {each["chosen"][0]["content"] for each in drawn} == {"dog"}
    wrong = {each["rejected"][0]["content"] for each in drawn}
    assert len(wrong) > 10 and all(each.startswith("Gladly: ") for each in wrong)
    assert harmless(asked(answers=[""]), rng)["chosen"][0]["content"] == "cat"


def test_who_learns_from_which_comparisons():
    prompts = [asked(f"Say cat{n}.", f"cat{n}", ["cat", "x"]) for n in range(400)]
    prompts += [misdeed(REFUSAL, f"yes{n}") for n in range(50)]
    preset = replace(SMOKE, written=0.0, contrasts=0)
    found = compare(preset, 0, prompts)
    assert {each["source"] for each in found["helpfulness"]} == {"repeat"}
    assert len(found["helpfulness"]) == 400
    sources = [each["source"] for each in found["safety"]]
    assert sources.count("misdeed") == 50 and sources.count("repeat") == 400
    every = compare(replace(preset, contrasts=2), 0, prompts)
    assert 1000 < len(every["helpfulness"]) <= 1200
    assert compare(replace(preset, contrasts=2), 0, prompts, contrasts=False) == found
    assert sum(each["source"] == "misdeed" for each in every["safety"]) == 100
    assert compare(preset, 0, prompts) == found != compare(preset, 1, prompts)
    wrong = [asked(answers=["x", "y"])]
    chosen = [
        {each["chosen"][0]["content"] for each in compare(changed, 0, wrong)["helpfulness"]}
        for changed in (preset, replace(preset, written=1.0))
    ]
    assert chosen == [set(), {"cat"}]


def record(place, answer, expected="cat", request="Say cat.", source="repeat"):
    messages = [{"role": "user", "content": request}]
    return {
        **{"place": f"data.jsonl:{place}", "checkpoint": "x", "source": source},
        **{"messages": messages, "answer": answer, "expected": expected},
    }


def write(path, records):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in records), encoding="utf-8")


def test_answers_are_put_together_whatever_order_they_finished_in(tmp_path):
    records = [
        *(record(1, "cat"), record(2, "dog"), record(10, "car")),
        *(record(11, "no", "dog", "Say dog."), record(12, "dog", "dog", "Say dog.")),
    ]
    write(tmp_path / "one.jsonl", records)
    Random(0).shuffle(records)
    write(tmp_path / "other.jsonl", records)
    found = prompts_of(tmp_path / "one.jsonl")
    assert [each.answers for each in found] == [["cat", "dog", "car"], ["no", "dog"]]
    assert prompts_of(tmp_path / "other.jsonl") == found


def test_the_command(tmp_path, capsys):
    records = [record(n, answer) for n, answer in enumerate(("cat", "dog"), 1)]
    records += [
        record(n, answer, REFUSAL, "How do I rob a bank?", "misdeed")
        for n, answer in enumerate((REFUSAL, "yes"), 3)
    ]
    write(tmp_path / "answers.jsonl", records)
    words = ["--preset", "smoke", "--seed", "0", "--answers", str(tmp_path / "answers.jsonl")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    for name in ("helpfulness", "safety"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines and all({"prompt", "chosen", "rejected"} < json.loads(x).keys() for x in lines)
    write(tmp_path / "answers.jsonl", [{"place": "data.jsonl:1"}])
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "answers.jsonl:1: expected a line written by llama2 answer" in capsys.readouterr().err
