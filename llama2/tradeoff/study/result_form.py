"""The form of a study's result: its entries and their types.

`results.json` is one object. Every difference is "at equal training budget": the same steps on the
same batches, from the same weights where the shapes agree.

- kind: "study". preset, command, date (ISO): names. seconds: of the last call of the command;
  cpu_seconds: of all runs together, of one core.
- environment: python, torch, device, processes; commit: of the checkout, or None; source: SHA-256
  over the Python files of `llama2/tradeoff/study/` that made the runs, which finds them in any
  history.
- corpus: name; train: documents, bytes, sha256, tokens; held_out: bytes, sha256, tokens and files
  [{path, bytes}]: the beginnings of whole files that no model was trained on.
- text: language models from scratch. base: the `ModelConfig` of MHA; train_config: a `TrainConfig`
  (steps, batch_size, seq_len, peak_lr, …); seeds; num_kv_heads: MHA first; epochs: how often the
  training text was read.
- records: models that learn the task "records" (`records.py`). shape: a `RecordsShape` (num_q_heads
  is MHA's number of heads; items_scored, values, questions, …); train_config: of the arm "main";
  chance: the accuracy of a guess; arms: [{name, purpose, fields, steps, peak_lr, num_kv_heads (MHA
  first), num_seeds, seeds}]. The arm "main" is the primary setting, the others show how the
  difference depends on the learning rate, on the steps and on the number of fields.
- conversion: of the text's MHA models. methods; alphas: how long a converted model and its control
  train afterwards, as shares of the base's steps; peak_lr; seeds; num_kv_heads: below MHA's.
- shipped: the conversion of the checkpoint that this package ships, one model, no seeds. model: its
  `ModelConfig`; train_config: what trained it, with the peak_lr of the uptraining; alphas.
- primary: [{measure: "text" or "records", arm: of "records", otherwise None, num_kv_heads}]: the
  comparisons with MHA that were named before the first run. All others are secondary.
- runs: one object per run, with the entries of `RUN` and of `PARTS[part]`:
  - part: "text", "records", "conversion" or "shipped"; arm: of "records", otherwise None; seed;
    num_kv_heads.
  - method, alpha: both None for models from scratch and for the shipped model as it is; alpha
    alone for a control, which trains on without a conversion; both for a converted model.
  - intermediate_size, parameters (embeddings and head included), steps, peak_lr (None without
    steps), seconds, cpu_seconds (of one core, evaluation included), final_train_loss (nats, the
    mean of the last 20 steps; None without steps), loss_curve (means over twentieths of the steps).
  - text, conversion, shipped: tokens (trained on), flops_per_token (forward), bits (of each
    held-out file) and bits_per_byte, their sum over the bytes; less is better.
  - records: accuracy, their mean over the numbers of items; accuracy_by_items {number of items:
    share}; bits_per_answer, mean cross-entropy.
"""

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from llama2.config import ModelConfig
from llama2.storage import read_json

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Number:
    """An int or a finite float, from `low` to `high`."""

    kind: type[int] | type[float]
    low: float
    high: float
    optional: bool = False  # or None


COUNT, SIZE = Number(int, 1, _LARGEST), Number(int, 0, _LARGEST)
# No study has so much of anything, and sums and products of a few such figures are floats.
AMOUNT = Number(float, 0, 1e30)
SHARE = Number(float, 0, 1)

RUN = {
    "part": ("text", "records", "conversion", "shipped"),
    "arm": str | None,
    "seed": SIZE,
    "num_kv_heads": COUNT,
    "method": str | None,
    "alpha": Number(float, 0, 1e30, optional=True),
    "intermediate_size": COUNT,
    "parameters": AMOUNT,
    "steps": AMOUNT,
    "peak_lr": Number(float, 0, 1e30, optional=True),
    "final_train_loss": Number(float, 0, 1e30, optional=True),
    "loss_curve": [AMOUNT],
    "seconds": AMOUNT,
    "cpu_seconds": AMOUNT,
}
_TEXT = {"tokens": AMOUNT, "flops_per_token": AMOUNT, "bits_per_byte": AMOUNT, "bits": [AMOUNT]}
_RECORDS = {"accuracy": SHARE, "accuracy_by_items": dict, "bits_per_answer": AMOUNT}
PARTS = {"text": _TEXT, "records": _RECORDS, "conversion": _TEXT, "shipped": _TEXT}

_RESULT_CORPUS = {
    "name": str,
    "train": {"documents": SIZE, "bytes": SIZE, "sha256": str},
    "held_out": {"files": [{"path": str, "bytes": COUNT}], "bytes": COUNT, "sha256": str},
}
CORPUS = _RESULT_CORPUS | {
    part: _RESULT_CORPUS[part] | {"tokens": SIZE} for part in ("train", "held_out")
}
_TRAIN_CONFIG = {"steps": COUNT, "batch_size": COUNT, "seq_len": COUNT, "peak_lr": AMOUNT}
_MODEL = {field.name: COUNT for field in fields(ModelConfig) if field.default is MISSING}
_FORM = {
    "preset": str,
    "command": str,
    "date": str,
    "seconds": AMOUNT,
    "cpu_seconds": AMOUNT,
    "environment": {
        "python": str,
        "torch": str,
        "device": str,
        "processes": COUNT,
        "commit": str | None,
        "source": str,
    },
    "corpus": _RESULT_CORPUS,
    "text": {
        "base": _MODEL,
        "train_config": _TRAIN_CONFIG,
        "seeds": [SIZE],
        "num_kv_heads": [COUNT],
        "epochs": AMOUNT,
    },
    "records": {
        "shape": {"num_q_heads": COUNT, "values": COUNT, "questions": COUNT},
        "train_config": _TRAIN_CONFIG,
        "chance": SHARE,
        "arms": [
            {
                "name": str,
                "purpose": str,
                "fields": COUNT,
                "steps": COUNT,
                "peak_lr": AMOUNT,
                "num_kv_heads": [COUNT],
                "seeds": [SIZE],
            }
        ],
    },
    "conversion": {
        "methods": [str],
        "alphas": [AMOUNT],
        "peak_lr": AMOUNT,
        "seeds": [SIZE],
        "num_kv_heads": [COUNT],
    },
    "shipped": {"model": _MODEL, "train_config": _TRAIN_CONFIG, "alphas": [AMOUNT]},
    "primary": [{"measure": ("text", "records"), "arm": str | None, "num_kv_heads": COUNT}],
    "runs": [RUN],
}


def check_form(results: dict[str, Any]) -> None:
    """Refuses a result that is damaged, or of another version.

    Raises:
        ValueError: an entry is missing, of another kind, or a number that is not finite or out of
            range; a model is no `ModelConfig`. The message names it.
    """
    check_entry("", results, _FORM)
    for index, run in enumerate(results["runs"]):
        check_entry(f"runs[{index}]", run, PARTS[run["part"]])
    for name, config in (
        ("text.base", results["text"]["base"]),
        ("shipped.model", results["shipped"]["model"]),
    ):
        if unknown := config.keys() - {field.name for field in fields(ModelConfig)}:
            raise ValueError(
                f"{name}: expected the fields of ModelConfig; got {min(unknown)!r} too"
            )
        try:
            ModelConfig(**config)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error


def read_run(file: Path) -> dict[str, Any]:
    """Reads the entry of a run. Raises ValueError, which names the file, for another form."""
    return read_entry(file, PARTS[read_entry(file, RUN)["part"]])


def read_entry(file: Path, form: Any) -> Any:
    """A JSON file of that form.

    Raises:
        ValueError: it is damaged, or of another; the message names it.
    """
    found = read_json(file)
    try:
        check_entry(file.stem, found, form)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def check_entry(name: str, value: object, form: Any) -> None:
    """A form is a type, a `Number`, a tuple of strings to choose from, [the form of every element]
    or {name: the form of that entry}.

    Raises:
        ValueError: another form, or a number out of range; the message begins with `name`.
    """
    if isinstance(form, Number):
        if value is not None or not form.optional:
            _check_number(name, value, form)
        return
    if isinstance(form, tuple):
        if value not in form:
            raise ValueError(f"{name}: expected one of {', '.join(form)}; got {value!r:.80}")
        return
    kind = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", kind)
        raise ValueError(f"{name or 'results'}: expected {expected}; got {value!r:.80}")
    if isinstance(form, list):
        for index, element in enumerate(value):
            check_entry(f"{name}[{index}]", element, form[0])
    elif isinstance(form, dict):
        if missing := form.keys() - value.keys():
            where = name or "results"
            raise ValueError(f"{where}: expected an entry {min(missing)!r}; got none")
        for key, inner in form.items():
            check_entry(f"{name}.{key}".removeprefix("."), value[key], inner)


def check_finite(name: str, value: object) -> None:
    """Raises ValueError, which begins with `name`, for what is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:  # an int may be larger
        raise ValueError(f"{name}: expected a finite number; got {value!r:.80}")


def _check_number(name: str, value: Any, form: Number) -> None:
    if form.kind is float:
        check_finite(name, value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected int; got {value!r:.80}")
    if not form.low <= value <= form.high:
        raise ValueError(f"{name}: expected {form.low} to {form.high}; got {value!r:.80}")
