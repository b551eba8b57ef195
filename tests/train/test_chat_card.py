"""The card of the shipped chat model says what was measured."""

from pathlib import Path

from llama2.checkpoint import SHIPPED_CHAT
from llama2.finetune.chat_card import card, read_results
from llama2.storage import read_json

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "chat"


def counts(answers, exact):
    return {"answers": answers, "exact": exact}


def test_a_card_has_a_row_for_each_family_and_turn():
    packages = {"torch": "2.13"}
    made_with = {"packages": packages, "machine": "x86_64", "gpu": None, "commit": "abc"}
    results = {
        f"answers_{stage}": {
            "all": counts(8, exact),
            "sources": {"sort": counts(4, exact)},
            "made_with": made_with,
        }
        for stage, exact in (("base", 0), ("sft", 3), ("chat", 4))
    }
    turns = [
        [{"turn": 1, "asked": 2, "obeyed": n}, {"turn": 2, "asked": 1, "obeyed": 0}] for n in (1, 2)
    ]
    results["obedience"] = {"checkpoints": [{"turns": each} for each in turns]}
    text = card(results, 1234)
    assert "| sort | 4 | 0% | 75% | 100% |" in text and "| **all** | 8 | 0% | 38% | 50% |" in text
    assert "| 1 | 2 | 50% | 100% |\n| 2 | 1 | 0% | 0% |" in text and "1,234 parameters" in text
    assert "with\ntorch 2.13 on a CPU (x86_64), at commit abc." in text


def test_the_shipped_card_is_that_of_the_results():
    parameters = read_json(SHIPPED_CHAT / "training.json")["parameters"]
    shown = (SHIPPED_CHAT / "README.md").read_text(encoding="utf-8")
    assert shown == card(read_results(RESULTS), parameters)


def test_the_shipped_chat_model_is_small_and_better_than_its_base():
    size = sum(file.stat().st_size for file in SHIPPED_CHAT.iterdir())
    assert size < 4e6
    results = read_results(RESULTS)
    base, sft, chat = (results[f"answers_{stage}"]["all"] for stage in ("base", "sft", "chat"))
    assert base["exact"] == 0 and sft["exact"] > base["answers"] / 2
    assert chat["exact"] > base["answers"] / 2
    before, after = (each["turns"] for each in results["obedience"]["checkpoints"])
    for one, other in list(zip(before, after, strict=True))[1:]:  # the first turn has it anyway
        assert other["obeyed"] > one["obeyed"]
