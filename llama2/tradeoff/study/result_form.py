"""The form of a study's result: which entries it has, and of what kind."""

import math
from dataclasses import MISSING, fields
from typing import Any

from llama2.config import ModelConfig

_RUN = {
    "seed": int,
    "origin": str,
    "num_kv_heads": int,
    "matching": str,
    "method": str | None,
    "alpha": float | None,
    "intermediate_size": int,
    "parameters": float,
    "flops_per_token": float,
    "steps": float,
    "tokens": float,
    "bits_per_byte": float,
    "bits": list,
    "recall": dict,
    "seconds": float,
}
_FORM = {
    "preset": str,
    "command": str,
    "date": str,
    "seconds": float,
    "environment": {
        "python": str,
        "torch": str,
        "device": str,
        "processes": int,
        "commit": str | None,
    },
    "corpus": {
        "name": str,
        "train": {"documents": int, "bytes": int, "sha256": str},
        "held_out": {"files": [{"path": str, "bytes": int}], "bytes": int, "sha256": str},
    },
    "base": {field.name: field.type for field in fields(ModelConfig) if field.default is MISSING},
    "train_config": {"steps": int, "batch_size": int, "seq_len": int},
    "uptrain_peak_lr": float,
    "epochs": float,
    "alphas": [float],
    "seeds": [int],
    "runs": [_RUN],
    "recall_chance": dict,
}


def check_form(results: dict[str, Any]) -> None:
    """Refuses a result that is damaged, or of another version.

    Raises:
        ValueError: an entry is missing, of another kind, or a number that is not finite; the base
            has entries that no `ModelConfig` has. The message names it.
    """
    _check("", results, _FORM)
    if unknown := results["base"].keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"base: expected the fields of ModelConfig; got {min(unknown)!r} too")


def check_finite(name: str, value: object) -> None:
    """Raises ValueError, which begins with `name`, for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; got {value!r}")


def _check(name: str, value: object, form: Any) -> None:
    """A form is a type, [the form of every element] or {name: the form of that entry}."""
    kind = type(form) if isinstance(form, dict | list) else form
    if kind is float or (kind == float | None and value is not None):
        check_finite(name, value)
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = getattr(kind, "__name__", kind)
        raise ValueError(f"{name}: expected {expected}; got {value!r:.80}")
    elif isinstance(form, list):
        for index, element in enumerate(value):
            _check(f"{name}[{index}]", element, form[0])
    elif isinstance(form, dict):
        if missing := form.keys() - value.keys():
            where = name or "results"
            raise ValueError(f"{where}: expected an entry {min(missing)!r}; got none")
        for key, inner in form.items():
            _check(f"{name}.{key}".removeprefix("."), value[key], inner)
