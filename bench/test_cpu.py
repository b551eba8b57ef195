"""Tests of `cpu.py` with a dry run and a simulated clock."""

import json

import cpu
import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    cpu.main(["--dry-run", "--out", str(folder)])
    return folder


def test_every_line_is_there_and_no_measurement(dry_run):
    content = json.loads((dry_run / "cpu.json").read_text(encoding="utf-8"))
    assert content["kind"] != "measurement"
    assert len(content["rows"]) == len(cpu.lines(cpu.SHORT)) * len(cpu.DTYPES)
    page = (dry_run / "cpu.md").read_text(encoding="utf-8")
    assert "not a measurement" in page and page.count("\n| ") == 1 + len(content["rows"])


def test_contestants_give_the_same_tokens_in_float32(dry_run):
    rows = json.loads((dry_run / "cpu.json").read_text(encoding="utf-8"))["rows"]
    compared = [r["same_tokens"] for r in rows if "same_tokens" in r and r["dtype"] == "float32"]
    assert len(compared) == 3
    assert all(share == 1.0 for shares in compared for share in shares.values())


def test_ratios_are_of_medians(monkeypatch):
    ticks = iter(
        [
            0.0,
            *(
                t
                for pair in ((2, 5), (1, 9), (4, 1))
                for t in (0.0, float(pair[0]), 0.0, float(pair[1]), 0.0, 1.0)
            ),
            *[0.0] * 9,
        ]
    )
    monkeypatch.setattr(cpu.time, "process_time", lambda: next(ticks))
    calls = {name: lambda: None for name in (cpu.OURS, cpu.PEER, cpu.EAGER)}
    row = cpu.measure(calls, rounds=3, budget_s=-1.0)
    assert row["seconds"] == {cpu.OURS: 2.0, cpu.PEER: 5.0, cpu.EAGER: 1.0}
    assert row["ratios"] == {cpu.PEER: 0.4, cpu.EAGER: 2.0}
