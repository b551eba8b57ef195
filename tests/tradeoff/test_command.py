"""What `llama2 tradeoff` prints and reads apart from the study: the page as JSON, measured rows."""

import json
import shlex
from dataclasses import asdict

import pytest

from llama2 import cli
from llama2.config import PUBLISHED
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import recommend
from llama2.tradeoff.report import interactive
from llama2.tradeoff.roofline import CACHE_FORMATS, GPUS, Gpu

ROW = {
    "shape": "7B",
    "num_q_heads": 32,
    "batch": 32,
    "context": 4096,
    "num_layers": 2,
    "gpu": "synthetic",
    "tag": "measured",
    "floor_microseconds": 10.0,
    "microseconds_p20": 19.0,
    "microseconds_p80": 62.0,
    "percent_of_floor": 50.0,
}
ROWS = [
    ROW | {"num_kv_heads": 32, "microseconds": 60.0},
    ROW | {"num_kv_heads": 8, "microseconds": 20.0},
]


def tradeoff(*options):
    return cli.main(["tradeoff", "--preset", "none", *map(str, options)])


def test_json_is_the_page_with_the_numbers_of_the_recommendation(tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--batch", 16, "--gpu", "H100", "--kv-cache-dtype", "int8", "--least-share", 0.25)
    assert tradeoff("--out", out, "--json", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    question = Question(
        PUBLISHED["7B"], GPUS["H100"], 4096, 16, cache=CACHE_FORMATS["int8"], least_share=0.25
    )
    found = recommend(question)
    assert printed["recommendation"]["num_kv_heads"] == found.num_kv_heads == 8
    for each, candidate in zip(
        printed["recommendation"]["candidates"], found.candidates, strict=True
    ):
        assert each["tokens_per_s"] == candidate.tokens_per_s
    table = next(block for block in printed["blocks"] if block.get("name") == "decision")
    lines = (out / "report.md").read_text(encoding="utf-8").splitlines()
    assert all("| " + " | ".join(row) + " |" in lines for row in table["rows"])
    assert [row[0] for row in table["rows"]][table["marked"]] == "GQA (8)"


@pytest.mark.parametrize(
    "question",
    [
        Question(PUBLISHED["7B"], GPUS["H200"], 4096, 32),
        Question(PUBLISHED["13B"], GPUS["RTX 4090"], 100, None, 2, CACHE_FORMATS["fp8"], 0.5, 0),
        Question(PUBLISHED["7B"], Gpu("odd", 80 * 2**30, 3.35e12, 9.9e14, "test"), 64, 1),
    ],
    ids=("defaults", "all options", "a GPU of one's own"),
)
def test_the_command_on_a_page_gives_its_setting(tmp_path, capsys, question):
    written = shlex.split(interactive.command(question))
    assert written[:2] == ["llama2", "tradeoff"] and written.count("DIR") == 1
    out = str(tmp_path / "out")
    assert cli.main([out if word == "DIR" else word for word in [*written[1:], "--json"]]) == 0
    found = json.loads(capsys.readouterr().out)["recommendation"]
    assert found == json.loads(json.dumps(asdict(recommend(question)))) | {
        "reasons": found["reasons"]
    }


def test_measured_rows_of_an_earlier_run_stand_in_the_decision(tmp_path, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8")
    assert tradeoff("--out", tmp_path / "out", "--measured", file) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "speed-up of the layers, batch 32, context 4,096 *(measured)*" in text
    assert "| 3.00× |" in text and "## Measured speed" in text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "measured_rows: expected list; got {}"),
        ([[]], r"measured_rows[0]: expected dict; got []"),
        ([{"tag": "measured"}], "measured_rows[0]: expected an entry 'batch'; got none"),
        ([ROWS[0] | {"microseconds": None}], "measured_rows[0].microseconds: expected a finite"),
        ([ROWS[0] | {"microseconds": 0}], "measured_rows[0].microseconds: expected 1e-09 to"),
        (
            [ROWS[0] | {"microseconds": 18.0}],
            "measured_rows[0].microseconds: expected 19.0 to 62.0, its percentiles; got 18.0",
        ),
        ([ROWS[0] | {"batch": "8"}], "measured_rows[0].batch: expected int; got '8'"),
        ([ROWS[0] | {"context": None}], "measured_rows[0].context: expected int; got None"),
        ([ROWS[0] | {"num_kv_heads": [8]}], "measured_rows[0].num_kv_heads: expected int; got [8]"),
        ([ROWS[0] | {"gpu": 1}], "measured_rows[0].gpu: expected str; got 1"),
        ([ROWS[0] | {"tag": ["x"]}], "measured_rows[0].tag: expected one of measured, does not"),
        # It would name a plot.
        ([ROWS[0] | {"shape": "../x"}], "measured_rows[0].shape: expected one of 7B, 13B"),
        (
            [ROWS[0] | {"tag": "does not fit", "floor_microseconds": None}],
            "measured_rows[0].floor_microseconds: expected a finite number; got None",
        ),
    ],
)
def test_rows_that_are_none_are_refused_before_anything_is_written(tmp_path, capsys, rows, message):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert tradeoff("--out", tmp_path / "out", "--measured", file) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{file}: expected the measured.json of a page; {message}" in error
    assert not (tmp_path / "out").exists()
