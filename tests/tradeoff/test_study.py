"""The study from end to end, on models that learn nothing: what is run, kept and reported."""

import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2 import cli
from llama2.checkout import source_sha256
from llama2.checkpoint import SHIPPED, load_config
from llama2.conversion import convert
from llama2.placement import place
from llama2.storage import locked
from llama2.tokenizer import Tokenizer
from llama2.tradeoff.study import comparisons, models, runs, training
from llama2.tradeoff.study.data import (
    BASE,
    CALIBRATION,
    UPTRAIN,
    Corpus,
    TextBatches,
    prepare,
    read_texts,
)
from llama2.tradeoff.study.jobs import Job, jobs, steps_of
from llama2.tradeoff.study.presets import PRESETS
from llama2.tradeoff.study.training import run_study

TOKENIZER = SHIPPED / "tokenizer.model"
SHIPPED_MODEL = load_config(SHIPPED)
CPU, SMALL = PRESETS["cpu"], PRESETS["smoke"]
EAGER = place("eager", "cpu")
SOURCE = Path(training.__file__).parent


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


def test_presets_ask_for_what_is_compared():
    for preset in PRESETS.values():
        first, later = jobs(preset, SHIPPED_MODEL)
        names = [job.name for job in first + later]
        assert len(set(names)) == len(names)
        full = preset.model.num_q_heads
        assert preset.model.num_kv_heads == full
        for seed in preset.seeds:
            for count in (full, *preset.num_kv_heads):
                assert full % count == 0 and Job("text", seed, count) in first
        for arm in preset.arms:
            assert 0 < arm.num_seeds <= len(preset.seeds)
            for seed in preset.seeds[: arm.num_seeds]:
                for count in (preset.records.num_q_heads, *arm.num_kv_heads):
                    job = Job("records", seed, count, arm=arm.name)
                    assert job in first and steps_of(job, preset) == arm.steps
        for seed in preset.seeds[: preset.conversions.num_seeds]:
            for alpha in preset.conversions.alphas:
                steps = round(alpha * preset.train.steps)
                control = Job("conversion", seed, full, alpha=alpha)
                assert (control in later) == (alpha > 0)
                for method in preset.conversions.methods:
                    job = Job("conversion", seed, 1, method=method, alpha=alpha)
                    assert (job in later) == (1 in preset.num_kv_heads)
                    assert steps_of(job, preset) == steps
        assert [job for job in first if job.part == "shipped"] == [
            Job("shipped", 0, 2),
            Job("shipped", 0, 1, method="low_rank", alpha=0.0),
            Job("shipped", 0, 2, alpha=0.05),
            Job("shipped", 0, 1, method="low_rank", alpha=0.05),
        ]


def test_primary_comparisons_have_runs():
    for preset in PRESETS.values():
        first, _ = jobs(preset, SHIPPED_MODEL)
        assert preset.primary
        for primary in preset.primary:
            assert any(job == primary_job(primary, job.seed) for job in first)


def primary_job(primary, seed):
    return Job(primary.measure, seed, primary.num_kv_heads, arm=primary.arm)


def test_every_job_has_its_entry(work):
    _, corpus, entries = work
    expected = [job for phase in jobs(SMALL, SHIPPED_MODEL) for job in phase]
    fields = ("part", "seed", "num_kv_heads", "arm", "method", "alpha")
    assert [Job(*(entry[field] for field in fields)) for entry in entries] == expected
    files = corpus.record["held_out"]["files"]
    for job, entry in zip(expected, entries, strict=True):
        assert entry["steps"] == steps_of(job, SMALL) == len(entry["loss_curve"])
        assert (entry["final_train_loss"] is None) == (entry["steps"] == 0)
        assert (entry["peak_lr"] is None) == (entry["steps"] == 0)
        assert entry["cpu_seconds"] > 0
        if job.part == "records":
            assert entry["accuracy"] == sum(entry["accuracy_by_items"].values()) / 4
        else:
            assert len(entry["bits"]) == len(files)
            assert entry["bits_per_byte"] == sum(entry["bits"]) / sum(f["bytes"] for f in files)


def bits_of(entries, **fields):
    (found,) = [
        entry for entry in entries if all(entry[name] == value for name, value in fields.items())
    ]
    return found["bits_per_byte"]


def test_conversions_start_from_the_base_of_their_seed(work):
    folder, corpus, entries = work
    base = bits_of(entries, part="text", seed=10, num_kv_heads=8)
    assert base != bits_of(entries, part="text", seed=11, num_kv_heads=8)
    control = bits_of(entries, part="conversion", method=None, alpha=0.5)
    assert control != base
    model = models.trained(folder / "training" / "text-kv8-seed10", SMALL, EAGER)
    expected = models.text_scores(convert(model, 2, EAGER.ops, method="mean"), corpus, 32)
    assert expected["bits_per_byte"] != base
    found = bits_of(entries, part="conversion", method="mean", alpha=0.0)
    assert found == expected["bits_per_byte"]
    assert len({run["bits_per_byte"] for run in entries if run["part"] == "conversion"}) == 5


def test_the_shipped_model_is_converted(work):
    _, corpus, entries = work
    model = models.shipped_model(EAGER)
    before = bits_of(entries, part="shipped", method=None, alpha=None)
    assert before == models.text_scores(model, corpus, 32)["bits_per_byte"]
    assert len({run["bits_per_byte"] for run in entries if run["part"] == "shipped"}) == 4


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
    assert without_times(resumed) == without_times(expected)


def without_times(entries):
    return [entry | {"seconds": 0, "cpu_seconds": 0} for entry in entries]


def test_another_study_in_the_folder_is_refused(work, texts):
    folder, _, entries = work
    other = replace(SMALL, primary=SMALL.primary[:1])  # named after the runs are known
    with pytest.raises(ValueError, match=r"with preset primary="):
        study(other, texts, folder)
    # How many processes it runs on changes no result.
    assert study(replace(SMALL, processes=2), texts, folder)[1] == entries


def test_a_study_does_not_go_on_with_other_code(work, texts, monkeypatch):
    """Its result names the source of all of its runs."""
    folder = work[0]
    monkeypatch.setattr(training, "source_sha256", lambda _: "another")
    before = corpus_files(folder)
    with pytest.raises(ValueError, match=r"expected the state of a run with source sha256='anoth"):
        study(SMALL, texts, folder)
    assert corpus_files(folder) == before


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
    preset = replace(SMALL, seeds=(10,), arms=SMALL.arms[1:], processes=2)
    try:
        _, found = study(preset, texts, tmp_path)
    finally:
        torch.set_num_threads(threads)
    chosen = [run for run in expected if run["seed"] != 11 and run["arm"] != "main"]
    assert without_times(found) == without_times(chosen)


def test_batches_of_text(work):
    _, corpus, _ = work
    batches = [TextBatches(corpus, SMALL.train, 0, use) for use in (BASE, UPTRAIN, CALIBRATION)]
    batches += [TextBatches(corpus, SMALL.train, 1, BASE)]
    drawn = [data.batch(step) for data in batches for step in (0, 1)]
    assert all(batch.shape == (2, 33) and batch.dtype == torch.int64 for batch in drawn)
    for row in range(2):  # another row for every seed, use and step
        assert len({batch[row].numpy().tobytes() for batch in drawn}) == len(drawn)
    assert (batches[0].batch(1) == drawn[1]).all()
    windows = np.lib.stride_tricks.sliding_window_view(corpus.stream, 33)
    assert (windows == drawn[0][1].numpy()).all(1).any()
    identities = [json.dumps(data.identity()) for data in batches]
    assert len(set(identities)) == len(identities)


def test_nothing_held_out_is_trained_on(work, texts):
    _, corpus, _ = work
    held_out = {file["path"] for file in corpus.record["held_out"]["files"]}
    assert 0 < len(held_out) < 20
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
    assert "GQA (8) for the 7B shape on H200 SXM" in capsys.readouterr().out
    command = f"llama2 tradeoff --preset none --out {tmp_path / 'out'} --batch 8"
    assert command in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_the_command_runs_a_study_and_makes_its_page_again(tmp_path, texts):
    out, work = tmp_path / "out", tmp_path / "work"
    options = ("--text", texts, "--work", work, "--steps", 2, "--seeds", 3, 5)
    assert tradeoff("--preset", "smoke", "--out", out, *options, "--device", "cpu") == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    runs.check(results)
    assert results["text"]["seeds"] == [3, 5] and results["text"]["train_config"]["steps"] == 2
    assert results["records"]["arms"][1]["seeds"] == results["conversion"]["seeds"] == [3]
    assert results["command"].startswith("llama2 tradeoff --preset smoke --out ")
    assert results["cpu_seconds"] > 0
    assert results["environment"]["source"] == source_sha256(SOURCE)
    assert [comparison.seeds.n for _, comparison in comparisons.primary(results)] == [2, 2]
    log = [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(log) == len(results["runs"]) and "loss_curve" in log[0] and "bits" not in log[0]

    again = tmp_path / "again"
    assert tradeoff("--results", out / "results.json", "--out", again) == 0
    assert "Python" in (again / "report.md").read_text(encoding="utf-8")
    plots = {path.name: path.read_bytes() for path in out.glob("*.svg")}
    assert plots and plots == {path.name: path.read_bytes() for path in again.glob("*.svg")}


def test_the_hash_of_the_source_is_of_names_and_contents(tmp_path):
    hashes = set()
    for name, text in (("a", "1"), ("b", "1"), ("b", "2")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        (folder / "notes.txt").write_text(name, encoding="utf-8")
        hashes.add(source_sha256(folder))
        (folder / "notes.txt").unlink()
        assert source_sha256(folder) in hashes
    assert len(hashes) == 3


def test_a_gpu_of_ones_own(tmp_path, capsys):
    options = ("--preset", "none", "--out", tmp_path / "out", "--gpu", "24,1.0,165", "--batch", 1)
    assert tradeoff(*options) == 0
    assert "the 7B shape on a GPU of 24 GiB, 1 TB/s and 165 TFLOP/s" in capsys.readouterr().out


def test_the_largest_batch_is_a_question_of_its_own(tmp_path, capsys):
    assert tradeoff("--preset", "none", "--out", tmp_path / "out", "--batch", "max") == 0
    assert "GQA (4) for the 7B shape on H200 SXM with 4,096 tokens" in capsys.readouterr().out
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
    (tmp_path / "memory.svg").write_text("mine", encoding="utf-8")
    assert tradeoff("--preset", "none", "--out", tmp_path) == 2
    assert f"got {tmp_path / 'memory.svg'}" in capsys.readouterr().err
    assert (tmp_path / "memory.svg").read_text(encoding="utf-8") == "mine"


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


STATE = "training/text-kv8-seed10/state.pt"
RUN = "runs/conversion-kv2-mean-0.0-seed10.json"


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
