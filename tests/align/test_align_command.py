"""`llama2 align`: every stage for real, in small; what is done is not done again."""

import json
import re

import pytest

from llama2 import cli
from llama2.align.chain import folder_of
from llama2.align.recipe import PRESETS
from llama2.align.stages import Files, models, stages

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("align") / "out"
    assert cli.main(["align", "--preset", "smoke", "--seeds", "5", "--out", str(out)]) == 0
    return out


def test_all_stages_run_and_the_page_says_that_they_mean_nothing(out):
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    chain = results["chains"]["5"]
    assert list(chain["stages"]) == [stage.name for stage in stages(SMOKE, 5, folder_of(out, 5))]
    assert list(chain["models"]) == models(SMOKE)
    for model in chain["models"].values():
        counts = model["families"].values()
        assert sum(each["answers"] for each in counts) == SMOKE.num_asked
        assert [turn["asked"] for turn in model["obeyed"]] == [SMOKE.num_obeyed] * 3
    assert [len(means) for means in chain["rounds"]] == [SMOKE.samples] * SMOKE.rounds
    assert len(chain["ppo"]) == SMOKE.iterations and len(chain["sft"]) > 1
    assert results["failed"] == [] and results["settings"]["samples"] == SMOKE.samples
    page = (out / "report.md").read_text(encoding="utf-8")
    assert SMOKE.caution.replace("“", "").split()[0] in page
    assert "one seed tells nothing" in page
    assert not re.search(r"\b(better|worse) in\b", page)


def test_nothing_is_done_again(out, capsys):
    files = Files(folder_of(out, 5))
    kept = [file for file in files.folder.rglob("*") if file.is_file()]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in kept}
    page = (out / "report.md").read_bytes()
    assert cli.main(["align", "--preset", "smoke", "--seeds", "5", "--out", str(out)]) == 0
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in kept} == before
    assert [file for file in files.folder.rglob("*") if file.is_file()] == kept
    assert (out / "report.md").read_bytes() == page
    assert "one seed tells nothing" in capsys.readouterr().out


def test_a_failing_seed_is_reported_and_the_others_are_not_lost(out, capsys):
    (folder_of(out, 6)).mkdir()
    (folder_of(out, 6) / "tasks").write_text("mine", encoding="utf-8")
    words = ["align", "--preset", "smoke", "--seeds", "5", "6", "--out", str(out)]
    assert cli.main(words) == 1
    printed = capsys.readouterr()
    assert re.search(r"seed 6 failed; see .*seed-6/log.txt", printed.err)
    assert "report.html" in printed.out
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "failed and are left out: 6." in page


def test_a_folder_of_another_preset_is_refused(out, capsys):
    assert cli.main(["align", "--preset", "cpu", "--seeds", "5", "--out", str(out)]) == 2
    assert "expected the state of a run with preset" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [["1", "1"], ["-1"]])
def test_seeds_that_are_none(seeds, tmp_path, capsys):
    assert cli.main(["align", "--seeds", *seeds, "--out", str(tmp_path / "out")]) == 2
    assert "seeds: expected distinct ints of at least 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
