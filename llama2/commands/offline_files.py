"""The files of `llama2 serve-offline`: JSON lines of prompts and of results."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.commands import json_lines
from llama2.commands.json_lines import Complaints
from llama2.requests import Result
from llama2.tokenizer import Tokenizer

SETTINGS = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
_RESULT_KEYS = {"id", "text", "num_new_tokens", "finish_reason"}
_BEGIN, _THEN = '{"id": ', ', "text": "'  # around the id in every line of `result_line`


@dataclass(frozen=True)
class Line:
    number: int
    id: str | int
    prompt: str
    settings: dict[str, float | int]  # the SETTINGS that the line sets


def read_prompts(path: Path, complaints: Complaints) -> Iterator[Line]:
    first: dict[str | int, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = _parse(number, raw)
                if line.id in first:
                    raise ValueError(
                        f"id: expected an id other than line {first[line.id]}'s; got {line.id!r}"
                    )
            except ValueError as error:
                complaints.add(path, number, error)
                continue
            first[line.id] = number
            yield line


def _parse(number: int, raw: bytes) -> Line:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"line: expected a JSON object; got a {type(value).__name__}")
    known = {"prompt", "id", *SETTINGS}
    if not value.keys() <= known:
        unknown = sorted(value.keys() - known)
        raise ValueError(f"line: expected only keys among {sorted(known)}; got {unknown}")
    prompt, id = value.get("prompt"), value.get("id", number)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt: expected a text; got {prompt!r}")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise ValueError(f"id: expected a text or a whole number; got {id!r}")
    for name, text in (("prompt", prompt), ("id", str(id))):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
            raise ValueError(f"{name}: expected no lone surrogates; {error}") from error
    settings = {name: value[name] for name in SETTINGS if name in value}
    for name, setting in settings.items():
        kinds = (int, float) if SETTINGS[name] is float else (int,)
        if not isinstance(setting, kinds) or isinstance(setting, bool):
            kind = "number" if SETTINGS[name] is float else "whole number"
            raise ValueError(f"{name}: expected a {kind}; got {setting!r}")
    return Line(number, id, prompt, settings)


def resume(path: Path) -> tuple[dict[str | int, bool], int]:
    """Returns whether each result of a file is an error, by id, and the offset of a partial last
    line.

    Raises:
        ValueError: the file contains something other than results.
    """
    failed = {}

    def take(record: Any) -> None:
        if record.keys() - {"error"} != _RESULT_KEYS:
            raise ValueError
        failed[record["id"]] = "error" in record

    end = json_lines.resume(path, take, _is_begun)
    return failed, end


def _is_begun(raw: bytes) -> bool:
    """Returns whether a line without a line end can be the beginning of a result."""
    text = raw.decode(errors="ignore")
    if len(text) <= len(_BEGIN) or not text.startswith(_BEGIN):
        return _BEGIN.startswith(text)
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(_BEGIN))
    except ValueError:
        return text[len(_BEGIN)] in '"-'  # a truncated id
    rest = text[end:]
    if len(rest) <= len(_THEN) or not rest.startswith(_THEN):
        return _THEN.startswith(rest)
    try:
        return json.loads(text).keys() - {"error"} == _RESULT_KEYS
    except ValueError:
        return True


def result_line(line: Line, result: Result, tokenizer: Tokenizer) -> str:
    record = {
        "id": line.id,
        "text": tokenizer.decode(result.tokens, continues=True),
        "num_new_tokens": len(result.tokens),
        "finish_reason": result.finish_reason,
    }
    if result.error is not None:
        record["error"] = result.error
    return json.dumps(record, ensure_ascii=False) + "\n"
