"""Lines of prompts: what they may be, and what is told of those that are none."""

import json
from pathlib import Path

import pytest

from llama2.rlhf.prompts import parse_prompt, read_prompts

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}
FILE = Path("f.jsonl")


def parse(value: object, number: int = 1):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_prompt(raw, FILE, number)


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"prompt": "q"}, [USER]),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": [SYSTEM, USER, ANSWER, USER]}, [SYSTEM, USER, ANSWER, USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER]}, [SYSTEM, USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER]}, [USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
        ({"prompt": "q", "completion": "r"}, [USER]),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
        ({"prompt": "q", "chosen": "r", "rejected": "x", "rating": "better"}, [USER]),
        ({"prompt": "q", "completion": None, "messages": None, "safety": None}, [USER]),
    ],
    ids=str,
)
def test_what_a_prompt_may_be(value, messages):
    found = parse(value, 7)
    assert found.messages == tuple(messages)
    assert (found.is_safety, found.source, found.file, found.line) == (False, "f.jsonl", FILE, 7)


def test_the_tag_and_the_source():
    found = parse({"prompt": "q", "safety": True, "source": "red team"})
    assert found.is_safety and found.source == "red team"
    assert not parse({"prompt": "q", "safety": False}).is_safety


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"{", "line: expected JSON"),
        ([1], "line: expected a JSON object; got a list"),
        ({}, r'line: expected "messages" or "prompt"; got the keys \[\]'),
        ({"completion": "r"}, r'line: expected "messages" or "prompt"; got the keys'),
        ({"prompt": "q", "messages": [USER]}, "line: expected"),
        ({"prompt": 3}, "prompt: expected a string or a list of messages; got a int"),
        ({"prompt": " "}, r"messages\[0\]: expected a non-empty content"),
        ({"prompt": "[INST]"}, r"messages\[0\]: expected a content without"),
        ({"prompt": "\ud800"}, r"messages\[0\]: expected no lone surrogates"),
        ({"prompt": []}, "ending with user; got roles none"),
        ({"prompt": [USER, ANSWER]}, "ending with user; got roles user, assistant"),
        ({"prompt": [USER], "completion": [ANSWER, USER]}, "ending with assistant"),
        ({"messages": []}, "ending with user; got roles none"),
        ({"messages": [ANSWER]}, "user and assistant in turn"),
        ({"messages": [3]}, r"messages\[0\]: expected"),
        ({"messages": "q"}, "messages: expected a list; got a str"),
        ({"prompt": "q", "safety": 1}, "safety: expected true or false; got 1"),
        ({"prompt": "q", "safety": "yes"}, "safety: expected true or false; got 'yes'"),
        ({"prompt": "q", "source": ""}, "source: expected a non-empty string; got ''"),
    ],
    ids=str,
)
def test_lines_that_are_no_prompt(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parse(value)


def test_a_bad_line_is_named_and_stops_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n\n{\n{"prompt": "q"}', encoding="utf-8")
    refused = []
    found = list(read_prompts(tmp_path, lambda file, n, error: refused.append((file.name, n))))
    assert [(each.file.name, each.line) for each in found] == [("a.jsonl", 1), ("a.jsonl", 4)]
    assert refused == [("a.jsonl", 3)]
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: expected a JSON-lines file"):
        next(read_prompts(tmp_path / "none.jsonl", None))
