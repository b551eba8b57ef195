"""`llama2 evaluate`: the record it writes, runs that are killed, and what a user does wrong."""

import json
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from llama2 import cli

TASKS = Path(__file__).parents[1] / "support" / "lm_eval_tasks"
SHIPPED = Path(cli.__file__).parent / "checkpoints" / "stdlib"


@pytest.fixture
def evaluate(tmp_path, device, capfd, monkeypatch):
    """Runs the command in the folder of tasks: (status, record or None, stdout, stderr)."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import datasets

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    out = tmp_path / "results" / "all.json"

    def run(*options: str):
        fixed = ["--checkpoint", str(SHIPPED), "--out", str(out), "--task-path", str(TASKS)]
        place = ["--backend", "eager", "--device", str(device), "--dtype", "float32"]
        status = cli.main(["evaluate", *fixed, *place, *options])
        record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
        return status, record, *capfd.readouterr()

    return run


def test_the_record_says_what_made_it(evaluate):
    status, record, out, _ = evaluate("--tasks", "python_*", "--limit", "4", "--batch-size", "3")
    assert status == 0
    assert set(record["results"]) == {"python_choice", "python_generation", "python_perplexity"}
    assert record["versions"] == dict.fromkeys(record["results"], 1.0)
    assert record["checkpoint"] == str(SHIPPED) and "--tasks" in record["command"]
    assert record["packages"].keys() >= {"gqa-kernels", "lm-eval", "torch"}
    config = record["config"]
    assert (config["backend"], config["model_dtype"], config["limit"]) == ("eager", "float32", 4)
    assert (config["max_length"], config["batch_size"]) == (256, 3)
    assert record["n-samples"]["python_choice"]["effective"] == 4
    assert "|python_choice" in out and "acc_norm" in out


def test_examples_and_a_chat_reach_the_prompts(evaluate, monkeypatch):
    from llama2.evaluation.harness import Llama2LM

    asked, answer = [], Llama2LM.loglikelihood

    def noted(lm, requests, **settings):
        asked.extend(request.args[0] for request in requests)
        return answer(lm, requests, **settings)

    monkeypatch.setattr(Llama2LM, "loglikelihood", noted)
    options = ("--tasks", "python_choice", "--limit", "1", "--num-fewshot", "1")
    assert evaluate(*options)[0] == 0
    assert "\n\n" in asked[0] and "[INST]" not in asked[0]
    asked.clear()
    chat = ("--apply-chat-template", "--system-instruction", "Be brief.")
    status, record, *_ = evaluate(*options, *chat)
    assert status == 0 and record["n-shot"] == {"python_choice": 1}
    assert asked[0].startswith("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n")
    assert asked[0].count("</s><s>[INST] ") == 1 and asked[0].endswith("[/INST]")


def test_a_killed_run_goes_on(evaluate, monkeypatch, tmp_path):
    from llama2.evaluation import harness

    scores, num_scored = harness.scores, []

    def killed(*arguments, **settings):
        answers = scores(*arguments, **settings)
        for _ in range(5):
            yield next(answers)
        raise KeyboardInterrupt

    def counted(*arguments, **settings):
        for answer in scores(*arguments, **settings):
            num_scored.append(answer)
            yield answer

    tasks, kept = ("--tasks", "python_choice"), ("--cache", str(tmp_path / "answers"))
    whole = evaluate(*tasks)[1]["results"]
    (tmp_path / "results" / "all.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(harness, "scores", killed)
        status, record, *_ = evaluate(*tasks, *kept)
    assert status == 130 and record is None
    (database,) = (tmp_path / "answers").iterdir()
    deadline = time.monotonic() + 30  # answers are written by a thread
    while num_rows(database) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    monkeypatch.setattr(harness, "scores", counted)
    assert evaluate(*tasks, *kept)[1]["results"] == whole
    assert len(num_scored) in (24 - 5, 24 - 4)  # the fifth may have been under way
    num_scored.clear()
    assert evaluate(*tasks, *kept)[1]["results"] == whole and not num_scored
    evaluate(*tasks, *kept, "--max-length", "200")  # another model's answers are others
    assert len(num_scored) == 24 and len(list((tmp_path / "answers").iterdir())) == 2


def num_rows(database):
    connection = sqlite3.connect(database)
    try:
        return connection.execute("SELECT COUNT(*) FROM unnamed").fetchone()[0]
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "python_choice", "--checkpoint", "/nowhere"], "/nowhere: expected a dir"),
        (["--tasks", "python_choice", "--out", "/"], "--out: expected a file; got a directory"),
        (["--tasks", "python_choice", "--task-path", "/nowhere"], "--task-path: expected a folder"),
        (["--tasks", "python_choice", "--limit", "0"], "--limit: expected 1 or more; got 0"),
        (["--tasks", "python_choice", "--num-fewshot", "-1"], "--num-fewshot: expected 0 or more"),
        (
            ["--tasks", "python_choice", "--batch-size", "0"],
            "batch_size: expected an int of at least 1",
        ),
        (["--tasks", "python_generation", "--max-length", "9"], "max_gen_toks: expected less than"),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(options, message, evaluate):
    status, record, _, err = evaluate(*options)
    assert (status, record) == (2, None)
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("llama2: ")
    assert "Traceback" not in err


def test_an_unknown_task_is_named(evaluate, monkeypatch):
    from lm_eval.tasks import TaskManager

    class Few(TaskManager):
        def __init__(self, include_defaults, **settings):
            super().__init__(include_defaults=False, **settings)  # lm-eval's take seconds to read

    monkeypatch.setattr("llama2.commands.evaluate.TaskManager", Few)
    status, record, _, err = evaluate("--tasks", "python_choice,nope")
    assert (status, record) == (2, None)
    assert err == f"llama2: --tasks: expected names of tasks, lm-eval's, {TASKS}; got 'nope'\n"


def test_data_that_is_missing_is_one_line(evaluate, tmp_path):
    text = (TASKS / "choice.yaml").read_text(encoding="utf-8")
    text = text.replace("lines.jsonl", "nowhere.jsonl").replace("python_choice", "without_data")
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    status, _, _, err = evaluate("--tasks", "without_data", "--task-path", str(tmp_path))
    assert status == 2 and "nowhere.jsonl" in err.splitlines()[-1] and "Traceback" not in err


def test_a_missing_extra_is_named(monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llama2.commands.evaluate", raising=False)
    options = ["--checkpoint", "x", "--tasks", "y", "--out", str(tmp_path / "z")]
    assert cli.main(["evaluate", *options]) == 2
    assert capfd.readouterr().err == (
        "llama2: llama2 evaluate needs lm_eval; from a clone of gqa-kernels: "
        'pip install ".[evaluation]"\n'
    )


def test_no_tasks_are_refused(capfd):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--checkpoint", "x", "--out", "y", "--tasks", ","])
    assert "expected names of tasks; got ','" in capfd.readouterr().err
