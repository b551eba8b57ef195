"""The form of a study's result: which entries it has, and of what kind."""

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from llama2.accounting import MATCHINGS
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

ORIGINS = ("scratch", "control", "converted")
RUN = {
    "seed": SIZE,
    "origin": ORIGINS,
    "num_kv_heads": COUNT,
    "matching": MATCHINGS,
    "method": str | None,
    "alpha": Number(float, 0, 1e30, optional=True),
    "intermediate_size": COUNT,
    "parameters": AMOUNT,
    "flops_per_token": AMOUNT,
    "steps": AMOUNT,
    "tokens": AMOUNT,
    "bits_per_byte": AMOUNT,
    "bits": list,
    "recall": dict,
    "seconds": AMOUNT,
}
_RESULT_CORPUS = {
    "name": str,
    "train": {"documents": SIZE, "bytes": SIZE, "sha256": str},
    "held_out": {"files": [{"path": str, "bytes": COUNT}], "bytes": COUNT, "sha256": str},
}
CORPUS = _RESULT_CORPUS | {
    part: _RESULT_CORPUS[part] | {"tokens": SIZE} for part in ("train", "held_out")
}
_FORM = {
    "preset": str,
    "command": str,
    "date": str,
    "seconds": AMOUNT,
    "environment": {
        "python": str,
        "torch": str,
        "device": str,
        "processes": COUNT,
        "commit": str | None,
    },
    "corpus": _RESULT_CORPUS,
    "base": {field.name: COUNT for field in fields(ModelConfig) if field.default is MISSING},
    "train_config": {"steps": COUNT, "batch_size": COUNT, "seq_len": COUNT},
    "uptrain_peak_lr": AMOUNT,
    "epochs": AMOUNT,
    "alphas": [AMOUNT],
    "seeds": [SIZE],
    "runs": [RUN],
    "recall_chance": dict,
}


def check_form(results: dict[str, Any]) -> None:
    """Refuses a result that is damaged, or of another version.

    Raises:
        ValueError: an entry is missing, of another kind, or a number that is not finite or out of
            range; the base is no `ModelConfig`. The message names it.
    """
    check_entry("", results, _FORM)
    base = results["base"]
    if unknown := base.keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"base: expected the fields of ModelConfig; got {min(unknown)!r} too")
    try:
        ModelConfig(**base)
    except ValueError as error:
        raise ValueError(f"base.{error}") from error


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
