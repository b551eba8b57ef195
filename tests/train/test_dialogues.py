"""Dialogues as they are read, and which of their tokens bear a loss."""

import json

import pytest

from llama2.chat_format import CHAT_TEMPLATES, format_of, without_tags
from llama2.checkpoint import SHIPPED
from llama2.finetune.dialogues import parse_dialogue, read_dialogues, to_line
from llama2.finetune.encoding import encode_dialogue, encode_prompt
from llama2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SHIPPED / "tokenizer.model")


def line(*turns, **more):
    roles = {"s": "system", "u": "user", "a": "assistant", "0": "assistant"}
    messages = [{"role": roles[kind], "content": text} for kind, text in turns]
    for message, (kind, _) in zip(messages, turns, strict=True):
        message |= {"weight": 0} if kind == "0" else {}
    return json.dumps({"messages": messages, **more})


def parse(text, tmp_path):
    return parse_dialogue(text.encode() if isinstance(text, str) else text, tmp_path / "f.jsonl", 7)


# Pieces as the shipped tokenizer gives them; those that bear a loss are in the second of each pair.
OPEN, CLOSE = ["<s>", "▁[", "IN", "ST", "]"], ["▁[", "/", "IN", "ST", "]"]
SYSTEM = ["▁<", "<", "S", "Y", "S", ">>", "\n", "B", "e", "▁", "k", "ind", ".\n", "<", "<", "/"]
SYSTEM += ["S", "Y", "S", ">>", "\n\n", "h", "i"]


@pytest.mark.parametrize(
    ("turns", "chat", "separator"),
    [
        (
            [("u", " hi "), ("a", " ho")],
            [([*OPEN, "▁h", "i", *CLOSE], ["▁h", "o", "▁", "</s>"])],
            [(["<s>", "▁h", "i", "<s>"], ["▁h", "o", "</s>"])],
        ),
        (
            [("s", "Be kind."), ("u", "hi"), ("a", "ho ho"), ("u", "12"), ("a", "ho")],
            [
                ([*OPEN, *SYSTEM, *CLOSE], ["▁h", "o", "▁h", "o", "▁", "</s>"]),
                ([*OPEN, "▁", "1", "2", *CLOSE], ["▁h", "o", "▁", "</s>"]),
            ],
            [
                (["<s>", *SYSTEM, "<s>"], ["▁h", "o", "▁h", "o", "</s>"]),
                (["<s>", "▁", "1", "2", "<s>"], ["▁h", "o", "</s>"]),
            ],
        ),
        (
            [("u", "hi"), ("0", "ho"), ("u", "hi"), ("a", "é"), ("u", "hi"), ("0", "1")],
            [
                ([*OPEN, "▁h", "i", *CLOSE, "▁h", "o", "▁", "</s>"], []),
                ([*OPEN, "▁h", "i", *CLOSE], ["▁", "<0xC3>", "<0xA9>", "▁", "</s>"]),
                ([*OPEN, "▁h", "i", *CLOSE, "▁", "1", "▁", "</s>"], []),
            ],
            [
                (["<s>", "▁h", "i", "<s>", "▁h", "o", "</s>"], []),
                (["<s>", "▁h", "i", "<s>"], ["▁", "<0xC3>", "<0xA9>", "</s>"]),
                (["<s>", "▁h", "i", "<s>", "▁", "1", "</s>"], []),
            ],
        ),
    ],
    ids=["one turn", "system and two turns", "weights"],
)
@pytest.mark.parametrize("form", ["chat", "separator"])
def test_loss_is_on_answers_and_the_eos_after_them(
    tokenizer, turns, chat, separator, form, tmp_path
):
    dialogue = parse(line(*turns), tmp_path)
    encoded = encode_dialogue(tokenizer, dialogue, form)
    pieces = [tokenizer._model.IdToPiece(int(id)) for id in encoded.ids]
    expected = chat if form == "chat" else separator
    assert [
        (piece, bool(trained)) for piece, trained in zip(pieces, encoded.is_trained, strict=True)
    ] == [
        (piece, trained)
        for prompt, answer in expected
        for trained, part in ((False, prompt), (True, answer))
        for piece in part
    ]


@pytest.mark.parametrize("form", ["chat", "separator"])
def test_generation_sees_what_training_saw(tokenizer, form, tmp_path):
    turns = [("s", "Be kind."), ("u", "hi\n x"), ("a", "ho"), ("u", "  12"), ("a", "ho")]
    dialogue = parse(line(*turns), tmp_path)
    encoded = encode_dialogue(tokenizer, dialogue, form)
    prompt = encode_prompt(tokenizer, dialogue.messages[:-1], form)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert not encoded.is_trained[: len(prompt)][-3:].any()
    assert encoded.is_trained[len(prompt) :].all()


def test_the_system_in_every_turn(tokenizer):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}] * 2
    asked = [*turns, {"role": "user", "content": "one"}]
    system = [{"role": "system", "content": "Be kind."}]
    every = encode_prompt(tokenizer, system + asked, system_in_every_turn=True)
    text = tokenizer.decode(every)
    assert text.count("<<SYS>>\nBe kind.\n<</SYS>>\n\none") == 3
    assert tokenizer.decode(encode_prompt(tokenizer, system + asked)).count("<<SYS>>") == 1


@pytest.mark.parametrize("form", ["chat", "separator"])
def test_transformers_template_gives_the_same_ids(tokenizer, form, tmp_path):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = parse(
        line(("s", " Be  kind.\n"), ("u", "hi"), ("a", " ho é"), ("u", " 1\n"), ("a", "x")),
        tmp_path,
    ).messages
    for asked in (messages[:-1], messages[1:-1], messages[3:-1]):
        found = theirs.apply_chat_template(
            list(asked), chat_template=CHAT_TEMPLATES[form], tokenize=True, return_dict=True
        )
        assert found["input_ids"] == encode_prompt(tokenizer, asked, form)
    with pytest.raises(Exception, match="user and assistant in turn"):
        theirs.apply_chat_template(list(messages[2:]), chat_template=CHAT_TEMPLATES[form])
    assert format_of(CHAT_TEMPLATES[form]) == form and format_of(None) == "chat"


GOOD = line(("u", "q"), ("a", "r"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line: expected JSON"),
        ("[1]", "line: expected a JSON object; got a list"),
        (b'{"prompt": "\xff", "completion": "a"}', "line: expected UTF-8"),
        ("{}", 'line: expected "messages", or "prompt" and "completion"; got the keys'),
        ('{"messages": [], "prompt": "a"}', "line: expected"),
        ('{"messages": "hello"}', "messages: expected a list; got a str"),
        ('{"messages": []}', "ending with assistant; got roles none"),
        ('{"messages": [{"content": "q"}]}', r'messages\[0\]: expected {"role"'),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"messages\[0\]: expected a string"),
        (line(("u", "q"), ("u", "q"), ("a", "r")), "user and assistant in turn"),
        (line(("u", "q")), "ending with assistant; got roles user"),
        (line(("a", "r")), "user and assistant in turn"),
        (line(("u", "q"), ("s", "s"), ("a", "r")), "user and assistant in turn"),
        (line(("u", "q"), ("a", " \n")), r"messages\[1\]: expected a non-empty content"),
        (line(("u", ""), ("a", "r")), r"messages\[0\]: expected a non-empty content"),
        (line(("u", "\ud800"), ("a", "r")), r"messages\[0\]: expected no lone surrogates"),
        (line(("u", "q [INST]"), ("a", "r")), r"messages\[0\]: expected a content without"),
        (line(("u", "q"), ("a", "<<SYS>>")), r"messages\[1\]: expected a content without"),
        (line(("u", "q"), ("0", "r")), "expected at least one answer with a loss"),
        (GOOD.replace('"r"', '"r", "weight": 0.5'), r"messages\[1\]: expected a weight of 0 or 1"),
        (line(("u", "q"), ("a", "r"), source=3), "source: expected a non-empty string; got 3"),
        (line(("u", "q"), ("a", "r"), source="\ud800"), "source: expected no lone surrogates"),
        (line(("u", "q"), ("a", "r"), obeys="\ud800"), "obeys: expected no lone surrogates"),
        (line(("u", "q"), ("a", "r"), obeys="a{%s}" % ("9" * 30)), "obeys: expected a regular"),
        (line(("u", "q"), ("a", "r"), obeys="(" * 5000 + ")" * 5000), "obeys: expected a regular"),
        (line(*[("u", "q")] * 10**4), "got roles user, user.{,80}$"),
        ('{"messages": null}', r"got the keys \[\]"),
        ('{"prompt": "q"}', 'as "prompt" and "completion"; got str and NoneType'),
        ('{"prompt": "q", "completion": [1]}', "got str and list"),
    ],
)
def test_lines_that_are_no_dialogue(text, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        parse(text, tmp_path)


def test_a_bad_line_is_named_and_stops_no_other(tmp_path):
    (tmp_path / "b.jsonl").write_text(f"{GOOD}\n\n{{\n{GOOD}", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n" + line(("u", "first"), ("a", "r")).encode())
    refused = []
    found = list(read_dialogues(tmp_path, lambda file, n, error: refused.append((file.name, n))))
    assert [(d.file.name, d.line) for d in found] == [
        ("a.jsonl", 2),
        ("b.jsonl", 1),
        ("b.jsonl", 4),
    ]
    assert refused == [("a.jsonl", 1), ("b.jsonl", 3)]
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: expected a JSON-lines file"):
        next(read_dialogues(tmp_path / "none.jsonl", None))


def test_prompt_and_completion(tmp_path):
    plain = parse('{"prompt": "q", "completion": "r", "source": "s", "id": 3}', tmp_path)
    assert plain.messages == parse(GOOD, tmp_path).messages and plain.source == "s"
    turns = json.loads(line(("u", "q"), ("a", "r"), ("u", "q")))["messages"]
    answer = [{"role": "assistant", "content": "r"}]
    listed = parse(json.dumps({"prompt": turns, "completion": answer}), tmp_path)
    assert listed.trained == (False, True) and listed.source == "f.jsonl"


def test_null_counts_as_absent(tmp_path):
    """As tables are written whose rows have different keys."""
    keys = {"prompt": None, "completion": None, "source": None, "obeys": None}
    asked, answer = json.loads(GOOD)["messages"]
    found = parse(
        json.dumps({"messages": [asked | {"weight": None}, answer | {"weight": None}], **keys}),
        tmp_path,
    )
    assert found == parse(GOOD, tmp_path)
    assert parse('{"messages": null, "prompt": "q", "completion": "r"}', tmp_path) == found


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    marked = b"\xef\xbb\xbf" + GOOD.encode()
    (tmp_path / "f.jsonl").write_bytes(marked + b"\n" + marked)
    refused = []
    found = list(read_dialogues(tmp_path, lambda file, n, error: refused.append(n)))
    assert [d.line for d in found] == [1] and refused == [2]  # elsewhere it is a character


def test_a_line_is_read_as_it_was_written(tmp_path):
    for turns in (
        [("s", "é"), ("u", "q"), ("0", "r"), ("u", "q"), ("a", "r")],
        [("u", "q"), ("a", "r")],
    ):
        dialogue = parse(line(*turns, source="s"), tmp_path)
        assert parse(to_line(dialogue), tmp_path) == dialogue


def test_tags_are_taken_out_of_a_text():
    assert without_tags("a [[INST]INST] b <</SYS>>") == "a  b "
