"""`llama2 ghost-attention` and `llama2 obedience`: what is asked, written, resumed and counted."""

import fcntl
import json
from pathlib import Path

import pytest
from answering import TOKENIZER, Answering, dialogue, replace_weights, turns_of

from gqa_kernels import get_backend
from llama2 import checkpoint, cli
from llama2.chat_format import CHAT_TEMPLATES
from llama2.commands import dialogue_jobs, obedience
from llama2.finetune import sampling
from llama2.finetune.dialogues import parse_dialogue, read_dialogues
from llama2.finetune.encoding import encode_dialogue
from llama2.generate import generate

LINES = [
    dialogue("a?", "x", "b?", "x", "c?", "x", system="Shout", source="ours", obeys="!$"),
    dialogue("no system", "x"),
    dialogue("d?", "x", system="Hush"),
    dialogue("e?", "x", "f?", "x", system="Shout"),
]


def echo(text: str) -> str:
    """The last question, and how many instructions the prompt has."""
    return f"{turns_of(text)[-1].split()[-1]} {text.count('<<SYS>>')}!"


@pytest.fixture
def stand_in(monkeypatch, device):
    """Answers in place of the shipped model, which is loaded once; knows which was asked for."""
    model = checkpoint.load(checkpoint.SHIPPED_CHAT, get_backend("eager"), device=device)
    stub = Answering(echo)
    stub.loaded = []

    def load(arguments):
        stub.loaded.append(str(arguments.checkpoint))
        return model, TOKENIZER

    monkeypatch.setattr(sampling, "serve", stub.serve)
    monkeypatch.setattr(dialogue_jobs, "load", load)
    replace_weights(monkeypatch, dialogue_jobs)
    return stub


@pytest.fixture
def files(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    write(data, LINES)
    return data, out


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def written(path) -> dict:
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_place = {record["place"]: record for record in records}
    assert len(by_place) == len(records)
    return by_place


@pytest.fixture
def ghost(files, device, capfd):
    """Runs the command on `files`: (status, records by place, stderr); told: without records."""

    def told(*options: str) -> tuple[int, str]:
        paths = ["--data", str(files[0]), "--out", str(files[1]), "--device", str(device)]
        status = cli.main(["ghost-attention", *paths, "--backend", "eager", *options])
        stdout, stderr = capfd.readouterr()
        assert stdout == ""
        return status, stderr

    def run(*options: str) -> tuple[int, dict, str]:
        status, stderr = told(*options)
        return status, written(files[1]), stderr

    run.told = told
    return run


SHOUTED = {
    "place": "data.jsonl:1",
    "checkpoint": str(checkpoint.SHIPPED_CHAT),
    "weights_crc32": "00000000",
    "messages": [
        {"role": "system", "content": "Shout"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "a? 1!", "weight": 0},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "b? 2!", "weight": 0},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "c? 3!"},
    ],
    "source": "ours",
    "obeys": "!$",
}


@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_line_becomes(backwards, ghost, stand_in):
    stand_in.backwards = backwards
    status, records, err = ghost()
    assert status == 0
    assert err == (
        "3 dialogues done, 0 were done before, 0 left out, 1 have no system message, 0 bad lines\n"
    )
    assert set(records) == {"data.jsonl:1", "data.jsonl:3", "data.jsonl:4"}
    assert records["data.jsonl:1"] == SHOUTED
    assert records["data.jsonl:3"] == {
        "place": "data.jsonl:3",
        "checkpoint": str(checkpoint.SHIPPED_CHAT),
        "weights_crc32": "00000000",
        "messages": [
            {"role": "system", "content": "Hush"},
            {"role": "user", "content": "d?"},
            {"role": "assistant", "content": "d? 1!"},
        ],
        "source": "data.jsonl",
    }


def test_the_instruction_is_sampled_with_in_every_turn_and_learnt_with_in_the_first(
    ghost, files, stand_in
):
    ghost()
    shout = "<<SYS>>\nShout\n<</SYS>>\n\n"
    asked = [turns_of(text) for text in stand_in.prompts]
    for turns in (["a?"], ["a?", "b?"], ["a?", "b?", "c?"], ["e?", "f?"]):
        assert [f"{shout}{turn}" for turn in turns] in asked
    assert "a? 1! " in stand_in.prompts[-1]  # its own answer goes on as history, not the data's
    assert not any("x" in text for text in stand_in.prompts)

    (learnt,) = [each for each in read_dialogues(files[1], refuse) if len(each.trained) == 3]
    encoded = encode_dialogue(TOKENIZER, learnt)
    assert TOKENIZER.decode(encoded.ids.tolist()).count("Shout") == 1
    trained = encoded.ids[encoded.is_trained].tolist()
    assert TOKENIZER.decode(trained).strip() == "c? 3!" and trained[-1] == TOKENIZER.eos_id


def refuse(file, number, error):
    raise error


def test_the_separator_format(ghost, stand_in):
    stand_in.answer = lambda text: "yes"
    _, records, _ = ghost("--format", "separator")
    assert len(records) == 3
    assert all("[INST]" not in text for text in stand_in.prompts)
    assert max(text.count("Shout") for text in stand_in.prompts) == 3


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_format_is_the_one_that_the_checkpoint_was_taught(file, ghost, stand_in, tmp_path):
    """The second is where Transformers' `save_pretrained` puts a template."""
    stand_in.answer = lambda text: "yes"
    template = CHAT_TEMPLATES["separator"]
    settings = json.dumps({} if file.endswith(".jinja") else {"chat_template": template})
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    if file.endswith(".jinja"):
        (tmp_path / file).write_text(template, encoding="utf-8")
    assert len(ghost("--checkpoint", str(tmp_path))[1]) == 3
    assert all("[INST]" not in text for text in stand_in.prompts)


@pytest.mark.parametrize("kill_after", range(6))
def test_a_killed_run_is_gone_on_with(kill_after, ghost, stand_in):
    options = ("--max-batch", "1")
    stand_in.kill_after = kill_after
    status, before, _ = ghost(*options)
    assert status == 130 and len(before) <= 2
    stand_in.kill_after = None
    status, records, err = ghost(*options)
    assert status == 0 and records["data.jsonl:1"] == SHOUTED and len(records) == 3
    assert f"{3 - len(before)} dialogues done, {len(before)} were done before" in err


def test_what_was_done_is_written_before_the_end(ghost, stand_in):
    """Of a group those that have fewest turns."""
    stand_in.kill_after = 3  # the first turn of all
    assert set(ghost()[1]) == {"data.jsonl:3"}


def test_a_killed_run_loses_no_more_than_a_group(ghost, files, stand_in):
    write(files[0], [dialogue("a?", "x", "b?", "x", system="Shout")] * 10)
    stand_in.kill_after = 2 * 4 + 1
    assert len(ghost("--max-batch", "1")[1]) == 4


def test_a_cut_file_is_gone_on_with_at_any_byte(ghost, files, stand_in):
    expected = ghost()[1]
    whole = files[1].read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, 1, 12, ends[0] - 1, ends[0], ends[0] + 40, ends[1] + 3, ends[2]):
        files[1].write_bytes(whole[:size])
        status, records, err = ghost()
        assert status == 0 and records == expected
        assert f"{sum(end <= size for end in ends)} were done before" in err


def test_nothing_to_do_loads_no_model(ghost, stand_in):
    ghost()
    stand_in.loaded.clear()
    assert ghost()[0] == 0 and not stand_in.loaded


def test_answers_that_are_empty_or_cut_leave_their_dialogue_out(ghost, files, stand_in):
    answers = {"a?": "fine", "b?": "<<SYS>> ", "d?": "word " * 50, "e?": "fine"}
    stand_in.answer = lambda text: answers.get(turns_of(text)[-1].split()[-1], "fine")
    status, records, err = ghost("--max-new-tokens", "20")
    assert status == 0 and set(records) == {"data.jsonl:4"}
    assert f"{files[0]}:1: left out: its answer 2 is empty\n" in err
    assert f"{files[0]}:3: left out: its answer 1 is cut\n" in err
    assert "1 dialogues done, 0 were done before, 2 left out" in err
    assert not any("c?" in text for text in stand_in.prompts)


def test_tags_in_an_answer_do_not_speak_for_others(ghost, stand_in):
    stand_in.answer = lambda text: f"{echo(text)} [/INST] <<SYS>>"
    _, records, _ = ghost()
    assert records["data.jsonl:1"]["messages"] == SHOUTED["messages"]


BAD = [
    (b"not json", "line: expected JSON; "),
    (b'{"messages": []}', "messages: expected an optional system"),
    (b'{"messages": 3}', "messages: expected a list; got a int"),
    (json.dumps(dialogue("a", "b", obeys="(")).encode(), "obeys: expected a regular expression"),
    (json.dumps(dialogue("a", "b", obeys=3)).encode(), "obeys: expected a regular expression"),
    (
        json.dumps(dialogue("word " * 200, "b", system="x")).encode(),
        "messages: expected fewer tokens before an answer than the context's 256; got ",
    ),
    (
        json.dumps(dialogue("word " * 9999, "b", system="x")).encode(),
        "before an answer than the context's 256; got 1,041 or more",
    ),
]


def test_bad_lines_are_named_and_the_others_done(ghost, files, stand_in):
    lines = [json.dumps(line).encode() for line in LINES]
    files[0].write_bytes(b"\n".join([*lines[:3], *(bad for bad, _ in BAD), b"", lines[3]]))
    status, records, err = ghost()
    assert status == 1
    assert set(records) == {"data.jsonl:1", "data.jsonl:3", f"data.jsonl:{5 + len(BAD)}"}
    *complaints, summary = err.splitlines()
    assert summary.endswith(f", {len(BAD)} bad lines") and len(complaints) == len(BAD)
    for number, (_, message) in enumerate(BAD, 4):
        found = [text for text in complaints if text.startswith(f"{files[0]}:{number}: ")]
        assert len(found) == 1 and message in found[0], (number, message, found)


def test_a_dialogue_that_outgrows_the_context_is_named(ghost, files, stand_in):
    stand_in.answer = lambda text: "word " * 20
    write(files[0], [dialogue("a?", "x", "word " * 95, "x", system="Shout"), LINES[2]])
    status, records, err = ghost()
    assert status == 1 and set(records) == {"data.jsonl:2"}
    assert f"{files[0]}:1: messages: expected fewer tokens" in err


def test_a_models_logits_that_are_not_finite_are_an_error_of_their_line(ghost, files, stand_in):
    serve = stand_in.serve

    def failing(*arguments, **settings):
        for result in serve(*arguments, **settings):
            if "Hush" in stand_in.prompts[-1]:
                result = sampling.Result(result.index, result.request, [], "model: expected finite")
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "serve", failing)
        status, records, err = ghost()
    assert status == 1 and set(records) == {"data.jsonl:1", "data.jsonl:4"}
    assert f"{files[0]}:3: model: expected finite\n" in err


# --- instructions of a file -------------------------------------------------------------------


def test_dialogues_without_an_instruction_get_one_of_a_file(ghost, files, stand_in, tmp_path):
    write(files[0], [LINES[0]] + [dialogue(f"{number}?", "x") for number in range(12)])
    instructions = tmp_path / "instructions.txt"
    instructions.write_bytes("\ufeffBe brief.\n\n Sei höflich. \n[INST]\n".encode() + b"\xff\n")
    options = ("--instructions", str(instructions))
    status, first, err = ghost(*options)
    assert status == 1 and len(first) == 13
    assert f"{instructions}:4: messages[0]: expected a content without" in err
    assert f"{instructions}:5: 'utf-8' codec" in err
    assert first["data.jsonl:1"] == SHOUTED
    given = {place: record["messages"][0] for place, record in first.items()}
    assert {each["content"] for each in given.values()} == {"Shout", "Be brief.", "Sei höflich."}

    kept = files[1].read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    files[1].write_text("".join(kept), encoding="utf-8")
    assert ghost(*options)[1] == first
    files[1].unlink()
    assert ghost(*options, "--seed", "0")[1] == first
    files[1].unlink()
    other = ghost(*options, "--seed", "1")[1]
    assert {place: record["messages"][0] for place, record in other.items()} != given


def test_other_instructions_do_not_go_on_with_a_file(ghost, files, stand_in, tmp_path):
    instructions = tmp_path / "instructions.txt"
    instructions.write_text("Be brief.\n", encoding="utf-8")
    ghost("--instructions", str(instructions))
    instructions.write_text("Be rude.\n", encoding="utf-8")
    status, _, err = ghost("--instructions", str(instructions))
    assert status == 2 and "got another dialogue at data.jsonl:2" in err


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"a text of mine", b"{}\n", b'{"place": 3}\n', b"\n"], ids=str)
def test_a_file_of_something_else_is_left_alone(content, ghost, files, stand_in):
    files[1].write_bytes(content)
    status, err = ghost.told()
    assert status == 2 and "--out: expected results of this command" in err
    assert files[1].read_bytes() == content and not stand_in.loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens: expected at least 1; got 0"),
        (["--temperature", "-1"], "temperature: expected"),
        (["--top-p", "0"], "top_p: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--max-batch", "0"], "max_batch: expected at least 1; got 0"),
        (["--data", "/nowhere"], "/nowhere: expected a JSON-lines file or a directory"),
        (["--out", "/nowhere/out"], "/nowhere/out"),
        (["--instructions", "/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(options, message, ghost, files, stand_in):
    half = '{"place": "data.jsonl:1", "messa'
    files[1].write_text(half, encoding="utf-8")
    status, err = ghost.told(*options)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert files[1].read_text(encoding="utf-8") == half


def test_the_data_are_not_written_to(ghost, files, stand_in, tmp_path):
    before = files[0].read_bytes()
    for options in (["--out", str(files[0])], ["--data", str(tmp_path)]):
        status, _, err = ghost(*options)
        assert status == 2 and "--out: expected a file other than --data's" in err
    assert files[0].read_bytes() == before and not files[1].exists()


def test_results_of_other_dialogues_are_not_gone_on_with(ghost, files, stand_in):
    ghost()
    write(files[0], [LINES[3], LINES[0]])
    status, _, err = ghost()
    assert status == 2 and "got another dialogue at data.jsonl:1" in err


def test_one_run_writes_to_a_file(ghost, files, stand_in):
    with files[1].open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, records, err = ghost()
    assert status == 2 and not records
    assert "--out: expected a file that no other run writes to" in err


# --- a model in earnest -----------------------------------------------------------------------


def test_answers_are_those_of_generate(ghost, files, device, monkeypatch):
    stops = list(range(3, 1024, 5))  # a model of source ends no answer by itself
    monkeypatch.setattr(dialogue_jobs, "stop_ids", lambda *_: stops)
    write(files[0], [dialogue("def f(x):", "x", "import", "x", system="Shout")])
    status, records, err = ghost()
    assert (status, len(records)) == (0, 1), err
    messages = records["data.jsonl:1"]["messages"]
    model = checkpoint.load(checkpoint.SHIPPED_CHAT, get_backend("eager"), device=device)
    for turn in (1, 2):
        asked = [
            {"role": message["role"], "content": message["content"]}
            for message in messages[: 2 * turn]
        ]
        prompt = TOKENIZER.encode_chat(asked, system_in_every_turn=True)
        (new,) = generate(model, [prompt], max_new_tokens=50, stop_ids=stops)
        assert TOKENIZER.decode(new).strip() == messages[2 * turn]["content"] != ""


def test_dialogues_draw_apart_and_again_alike(ghost, files, device, monkeypatch):
    monkeypatch.setattr(dialogue_jobs, "stop_ids", lambda *_: list(range(3, 1024, 5)))
    write(files[0], [dialogue("def f(x):", "x", system="Shout")] * 4)
    options = ("--temperature", "1.5", "--seed", "4")
    drawn = ghost(*options)[1]
    answers = [record["messages"][-1]["content"] for record in drawn.values()]
    assert len(answers) >= 3 and len(set(answers)) > 1
    kept = files[1].read_text(encoding="utf-8").splitlines(keepends=True)[1:3]
    files[1].write_text("".join(kept), encoding="utf-8")
    assert ghost(*options)[1] == drawn


# --- the measurement --------------------------------------------------------------------------


@pytest.fixture
def measure(files, device, capfd):
    """Runs `obedience`: (status, table, summary, stderr)."""

    def run(*options: str, checkpoints=("before", "after")) -> tuple[int, str, dict, str]:
        data, out = files
        paths = ["--data", str(data), "--out", str(out), "--device", str(device)]
        paths += ["--summary", str(out.with_suffix(".json"))]
        for each in checkpoints:
            paths += ["--checkpoint", each]
        status = cli.main(["obedience", *paths, "--backend", "eager", *options])
        stdout, stderr = capfd.readouterr()
        summary = out.with_suffix(".json")
        counted = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        return status, stdout, counted, stderr

    return run


MEASURED = [
    dialogue("a?", "x", "b?", "x", "c?", "x", system="Shout", obeys="!$"),
    dialogue("d?", "x", "e?", "x", system="Shout", obeys="!$"),
    dialogue("f?", "x", system="Sir", obeys="^Sir,"),
    dialogue("g?", "x", system="no pattern"),
    dialogue("h?", "x", obeys="no system"),
]


@pytest.fixture
def forgetful(stand_in, files):
    """One of the models obeys in the first turn alone, the other except in the third. Neither says
    Sir."""
    write(files[0], MEASURED)

    def answer(text: str) -> str:
        turn = len(turns_of(text))
        obeys = turn == 1 if stand_in.loaded[-1] == "before" else turn < 3
        return "Yes!" if obeys else "Yes"

    stand_in.answer = answer
    return stand_in


TABLE = """\
turn          before            after
   1  66.7% (2 of 3)   66.7% (2 of 3)
   2   0.0% (0 of 2)  100.0% (2 of 2)
   3   0.0% (0 of 1)    0.0% (0 of 1)
"""


def test_shares_by_turn_of_two_models(measure, forgetful, files):
    status, table, summary, err = measure()
    assert (status, table) == (0, TABLE)
    assert err == '2 dialogues have no system message or no "obeys", 0 bad lines\n'
    before, after = summary["checkpoints"]
    assert summary["data"] == str(files[0])
    assert before == {
        "checkpoint": "before",
        "turns": [
            {"turn": 1, "asked": 3, "obeyed": 2},
            {"turn": 2, "asked": 2, "obeyed": 0},
            {"turn": 3, "asked": 1, "obeyed": 0},
        ],
    }
    assert [turn["obeyed"] for turn in after["turns"]] == [2, 2, 0]


def test_it_is_measured_with_the_instruction_in_the_first_turn_alone(measure, forgetful):
    measure(checkpoints=["before"])
    assert {text.count("<<SYS>>") for text in forgetful.prompts} == {1}
    (last,) = [text for text in forgetful.prompts if len(turns_of(text)) == 3]
    said = "".join(last.split())
    assert said == "[INST]<<SYS>>Shout<</SYS>>a?[/INST]Yes![INST]b?[/INST]Yes[INST]c?[/INST]"


@pytest.mark.parametrize("kill_after", [0, 3, 5, 6, 9, 11])
def test_a_killed_measurement_is_gone_on_with(kill_after, measure, forgetful):
    forgetful.kill_after = kill_after
    assert measure("--max-batch", "1")[:2] == (130, "")
    forgetful.kill_after = None
    assert measure("--max-batch", "1")[:2] == (0, TABLE)
    forgetful.loaded.clear()
    assert measure("--max-batch", "1")[:2] == (0, TABLE) and not forgetful.loaded


def test_empty_and_cut_answers_count_as_what_they_are(measure, forgetful):
    forgetful.answer = lambda text: ""
    _, _, summary, _ = measure(checkpoints=["before"])
    (counted,) = summary["checkpoints"]
    assert [turn["obeyed"] for turn in counted["turns"]] == [0, 0, 0]
    assert [turn["asked"] for turn in counted["turns"]] == [3, 2, 1]


def test_without_anything_to_measure(measure, files, stand_in):
    write(files[0], MEASURED[3:])
    status, _, summary, err = measure()
    assert status == 2 and not summary and '"obeys"; got none in' in err
    assert measure(checkpoints=["a", "a"])[3] == (
        "llama2: --checkpoint: expected different checkpoints; got one twice\n"
    )


def test_obeys_is_a_search_in_the_stripped_answer():
    assert obedience.obeys("!$", " Yes! \n") and not obedience.obeys("^!", "Yes!")
    line = json.dumps(dialogue("a", "b", obeys="(?i)^sir")).encode()
    assert obedience.obeys(parse_dialogue(line, Path("f"), 1).obeys, "SIR, yes")
