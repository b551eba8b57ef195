"""A small run of `speculation.py`."""

import json

import speculation


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(speculation, "ROUNDS", 1)
    file = tmp_path / "speculation.json"
    speculation.main(["--results", str(file), "--texts", "2", "--new-tokens", "6"])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert len(content["lookup"]) == 12 and all(row["same_tokens"] for row in content["lookup"])
    assert all(1 <= row["tokens_per_step"] <= 5 for row in content["lookup"])
    for row in content["drafts"]:
        assert 0 < row["same_uniform"] <= row["rejection"] < 1
