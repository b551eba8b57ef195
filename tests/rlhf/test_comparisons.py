"""Comparisons as they are read."""

import json

import pytest

from llama2.rlhf.comparisons import RATINGS, parse_comparison, read_comparisons, to_line

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
LONGER = [*ASKED, {"role": "assistant", "content": "r"}, {"role": "user", "content": "q2"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def line(prompt="q", chosen="a", rejected="b", **more):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


def parse(text, tmp_path):
    raw = text.encode() if isinstance(text, str) else text
    return parse_comparison(raw, tmp_path / "f.jsonl", 7)


def test_the_forms_of_a_line_are_the_same_comparison(tmp_path):
    forms = [
        line(ASKED, rating="better", source="s", id=3),
        line(ASKED, answer("a"), answer("b"), rating="better", source="s"),
        json.dumps(
            {"chosen": [*ASKED, *answer("a")], "rejected": [*ASKED, *answer("b")]}
            | {"prompt": None, "rating": "better", "source": "s"}
        ),
    ]
    found = [parse(form, tmp_path) for form in forms]
    assert found[0] == found[1] == found[2]
    assert found[0].messages == tuple(ASKED)
    assert (found[0].chosen, found[0].rejected, found[0].rating) == ("a", "b", "better")
    assert (found[0].source, found[0].file.name, found[0].line) == ("s", "f.jsonl", 7)
    plain = parse(line(), tmp_path)
    assert plain.messages == ({"role": "user", "content": "q"},)
    assert plain.rating is None and plain.source == "f.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line: expected JSON"),
        ("[1]", "line: expected a JSON object; got a list"),
        (b'{"prompt": "\xff"}', "line: expected UTF-8"),
        ('{"prompt": "q", "rejected": "b"}', 'expected "chosen" and "rejected"; got no \'chosen\''),
        (line(rejected=None), "got no 'rejected' among the keys"),
        (line(prompt=3), "prompt: expected a string or a list of messages; got a int"),
        (line(chosen=3), "chosen: expected a string or a list of messages; got a int"),
        (line(rejected=[]), "rejected: expected a string or one message with a prompt; got 0"),
        (line(chosen=answer("a") * 2), "chosen: expected a string or one message with a prompt"),
        (line(prompt=None), 'chosen: expected messages without a "prompt"; got a str'),
        (line(prompt=[]), "prompt: messages: expected an optional system message, then user"),
        (line(prompt=ASKED[:1]), "prompt: messages: expected an optional system"),
        (line(prompt=LONGER[:3]), "prompt: .* ending with user; got roles system, user, assistant"),
        (line(chosen=ASKED[1:]), "ending with assistant; got roles user, user"),
        (line(chosen=[{"role": "assistant"}]), r'chosen: messages\[1\]: expected {"role"'),
        (line(chosen=[3]), r'chosen: messages\[1\]: expected {"role"'),
        (line(prompt=" "), r"messages\[0\]: expected a non-empty content"),
        (line(chosen="\n"), r"chosen: messages\[1\]: expected a non-empty content"),
        (line(rejected=""), r"rejected: messages\[1\]: expected a non-empty content"),
        (line(rejected="\ud800"), r"rejected: messages\[1\]: expected no lone surrogates"),
        (line(prompt="[INST]"), r"prompt: messages\[0\]: expected a content without"),
        (line(rejected="<<SYS>>"), r"rejected: messages\[1\]: expected a content without"),
        (line(rejected=" a\n"), r"rejected: expected an answer other than chosen; got ' a\\n'"),
        (line(rating="good"), "rating: expected one of significantly better, .*; got 'good'"),
        (line(rating=["better"]), "rating: expected one of"),
        (line(source=3), "source: expected a non-empty string; got 3"),
        (line(source="\ud800"), "source: expected no lone surrogates"),
        (
            json.dumps({"chosen": [*ASKED, *answer("a")], "rejected": [*LONGER, *answer("b")]}),
            "rejected: expected the messages of chosen, except the last; got others",
        ),
        (json.dumps({"chosen": [], "rejected": []}), "chosen: messages: expected .* roles none"),
    ],
)
def test_lines_that_are_no_comparison(text, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        parse(text, tmp_path)


def test_a_bad_line_is_named_and_stops_no_other(tmp_path):
    (tmp_path / "b.jsonl").write_text(f"{line()}\n\n{{\n{line()}", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n" + line().encode())
    refused = []
    found = list(read_comparisons(tmp_path, lambda file, n, error: refused.append((file.name, n))))
    places = [(comparison.file.name, comparison.line) for comparison in found]
    assert places == [("a.jsonl", 2), ("b.jsonl", 1), ("b.jsonl", 4)]
    assert refused == [("a.jsonl", 1), ("b.jsonl", 3)]
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: expected a JSON-lines file"):
        next(read_comparisons(tmp_path / "none.jsonl", None))


@pytest.mark.parametrize("rating", [*RATINGS, None])
def test_a_line_is_read_as_it_was_written(rating, tmp_path):
    for text in (line(LONGER, "é ", "b", rating=rating), line(source="s", rating=rating)):
        comparison = parse(text, tmp_path)
        assert parse(to_line(comparison), tmp_path) == comparison
