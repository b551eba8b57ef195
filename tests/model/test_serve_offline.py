"""`llama2 serve-offline`: lines in, lines out, killed at any byte, and lines that are bad."""

import fcntl
import json
import sys

import pytest

from gqa_kernels import get_backend
from llama2 import checkpoint, cli
from llama2.commands import serve_offline as serve_command
from llama2.generate import generate
from llama2.stops import stop_ids
from llama2.tokenizer import Tokenizer

PROMPTS = ["def read(self, size=-1):\n", "import", "", "class A:\n    é", "import os\n"]
LINES = [{"prompt": prompt, "max_new_tokens": 3 + 2 * i} for i, prompt in enumerate(PROMPTS)]
LINES[1]["id"] = "é"


@pytest.fixture
def files(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return prompts, out


@pytest.fixture
def serve_offline(files, device, capfd):
    """Runs the command on `files`: (status, results by id, stderr)."""

    def run(*options: str) -> tuple[int, dict, str]:
        prompts, out = files
        paths = ["--prompts", str(prompts), "--out", str(out)]
        fixed = ["--max-batch", "2", "--backend", "eager", "--device", str(device)]
        status = cli.main(["serve-offline", *paths, *fixed, *options])
        written = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        results = [json.loads(line) for line in written]
        by_id = {result["id"]: result for result in results}
        assert len(by_id) == len(results)
        stdout, stderr = capfd.readouterr()
        assert stdout == ""
        return status, by_id, stderr

    return run


def test_results_are_those_of_generate(serve_offline, device):
    status, results, err = serve_offline()
    assert status == 0 and err == "5 prompts done, 0 were done before, 0 bad lines\n"
    assert set(results) == {1, "é", 3, 4, 5}
    model = checkpoint.load(checkpoint.SHIPPED, get_backend("eager"), device=device)
    tokenizer = Tokenizer(checkpoint.SHIPPED / "tokenizer.model")
    stops = stop_ids(tokenizer)
    for id, line in zip([1, "é", 3, 4, 5], LINES, strict=True):
        prompt = tokenizer.encode(line["prompt"])
        settings = {"max_new_tokens": line["max_new_tokens"], "stop_ids": stops}
        (new,) = generate(model, [prompt], **settings)
        assert results[id]["num_new_tokens"] == len(new)
        assert results[id]["finish_reason"] == ("stop" if new[-1] in stops else "length")
        whole = tokenizer.decode(prompt + new)
        assert (line["prompt"] + results[id]["text"]).lstrip() == whole.lstrip()


def test_the_budget_is_passed_on(serve_offline, files, monkeypatch):
    budgets, serve = [], serve_command.serve
    monkeypatch.setattr(
        serve_command,
        "serve",
        lambda *args, **settings: (
            budgets.append(settings["prefill_budget"]) or serve(*args, **settings)
        ),
    )
    for options in ((), ("--prefill-budget", "3"), ("--prefill-budget", "0")):
        files[1].unlink(missing_ok=True)
        assert serve_offline(*options)[0] == 0
    assert budgets == [512, 3, 0]
    files[1].unlink()
    status, _, err = serve_offline("--prefill-budget", "-1")
    assert status == 2 and "prefill_budget: expected an int of at least 0, or None; got -1" in err


def test_more_rows_than_prompts_cost_nothing(serve_offline):
    assert serve_offline("--max-batch", "1000000000")[0] == 0


def test_a_cut_file_is_gone_on_with_at_any_byte(serve_offline, files, monkeypatch):
    expected = serve_offline("--temperature", "1", "--seed", "4")[1]
    whole = files[1].read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    served, serve = [], serve_command.serve

    def counted(model, requests, **settings):
        for result in serve(model, requests, **settings):
            served.append(result)
            yield result

    monkeypatch.setattr(serve_command, "serve", counted)
    for size in (0, 1, 9, ends[0] - 1, ends[0], ends[2] + 3, ends[3] + 40, ends[4]):
        files[1].write_bytes(whole[:size])
        served.clear()
        status, results, err = serve_offline("--temperature", "1", "--seed", "4")
        assert status == 0 and results == expected
        num_kept = sum(end <= size for end in ends)
        assert len(served) == 5 - num_kept
        assert err == f"{5 - num_kept} prompts done, {num_kept} were done before, 0 bad lines\n"
        assert files[1].read_bytes().startswith(whole[: ([0, *ends])[num_kept]])


def test_a_prompt_far_too_long_is_refused_before_it_is_split(serve_offline, files, monkeypatch):
    files[0].write_text(json.dumps({"prompt": "a" * 10**6}), encoding="utf-8")
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text, *args: encode(self, text[:1000], *args)
    )
    status, _, err = serve_offline()
    assert status == 1 and "max_seq_len (256) tokens; got 20,833 or more" in err


def test_errors_of_an_earlier_run_are_not_forgotten(serve_offline, files):
    serve_offline()
    first, *others = files[1].read_text(encoding="utf-8").splitlines(keepends=True)
    failed = json.loads(first) | {"finish_reason": "error", "error": "model: expected"}
    files[1].write_text("".join([json.dumps(failed) + "\n", *others]), encoding="utf-8")
    status, _, err = serve_offline("--checkpoint", "/nowhere")
    assert status == 1
    assert err == (
        "0 prompts done, 5 were done before, 0 bad lines\n1 of those that were done before are "
        f"errors: remove their lines from {files[1]} to run them again\n"
    )
    files[1].write_text("".join(others), encoding="utf-8")
    assert serve_offline()[0] == 0


def test_nothing_to_do_loads_no_model(serve_offline):
    serve_offline()
    assert serve_offline("--checkpoint", "/nowhere")[0] == 0


def test_a_killed_run_leaves_what_was_done(serve_offline, monkeypatch):
    serve = serve_command.serve

    def killed(*arguments, **settings):
        results = serve(*arguments, **settings)
        yield next(results)
        yield next(results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(serve_command, "serve", killed)
        status, results, _ = serve_offline()
        assert status == 130 and len(results) == 2
    assert len(serve_offline()[1]) == 5


BAD = [
    (b"not json", "line: expected JSON; "),
    (b"[" * 100_000, "line: expected JSON; "),
    (b"\xff\xfe\xfd", "line: expected JSON; "),
    (b"[1]", "line: expected a JSON object; got a list"),
    (b'{"prompt": "a", "max_tokens": 3}', "; got ['max_tokens']"),
    (b"{}", "prompt: expected a text; got None"),
    (b'{"prompt": 3}', "prompt: expected a text; got 3"),
    (b'{"prompt": "a", "id": [1]}', "id: expected a text or a whole number; got [1]"),
    (b'{"prompt": "a", "id": true}', "id: expected a text or a whole number; got True"),
    (b'{"prompt": "a", "id": "\\ud800"}', "id: expected no lone surrogates"),
    (b'{"prompt": "a\\ud800"}', "prompt: expected no lone surrogates"),
    (b'{"prompt": "a", "id": 1}', "id: expected an id other than line 1's; got 1"),
    (b'{"prompt": "a", "max_new_tokens": "3"}', "max_new_tokens: expected a whole number; got '3'"),
    (b'{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens: expected a whole number; got 1.5"),
    (b'{"prompt": "a", "max_new_tokens": 1000}', "prompt: expected at most max_seq_len (256)"),
    (
        b'{"prompt": "%s"}' % (b"a" * 99999),
        "prompt: expected at most max_seq_len (256) tokens; got 2,083",
    ),
    (b'{"prompt": "a", "max_new_tokens": 100}', "num_pages: expected at least "),
    (b'{"prompt": "a", "temperature": NaN}', "temperature: expected"),
    (b'{"prompt": "a", "top_p": 2}', "top_p: expected"),
    (b'{"prompt": "a", "seed": -1}', "seed: expected"),
]


def test_bad_lines_are_named_and_the_others_done(serve_offline, files):
    lines = [json.dumps(line).encode() for line in LINES]
    files[0].write_bytes(b"\n".join([*lines[:2], *(bad for bad, _ in BAD), b"", *lines[2:]]))
    status, results, err = serve_offline("--num-pages", "4")
    assert status == 1
    first = 3 + len(BAD) + 1
    assert set(results) == {1, "é", first, first + 1, first + 2}
    *complaints, summary = err.splitlines()
    assert summary == f"5 prompts done, 0 were done before, {len(BAD)} bad lines"
    for number, (_, message) in enumerate(BAD, 3):
        found = [text for text in complaints if text.startswith(f"{files[0]}:{number}: ")]
        assert len(found) == 1 and message in found[0], (number, message, found)
    assert len(complaints) == len(BAD)


@pytest.mark.parametrize(
    "content",
    [b"a text of mine", b"{}\n", b'{"id": 1}\nmore\n', b'{"id": \n', b"\n", b'{"id": [1]}\n'],
    ids=str,
)
def test_a_file_of_something_else_is_left_alone(content, serve_offline, files, monkeypatch):
    files[1].write_bytes(content)
    status = cli.main(["serve-offline", "--prompts", str(files[0]), "--out", str(files[1])])
    assert status == 2 and files[1].read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "0"], "max_batch: expected at least 1; got 0"),
        (["--page-size", "3"], "page_size: expected a power of two; got 3"),
        (["--page-size", "0"], "page_size: expected a power of two; got 0"),
        (["--num-pages", "0"], "num_pages: expected at least 1; got 0"),
        (["--num-pages", "9" * 15], "--num-pages: expected at most "),
        (["--temperature", "-1"], "temperature: expected"),
        (["--top-p", "0"], "top_p: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--max-new-tokens", "-1"], "max_new_tokens: expected"),
        (["--prompts", "/nowhere"], "/nowhere"),
        (["--out", "/nowhere/out"], "/nowhere/out"),
        (["--checkpoint", "/nowhere"], "/nowhere: expected a directory"),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(options, message, serve_offline):
    status, results, err = serve_offline(*options)
    assert (status, results) == (2, {})
    assert err.startswith("llama2: ") and err.count("\n") == 1 and message in err


def test_one_run_writes_to_a_file(serve_offline, files):
    with files[1].open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, results, err = serve_offline()
        assert status == 2 and not results
        assert "--out: expected a file that no other run writes to" in err
    assert serve_offline()[0] == 0


def test_what_another_run_did_meanwhile_is_kept(serve_offline, files, monkeypatch):
    serve_offline()
    whole = files[1].read_text(encoding="utf-8")
    files[1].unlink()
    lock = serve_command.lock_output

    def too_late(file):
        files[1].write_text(whole, encoding="utf-8")  # and that run has ended
        lock(file)

    monkeypatch.setattr(serve_command, "lock_output", too_late)
    status, _, err = serve_offline()
    assert (status, files[1].read_text(encoding="utf-8")) == (0, whole)
    assert err.endswith(f"0 prompts done, {len(LINES)} were done before, 0 bad lines\n")


def test_wrong_options_cut_nothing(serve_offline, files):
    files[1].write_text(
        '{"id": 1, "text": "", "num_new_tokens": 0, "finish_reason": "stop"}', encoding="utf-8"
    )
    before = files[1].read_text(encoding="utf-8")  # half a line: its end is missing
    assert serve_offline("--max-new-tokens", "-5")[0] == 2
    assert files[1].read_text(encoding="utf-8") == before


def test_prompts_are_not_written_over(serve_offline, files):
    before = files[0].read_bytes()
    status, _, err = serve_offline("--out", str(files[0]))
    assert status == 2 and "--out: expected a file other than --prompts" in err
    assert files[0].read_bytes() == before


def test_lines_draw_apart_and_settings_of_a_line_come_first(serve_offline, files):
    same = {"prompt": "x", "max_new_tokens": 20}
    lines = [same, same, {**same, "seed": 7}, {**same, "seed": 7}, {**same, "temperature": 0}]
    files[0].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _, results, _ = serve_offline("--temperature", "1.2", "--seed", "0")
    texts = [results[number]["text"] for number in range(1, 6)]
    assert texts[2] == texts[3] and len(set(texts)) == 4
    files[1].unlink()
    _, greedy, _ = serve_offline()
    assert greedy[1]["text"] == texts[4]


def test_the_command_needs_tqdm_only_when_it_serves(serve_offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, err = serve_offline()
    assert status == 2 and "tqdm" in err
