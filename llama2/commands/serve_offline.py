"""The command `llama2 serve-offline`: a file of prompts continued by continuous batching."""

import argparse
import fcntl
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.commands.options import add_generation_options, load
from llama2.commands.text import stop_ids
from llama2.model import Llama2
from llama2.serving import Request, Result, check_request, serve
from llama2.tokenizer import StreamDecoder, Tokenizer

_SETTINGS = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
_BEGIN = '{"id": '  # of every line that `run` writes


@dataclass(frozen=True)
class _Line:
    number: int
    id: str | int
    prompt: str
    settings: dict[str, float | int]  # those that it has of _SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add_generation_options(parser, max_new_tokens=128)
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines {"prompt": TEXT, "id": …}; max_new_tokens, temperature, top_p and seed '
        "beside them go before the options; an id that is left out is the line's number",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines {"id": …, "text": …, "num_new_tokens": …, "finish_reason": "stop" or '
        '"length"}, as they finish; ids that are there already are not done again',
    )
    add("--max-batch", type=int, default=16, metavar="N", help="prompts at once; default: 16")
    add("--page-size", type=int, default=16, metavar="N", help="tokens of a page; default: 16")
    add(
        "--num-pages",
        type=int,
        metavar="N",
        help="of the key/value cache; default: as many as --max-batch of the longest sequences "
        "fill. With fewer, prompts wait for each other",
    )


def run(arguments: argparse.Namespace) -> int:
    """Continues each prompt of a file and writes results as they finish.

    A killed run leaves whole lines and at most a part of one: the next run cuts that and does what
    is missing. A bad line is reported with its number and left out.

    Returns:
        0; 1 if a line was bad.
    Raises:
        OSError, ValueError, ImportError, FloatingPointError: about a file, an option or the model.
    """
    prompts, out = arguments.prompts, arguments.out
    if out.exists() and prompts.samefile(out):
        raise ValueError(f"--out: expected another file than --prompts; got {out}")
    complaints = _Complaints(prompts)
    lines = list(_read_prompts(prompts, complaints))
    num_done, num_before = 0, _count_done(lines, _resume(out)[0])
    if num_before < len(lines):
        num_done, num_before = _continue(lines, arguments, load, complaints)
    print(
        f"{num_done} prompts done, {num_before} were done before, {complaints.count} lines are bad",
        file=sys.stderr,
    )
    return 1 if complaints.count else 0


def _continue(
    lines: list[_Line],
    arguments: argparse.Namespace,
    load: Callable[[argparse.Namespace], tuple[Llama2, Tokenizer]],
    complaints: "_Complaints",
) -> tuple[int, int]:
    """Adds what is missing to the file. Returns how many it did, and how many were there."""
    from tqdm import tqdm  # whose absence is a complaint like any other

    with arguments.out.open("a", encoding="utf-8") as file:
        _lock(file)
        done, end = _resume(arguments.out)  # another run may have ended just now
        todo = [line for line in lines if line.id not in done]
        model, tokenizer = load(arguments)
        cache = _make_cache(arguments, model)
        _check_options(arguments, model, cache)
        file.truncate(end)
        served: list[_Line] = []  # by the index of their request

        def requests() -> Iterator[Request]:
            for line in todo:
                try:
                    request = _request(line, arguments, tokenizer)
                    check_request(model, cache, request)
                except ValueError as error:
                    progress.clear()
                    complaints.add(line.number, error)
                    progress.update()
                    continue
                served.append(line)
                yield request

        with tqdm(total=len(todo), unit="prompt", disable=None) as progress:
            for result in serve(model, requests(), cache=cache):
                file.write(_result_line(served[result.index], result, tokenizer))
                file.flush()
                progress.update()
    return len(served), _count_done(lines, done)


def _count_done(lines: list[_Line], done: set[str | int]) -> int:
    return sum(line.id in done for line in lines)


def _lock(file: TextIO) -> None:
    """For as long as the file is open: two runs would both do what is missing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--out: expected a file that no other run writes to; got {file.name}"
        ) from error


class _Complaints:
    """Says on stderr what is wrong with a line, and counts."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def add(self, number: int, error: Exception) -> None:
        self.count += 1
        print(f"{self.path}:{number}: {' '.join(str(error).split())}", file=sys.stderr)


def _read_prompts(path: Path, complaints: _Complaints) -> Iterator[_Line]:
    first: dict[str | int, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = _parse(number, raw)
                if line.id in first:
                    raise ValueError(
                        f"id: expected another than line {first[line.id]}'s; got {line.id!r}"
                    )
            except ValueError as error:
                complaints.add(number, error)
                continue
            first[line.id] = number
            yield line


def _parse(number: int, raw: bytes) -> _Line:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"line: expected a JSON object; got a {type(value).__name__}")
    known = {"prompt", "id", *_SETTINGS}
    if not value.keys() <= known:
        raise ValueError(f"line: expected the keys {sorted(known)}; got {sorted(value)}")
    prompt, id = value.get("prompt"), value.get("id", number)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt: expected a text; got {prompt!r}")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise ValueError(f"id: expected a text or a whole number; got {id!r}")
    for name, text in (("prompt", prompt), ("id", str(id))):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half a character
            raise ValueError(f"{name}: expected whole characters; {error}") from error
    settings = {name: value[name] for name in _SETTINGS if name in value}
    for name, setting in settings.items():
        kinds = (int, float) if _SETTINGS[name] is float else (int,)
        if not isinstance(setting, kinds) or isinstance(setting, bool):
            kind = "number" if _SETTINGS[name] is float else "whole number"
            raise ValueError(f"{name}: expected a {kind}; got {setting!r}")
    return _Line(number, id, prompt, settings)


def _resume(path: Path) -> tuple[set[str | int], int]:
    """The ids of the results that are there, and where a half-written last line begins.

    Raises:
        ValueError: the file holds something else than results.
    """
    if not path.exists():
        return set(), 0
    ids, end = set(), 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            begin = raw[: len(_BEGIN)]
            is_ours = _BEGIN.encode().startswith(begin)
            if is_ours and not raw.endswith(b"\n"):
                break
            try:
                ids.add(json.loads(raw)["id"])
            except (ValueError, TypeError, KeyError, RecursionError):
                is_ours = False
            if not is_ours:
                raise ValueError(
                    f"--out: expected results of this command; got something else in line "
                    f"{number} of {path}"
                )
            end += len(raw)
    return ids, end


def _make_cache(arguments: argparse.Namespace, model: Llama2) -> PagedKVCache:
    weight, config = model.lm_head.weight, model.cache_config
    num_pages = arguments.num_pages
    if num_pages is None:
        page_size = max(arguments.page_size, 1)  # what is not positive, the cache refuses
        num_pages = arguments.max_batch * math.ceil(config.max_seq_len / page_size)
    return PagedKVCache(
        config,
        num_pages=num_pages,
        page_size=arguments.page_size,
        max_batch=arguments.max_batch,
        dtype=CACHE_DTYPES[arguments.kv_cache_dtype] or weight.dtype,
        device=weight.device,
    )


def _check_options(arguments: argparse.Namespace, model: Llama2, cache: PagedKVCache) -> None:
    """A wrong option is one complaint, not one about every line."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    check_request(model, cache, Request([0], min(arguments.max_new_tokens, 1), **sampling))


def _request(line: _Line, arguments: argparse.Namespace, tokenizer: Tokenizer) -> Request:
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in _SETTINGS}
    if settings["seed"] is not None:
        # Apart for lines with one prompt, and the same in a run that is resumed.
        sequence = np.random.SeedSequence((settings["seed"], line.number))
        settings["seed"] = int(sequence.generate_state(1, np.uint64)[0])
    settings |= line.settings
    return Request(tokenizer.encode(line.prompt), stop_ids=stop_ids(tokenizer), **settings)


def _result_line(line: _Line, result: Result, tokenizer: Tokenizer) -> str:
    decoder = StreamDecoder(tokenizer)
    stopped = bool(result.tokens) and result.tokens[-1] in result.request.stop_ids
    record = {
        "id": line.id,
        "text": "".join([*map(decoder.push, result.tokens), decoder.finish()]),
        "num_new_tokens": len(result.tokens),
        "finish_reason": "stop" if stopped else "length",
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
