"""`llama2 answer`: the answers, what is counted of them, and the sheet for a reader."""

import html.parser
import json
import os

import pytest
from answering import TOKENIZER, Answering, dialogue, replace_weights, turns_of

from gqa_kernels import get_backend
from llama2 import checkpoint, cli
from llama2.commands import dialogue_jobs
from llama2.finetune import sampling
from llama2.finetune.review_sheet import Reviewed, review_sheet
from llama2.generate import generate

LINES = [
    dialogue("one", "ONE", source="upper"),
    dialogue("two", "two", source="upper"),
    dialogue("zero", "given", "three", " THREE\n", system="Shout", source="turns"),
    dialogue("four", "FOUR"),
]


@pytest.fixture
def stand_in(monkeypatch, device):
    """Answers in place of the shipped model: the last question in capitals."""
    model = checkpoint.load(checkpoint.SHIPPED_CHAT, get_backend("eager"), device=device)
    stub = Answering(lambda text: turns_of(text)[-1].upper())
    stub.loaded = []

    def load(arguments):
        stub.loaded.append(arguments.checkpoint)
        return model, TOKENIZER

    monkeypatch.setattr(sampling, "serve", stub.serve)
    monkeypatch.setattr(dialogue_jobs, "load", load)
    stub.weights = replace_weights(monkeypatch, dialogue_jobs)
    return stub


@pytest.fixture
def files(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return data, out


@pytest.fixture
def answer(files, device, capfd):
    """Runs the command on `files`: (status, records by place, stdout, stderr)."""

    def run(*options: str) -> tuple[int, dict, str, str]:
        data, out = files
        paths = ["--data", str(data), "--out", str(out), "--device", str(device)]
        status = cli.main(["answer", *paths, "--backend", "eager", *options])
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        by_place = {record["place"]: record for record in map(json.loads, lines)}
        assert len(by_place) == len(lines)
        return status, by_place, *capfd.readouterr()

    return run


TABLE = """\
source      answers  exact   share
data.jsonl        1      1  100.0%
turns             1      1  100.0%
upper             2      1   50.0%
all               4      3   75.0%
"""


def test_answers_beside_the_datas_own(answer, stand_in, files, tmp_path):
    summary = tmp_path / "summary.json"
    status, records, table, err = answer("--summary", str(summary))
    assert (status, table) == (0, TABLE)
    assert err == "4 answers done, 0 were done before, 0 bad lines\n"
    assert records["data.jsonl:3"] == {
        "place": "data.jsonl:3",
        "checkpoint": str(checkpoint.SHIPPED_CHAT),
        "weights_crc32": "00000000",
        "source": "turns",
        "messages": [
            {"role": "system", "content": "Shout"},
            {"role": "user", "content": "zero"},
            {"role": "assistant", "content": "given"},
            {"role": "user", "content": "three"},
        ],
        "answer": "THREE",
        "expected": "THREE",
        "num_new_tokens": len(TOKENIZER.encode("THREE", bos=False)) + 1,
        "finish_reason": "stop",
    }
    found = json.loads(summary.read_text(encoding="utf-8"))
    assert found.pop("made_with")["command"].startswith("llama2 answer --data ")
    assert found == {
        "checkpoint": str(checkpoint.SHIPPED_CHAT),
        "data": str(files[0]),
        "all": {"answers": 4, "exact": 3},
        "sources": {
            "data.jsonl": {"answers": 1, "exact": 1},
            "turns": {"answers": 1, "exact": 1},
            "upper": {"answers": 2, "exact": 1},
        },
    }


def test_earlier_answers_are_those_given(answer, stand_in):
    answer()
    (asked,) = [text for text in stand_in.prompts if "three" in text]
    said = "".join(asked.split())
    assert said == "[INST]<<SYS>>Shout<</SYS>>zero[/INST]given[INST]three[/INST]"


def test_a_cut_answer_is_not_exact(answer, stand_in):
    _, records, table, _ = answer("--max-new-tokens", "1")
    assert {record["finish_reason"] for record in records.values()} == {"length"}
    assert table.endswith("all               4      0    0.0%\n")


@pytest.mark.parametrize("kill_after", range(4))
def test_a_killed_run_is_gone_on_with(kill_after, answer, stand_in, tmp_path):
    sheet = tmp_path / "sheet.html"
    stand_in.kill_after = kill_after
    status, records, table, _ = answer("--sheet", str(sheet))
    assert (status, len(records), table) == (130, kill_after, "") and not sheet.exists()
    stand_in.kill_after = None
    status, records, table, err = answer("--sheet", str(sheet))
    assert (status, table, len(records)) == (0, TABLE, 4)
    assert err.startswith(f"{4 - kill_after} answers done, {kill_after} were done before")
    before = sheet.read_bytes()
    stand_in.loaded.clear()
    assert answer("--sheet", str(sheet))[2] == TABLE
    assert sheet.read_bytes() == before and not stand_in.loaded


def test_bad_lines_are_named_and_the_others_done(answer, stand_in, files):
    good = [json.dumps(line) for line in LINES]
    too_long = json.dumps(dialogue("word " * 200, "x"))
    bad = ["{", '{"messages": [{"role": "user", "content": "x"}]}', too_long]
    files[0].write_text("\n".join([*bad, *good]), encoding="utf-8")
    status, records, _, err = answer()
    assert status == 1 and len(records) == 4
    first, second, third, summary = err.splitlines()
    assert first.startswith(f"{files[0]}:1: line: expected JSON; ")
    assert second.startswith(f"{files[0]}:2: messages: expected an optional system")
    assert third.startswith(f"{files[0]}:3: messages: expected fewer tokens before an answer")
    assert summary == "4 answers done, 0 were done before, 3 bad lines"


def test_a_file_may_have_any_name(answer, stand_in, files, tmp_path):
    """Bytes that are no UTF-8 among them, in what is sampled by place, too."""
    data = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    files[0].rename(data)
    status, records, table, err = answer("--data", str(data), "--seed", "1", "--temperature", "1")
    assert (status, len(records)) == (0, 4), err
    assert "caf\\xe9.jsonl:4" in records and "caf\\xe9.jsonl" in table
    assert "4 were done before" in answer("--data", str(data))[3]


def test_another_checkpoint_needs_another_file(answer, stand_in, files, tmp_path):
    assert answer()[0] == 0
    before = files[1].read_bytes()
    status, _, table, err = answer("--checkpoint", str(tmp_path))
    assert (status, table) == (2, "") and "; got checkpoint " in err
    assert files[1].read_bytes() == before


def test_other_weights_in_the_same_directory_need_another_file(answer, stand_in, files):
    assert answer()[0] == 0
    before = files[1].read_bytes()
    stand_in.weights["chat"] = "12345678"
    status, _, table, err = answer()
    assert (status, table) == (2, "") and "; got weights_crc32 " in err
    assert files[1].read_bytes() == before


def test_answers_are_those_of_generate(answer, files, device):
    status, records, _, err = answer("--max-new-tokens", "6", "--max-batch", "2")
    assert (status, len(records)) == (0, 4), err
    model = checkpoint.load(checkpoint.SHIPPED_CHAT, get_backend("eager"), device=device)
    for record in records.values():
        prompt = TOKENIZER.encode_chat(record["messages"])
        (new,) = generate(model, [prompt], max_new_tokens=6, stop_ids=[1, 2])
        assert record["answer"] == TOKENIZER.decode(new).strip() != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "0"], "--sample: expected at least 1; got 0"),
        (["--sheet", "{out}"], "--sheet: expected a file other than --out's; got "),
        (["--summary", "{data}"], "--summary: expected a file other than --data's; got "),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(options, message, answer, files, stand_in):
    options = [option.format(data=files[0], out=files[1]) for option in options]
    status, records, table, err = answer(*options)
    assert (status, records, table) == (2, {}, "")
    assert err.count("\n") == 1 and message in err


def test_a_link_that_leads_to_itself_is_named(answer, stand_in, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(link)
    for name in ("--data", "--out"):
        status, _, _, err = answer(name, str(link))
        assert status == 2 and err.count("\n") == 1 and str(link) in err
    assert answer("--sheet", str(link))[0] == 0 and link.is_file()  # replaced, as any file


# --- the sheet ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a reader sees: the texts in <pre>, section by section, and the rows of the key."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.sections, self.key, self._inside = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "section":
            self.sections.append([])
        if tag == "tr":
            self.key.append([])
        if tag == "pre":
            self.sections[-1].append("")
        if tag == "td":
            self.key[-1].append("")
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "pre":
            self.sections[-1][-1] += data
        if self._inside == "td":
            self.key[-1][-1] += data


HOSTILE = "</pre><script>alert('x')</script>&amp; \"<b>\n\n  é"


def reviewed(count: int) -> list[Reviewed]:
    return [
        Reviewed(
            f"<i>:{number}",
            [{"role": "system", "content": HOSTILE}, {"role": "user", "content": f"{number}"}],
            f"{HOSTILE} model {number}",
            f"{HOSTILE} written {number}",
        )
        for number in range(count)
    ]


def test_every_text_is_shown_as_it_is():
    page = review_sheet(reviewed(8), sample=8, seed=0)
    found = Page(page)
    assert not {"script", "b", "i", "link", "img"} & set(found.tags)
    assert "http" not in page
    for system, prompt, left, right in found.sections:
        number = prompt.strip()
        assert system == f"\n{HOSTILE}"  # a page drops the first line end
        assert {left, right} == {f"\n{HOSTILE} model {number}", f"\n{HOSTILE} written {number}"}


def test_the_key_tells_whose_answers_are_whose_and_nothing_before_it_does():
    page = review_sheet(reviewed(40), sample=30, seed=1)
    shown, _, folded = page.partition("<details>")
    assert "</details>" in folded and "model's" not in shown.replace("a model's answer", "")
    found = Page(page)
    key = [row for row in found.key if row]
    assert len(found.sections) == len(key) == 30
    for index, ((_, prompt, left, right), (number, letter, place)) in enumerate(
        zip(found.sections, key, strict=True), 1
    ):
        assert number == str(index) and place == f"<i>:{prompt.strip()}"
        models, written = (left, right) if letter == "A" else (right, left)
        assert " model " in models and " written " in written
    assert {letter for _, letter, _ in key} == {"A", "B"}
    prompts = [section[1].strip() for section in found.sections]
    assert len(set(prompts)) == 30 and prompts != sorted(prompts, key=int)


def test_the_sheet_follows_from_the_seed(answer, stand_in, tmp_path):
    pages = []
    for number, seed in enumerate(("0", "0", "1")):
        sheet = tmp_path / f"{number}.html"
        answer("--sheet", str(sheet), "--seed", seed, "--sample", "3")
        pages.append(sheet.read_text(encoding="utf-8"))
    assert pages[0] == pages[1] != pages[2]
    assert len(Page(pages[0]).sections) == 3
