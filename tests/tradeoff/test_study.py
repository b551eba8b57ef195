"""The study from end to end, on models that learn nothing: what is run, kept and reported."""

import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from llama2 import cli
from llama2.checkpoint import SHIPPED
from llama2.storage import locked
from llama2.tradeoff.study import runs, training
from llama2.tradeoff.study.data import (
    BASE,
    CALIBRATION,
    UPTRAIN,
    Corpus,
    StudyBatches,
    prepare,
    read_texts,
)
from llama2.tradeoff.study.presets import PRESETS
from llama2.tradeoff.study.training import Job, jobs, run_study, steps_of

TOKENIZER = SHIPPED / "tokenizer.model"
CPU = PRESETS["cpu"]
SMALL = replace(
    CPU,
    model=replace(CPU.model, hidden_size=16, intermediate_size=24, head_dim=2, num_layers=1),
    train=replace(CPU.train, steps=4, batch_size=3, seq_len=32, warmup_steps=1),
    num_kv_heads=(2,),
    methods=("low_rank", "mean"),
    baseline_methods=("random",),
    alphas=(0.0, 0.5),
    seeds=(0, 1),
    lookup_rows=1,
    copy_rows=1,
    held_out_characters=300,
    recall_rows=4,
    processes=1,
)


def study(preset, texts, work):
    read = read_texts(texts, None, preset)
    return run_study(preset, read, work, TOKENIZER, backend="eager", device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        words = " ".join(str(value) for value in range(number, number + 200))
        (folder / f"{number}.txt").write_text(f"file {number}\n{words}\n" * 2, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("work")
    return folder, *study(SMALL, texts, folder)


def test_presets_ask_for_what_the_page_compares():
    for preset in PRESETS.values():
        scratch, later = jobs(preset)
        full = preset.model.num_q_heads
        assert preset.model.num_kv_heads == full and len(preset.seeds) >= 3
        names = [job.name for job in scratch + later]
        assert len(set(names)) == len(names)
        for seed in preset.seeds:
            assert Job(seed, "scratch", full) in scratch
            for count in preset.num_kv_heads:
                assert full % count == 0 and count < full
                for matching in ("same_ffn", "exact", "paper"):
                    assert Job(seed, "scratch", count, matching) in scratch
            for alpha in (0.01, 0.05, 0.1):
                assert Job(seed, "control", full, alpha=alpha) in later
                for method in ("low_rank", "aligned", "mean"):
                    job = Job(seed, "converted", 1, method=method, alpha=alpha)
                    assert job in later
                    assert steps_of(job, preset) == round(alpha * preset.train.steps)


def test_every_job_has_its_entry(work):
    _, corpus, entries = work
    scratch, later = jobs(SMALL)
    assert [entry["origin"] for entry in entries] == [job.origin for job in scratch + later]
    files = corpus.record["held_out"]["files"]
    for entry in entries:
        assert len(entry["bits"]) == len(files)
        assert entry["bits_per_byte"] == sum(entry["bits"]) / sum(f["bytes"] for f in files)
        assert entry["recall"].keys() == {"lookup", "copy"}
        assert len(entry["loss_curve"]) == entry["steps"]
        assert (entry["final_train_loss"] is None) == (entry["steps"] == 0)


def test_conversions_start_from_the_base_of_their_seed(work):
    _, _, entries = work
    found = {
        tuple(entry[k] for k in ("seed", "origin", "method", "alpha")): entry["bits_per_byte"]
        for entry in entries
        if (entry["matching"] == "same_ffn" and entry["num_kv_heads"] != 2) or entry["method"]
    }
    # With random weights for keys and values a model that has learnt a little is another one.
    for seed in (0, 1):
        base = found[seed, "scratch", None, None]
        assert found[seed, "control", None, 0.5] != base
        for method in ("low_rank", "mean", "random"):
            assert found[seed, "converted", method, 0.0] != base
            assert abs(found[seed, "converted", method, 0.0] - base) < 1
    assert found[0, "scratch", None, None] != found[1, "scratch", None, None]


def test_a_killed_study_goes_on(work, texts, tmp_path, monkeypatch):
    _, _, expected = work
    run_job, begun = training.run_job, []

    def killed_at_the_fifth(job, *rest):
        begun.append(job)
        if len(begun) == 5:
            raise KeyboardInterrupt
        run_job(job, *rest)

    monkeypatch.setattr(training, "run_job", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        study(SMALL, texts, tmp_path)
    _, resumed = study(SMALL, texts, tmp_path)
    assert len(begun) == len(expected) + 1  # the fifth twice, the others once
    for got, want in zip(resumed, expected, strict=True):
        assert {**got, "seconds": 0} == {**want, "seconds": 0}


def test_another_study_in_the_folder_is_refused(work, texts):
    folder, _, entries = work
    other = replace(SMALL, uptrain_peak_lr=1.0)
    with pytest.raises(ValueError, match=r"preset uptrain_peak_lr=1\.0; got 0\.00125"):
        study(other, texts, folder)
    # How many processes it runs on changes no result.
    assert study(replace(SMALL, processes=2), texts, folder)[1] == entries


def corpus_files(folder):
    return {file.name: file.read_bytes() for file in (folder / "corpus").iterdir()}


@pytest.mark.parametrize("running", [False, True])
def test_a_refused_study_of_other_texts_changes_nothing(work, running, tmp_path):
    folder, _, _ = work
    (tmp_path / "a.txt").write_text("another text\n" * 99, encoding="utf-8")
    before = corpus_files(folder)
    message = "expected no other run there; got one" if running else "with corpus train="
    with (
        locked(folder) if running else nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        study(SMALL, tmp_path / "a.txt", folder)
    assert corpus_files(folder) == before


def test_the_bits_do_not_depend_on_the_number_of_processes(work, texts, tmp_path):
    _, _, expected = work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = replace(SMALL, seeds=(0,), alphas=(0.0,), num_kv_heads=(2,), processes=2)
    try:
        _, found = study(alone, texts, tmp_path)
    finally:
        torch.set_num_threads(threads)
    wanted = {
        (e["origin"], e["matching"], e["method"]): e["bits"]
        for e in expected
        if e["seed"] == 0 and e["alpha"] in (None, 0.0)
    }
    assert {(e["origin"], e["matching"], e["method"]): e["bits"] for e in found} == wanted


def test_batches_of_text_and_tasks(work):
    _, corpus, _ = work
    batches = [StudyBatches(corpus, SMALL, 0, use) for use in (BASE, UPTRAIN, CALIBRATION)]
    batches += [StudyBatches(corpus, SMALL, 1, BASE)]
    drawn = [data.batch(step) for data in batches for step in (0, 1)]
    assert all(batch.shape == (3, 33) and batch.dtype == torch.int64 for batch in drawn)
    for row in range(3):  # another row for every seed, use and step
        assert len({batch[row].numpy().tobytes() for batch in drawn}) == len(drawn)
    assert (batches[0].batch(1) == drawn[1]).all()
    windows = np.lib.stride_tricks.sliding_window_view(corpus.stream, 33)
    assert (windows == drawn[0][2].numpy()).all(1).any()
    identities = [json.dumps(data.identity()) for data in batches]
    assert len(set(identities)) == len(identities)


def test_nothing_held_out_is_trained_on(work, texts):
    _, corpus, _ = work
    held_out = {file["path"] for file in corpus.record["held_out"]["files"]}
    assert 0 < len(held_out) < 20
    from llama2.tokenizer import Tokenizer

    text = Tokenizer(TOKENIZER).decode(corpus.stream.tolist())
    for file in texts.iterdir():
        assert (f"file {file.stem}\n" in text) == (file.name not in held_out)


@pytest.fixture
def two_texts(tmp_path):
    """The same names with other words."""
    found = []
    for words in ("a b c ", "d e f g "):
        folder = tmp_path / words[0]
        folder.mkdir()
        for number in range(60):
            (folder / f"{number}.txt").write_text(words * 100, encoding="utf-8")
        found.append(read_texts(folder, None, SMALL))
    return found


def test_changed_texts_are_tokenised_anew(two_texts, tmp_path):
    old, new = two_texts
    first = prepare(tmp_path / "corpus", old, TOKENIZER, SMALL)
    assert prepare(tmp_path / "corpus", old, TOKENIZER, SMALL).record == first.record
    second = prepare(tmp_path / "corpus", new, TOKENIZER, SMALL)
    assert len(second.stream) != len(first.stream)
    assert second.record["train"]["sha256"] != first.record["train"]["sha256"]


@pytest.mark.parametrize("after", range(3))
def test_a_corpus_is_described_only_while_it_is_whole(after, two_texts, tmp_path, monkeypatch):
    """A run is killed as it replaces one corpus by another; the next one is of the first again."""
    folder, (old, new) = tmp_path / "corpus", two_texts
    expected = prepare(folder, old, TOKENIZER, SMALL).stream.tolist()
    replace_file, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) > after:
            raise KeyboardInterrupt
        replace_file(*paths)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        prepare(folder, new, TOKENIZER, SMALL)
    assert prepare(folder, old, TOKENIZER, SMALL).stream.tolist() == expected


# The command.


def tradeoff(*options):
    return cli.main(["tradeoff", *map(str, options)])


def test_a_page_of_speed_alone(tmp_path, capsys):
    for _ in range(2):  # its own page is replaced
        assert tradeoff("--preset", "none", "--out", tmp_path / "out", "--batch", 8) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert "GQA (4) (computed)" in capsys.readouterr().out
    command = f"llama2 tradeoff --preset none --out {tmp_path / 'out'} --batch 8"
    assert command in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_the_command_runs_a_study_and_makes_its_page_again(tmp_path, texts, monkeypatch):
    monkeypatch.setitem(PRESETS, "cpu", replace(SMALL, seeds=(0, 1, 2)))
    out, work = tmp_path / "out", tmp_path / "work"
    options = ("--text", texts, "--work", work, "--steps", 2, "--seeds", 3, 5)
    assert tradeoff("--preset", "cpu", "--out", out, *options, "--device", "cpu") == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    runs.check(results)
    assert results["seeds"] == [3, 5] and results["train_config"]["steps"] == 2
    assert results["command"].startswith("llama2 tradeoff --preset cpu --out ")
    log = [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(log) == len(results["runs"]) and "loss_curve" in log[0]

    again = tmp_path / "again"
    assert tradeoff("--results", out / "results.json", "--out", again) == 0
    assert "Python" in (again / "report.md").read_text(encoding="utf-8")
    assert (again / "pareto.svg").read_bytes() == (out / "pareto.svg").read_bytes()


def test_a_gpu_of_ones_own(tmp_path, capsys):
    options = ("--preset", "none", "--out", tmp_path / "out", "--gpu", "24,1.0,165", "--batch", 1)
    assert tradeoff(*options) == 0
    assert "7B on 1 × a GPU of 24 GiB, 1 TB/s and 165 TFLOP/s" in capsys.readouterr().out


def test_the_largest_batch_is_a_question_of_its_own(tmp_path, capsys):
    assert tradeoff("--preset", "none", "--out", tmp_path / "out", "--batch", "max") == 0
    assert "MQA (1) (computed)" in capsys.readouterr().out
    for batch in ("many", "0"):
        with pytest.raises(SystemExit):
            tradeoff("--preset", "none", "--out", tmp_path / "out", "--batch", batch)
        expected = f"--batch: expected an int of at least 1, or max; got '{batch}'"
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "8B"], "shape: expected one of 7B, 13B, 34B, 70B or a JSON file; got '8B'"),
        (["--gpu", "TPU"], "gpu: expected one of H200, "),
        (["--gpu", "80,0,1"], "gpu: expected positive numbers"),
        (["--gpu", "80,nan,1"], "gpu: expected positive numbers"),
        (["--gpu", "1e300,1,1"], "gpu: expected positive numbers, from 1e-06 to 1e+09; got"),
        (["--gpu", "80,1e-320,1"], "gpu: expected positive numbers, from 1e-06 to 1e+09; got"),
        (["--shape", "WIDE"], "num_q_heads: expected at most 4096; got"),
        (["--shape", "DEEP"], "num_layers: expected an int from 1 to 2147483647; got 1000"),
        pytest.param(
            ["--preset", "gpu"],
            "preset: expected a GPU for gpu; got the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--tp", "3"], "tp"),
        (["--context", "0"], "context"),
        (["--preset", "cpu", "--seeds", "1", "1"], "seeds: expected different ints"),
        (["--preset", "cpu", "--processes", "0"], "processes: expected at least 1; got 0"),
        (["--preset", "cpu", "--steps", "0"], "steps: expected at least 1; got 0"),
        (["--preset", "cpu", "--text", "nowhere"], "nowhere: expected a text file or a directory"),
        (["--results", "nowhere.json"], "nowhere.json"),
        *(
            ([option, value], f"{option}: expected a study to run; got {shown} with --preset none")
            for option, value, shown in (
                ("--text", "a", "a"),
                ("--held-out", "a", "a"),
                ("--work", "a", "a"),
                ("--seeds", "0", "[0]"),
                ("--steps", "7", "7"),
                ("--processes", "1", "1"),
                ("--device", "cpu", "cpu"),
                ("--backend", "eager", "eager"),
            )
        ),
        (
            ["--results", "a", "--steps", "7"],
            "--steps: expected a study to run; got 7 with --results",
        ),
        (["--results", "a", "--preset", "gpu"], "--preset: expected a study to run; got gpu with"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(tmp_path, capsys, options, message):
    if not {"--preset", "--results"} & set(options):
        options = ["--preset", "none", *options]
    if options[:2] in (["--preset", "cpu"], ["--preset", "gpu"]):
        options = [*options, "--work", str(tmp_path / "work")]
    for name, sizes in (
        ("WIDE", {"num_q_heads": 10**9, "num_kv_heads": 10**9}),
        ("DEEP", {"num_layers": 10**400}),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(asdict(CPU.model) | sizes), encoding="utf-8")
        options = [str(file) if option == name else option for option in options]
    assert tradeoff("--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llama2: ") and message in error
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "9" * 401], "--context: expected an int from -9223372036854775807 to"),
        (["--batch", "9" * 401], "--batch: expected an int from -9223372036854775807 to"),
        (["--steps", "9" * 5000], "--steps: expected an int from -9223372036854775807 to"),
        (["--seeds", str(2**64)], "--seeds: expected an int from -9223372036854775807 to"),
        (["--seeds", "1.5"], "--seeds: expected an int from .*; got '1.5'"),
        (["--keep", "nan"], "--keep: expected a finite number; got 'nan'"),
        (["--keep", "1e999"], "--keep: expected a finite number; got '1e999'"),
        *(([option, ""], f"{option}: expected a path; got ''") for option in ("--out", "--work")),
    ],
)
def test_options_that_are_no_paths_or_numbers_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        tradeoff("--preset", "none", "--out", tmp_path / "out", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and len(error) < 200
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["report.html", "report.md", "results.json", "log.jsonl", "measured.json"]
)
def test_files_of_others_are_never_replaced(tmp_path, capsys, name):
    file = tmp_path / name
    file.write_text("mine", encoding="utf-8")
    assert tradeoff("--preset", "none", "--out", tmp_path) == 2
    expected = f"out: expected a directory whose {name} is of an earlier page; got {file}"
    assert expected in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [file]


def test_plots_of_others_are_never_replaced(tmp_path, capsys):
    (tmp_path / "speed.svg").write_text("mine", encoding="utf-8")
    assert tradeoff("--preset", "none", "--out", tmp_path) == 2
    assert f"got {tmp_path / 'speed.svg'}" in capsys.readouterr().err
    assert (tmp_path / "speed.svg").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "text", ["", '{"kind": "study", "preset": ', '{"kind": "study"}', "\xff", "[" * 100_000]
)
def test_a_damaged_result_is_named(tmp_path, capsys, text):
    file = tmp_path / "damaged.json"
    file.write_bytes(text.encode("latin-1"))
    assert tradeoff("--out", tmp_path / "out", "--results", file) == 2
    message = "no result of a study: " if text == '{"kind": "study"}' else "expected JSON; "
    assert f"{file}: {message}" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "report.html").exists()


STATE = "training/scratch-8-same_ffn-seed0/state.pt"
RUN = "runs/converted-2-same_ffn-mean-0.0-seed0.json"


def cut(content):
    return content[:-100]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("study.json", lambda _: b"{broken", "expected JSON"),
        ("study.json", lambda _: b"[]", "expected a run's identity"),
        ("corpus/corpus.json", lambda _: b"{broken", "expected JSON"),
        ("corpus/corpus.json", lambda _: b"{}", "corpus: expected an entry 'held_out'; got none"),
        ("corpus/train.npy", cut, "expected the token ids of the corpus; ValueError"),
        ("corpus/train.npy", lambda _: b"", "expected the token ids of the corpus; EOFError"),
        ("corpus/held_out.npz", cut, "expected the token ids of the corpus; BadZipFile"),
        (STATE, lambda _: b"", "expected a saved state; got EOFError"),
        (RUN, lambda _: b"{}", "expected an entry 'alpha'; got none"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(name, change, message, work, texts, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(work[0], folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    if name == STATE:
        (folder / RUN).unlink()  # so that it is needed
    with pytest.raises(ValueError, match=f"{folder / name}: .*{message}"):
        study(SMALL, texts, folder)


def test_ids_of_another_corpus_are_refused(work, tmp_path):
    folder, corpus, _ = work
    shutil.copytree(folder / "corpus", tmp_path, dirs_exist_ok=True)
    file, n = tmp_path / "train.npy", len(corpus.stream)
    np.save(file, corpus.stream[:-1])
    with pytest.raises(ValueError, match=f"{file}: .*got {n - 1} where corpus.json says {n}"):
        Corpus.load(tmp_path)
