"""The command `llama2 serve-offline`: a file of prompts continued by continuous batching."""

import argparse
import contextlib
import fcntl
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llama2.accounting import kv_bytes_per_token
from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.checkpoint.files import require
from llama2.commands.offline_files import (
    SETTINGS,
    Complaints,
    Line,
    read_prompts,
    result_line,
    resume,
)
from llama2.commands.options import add_generation_options, load
from llama2.commands.text import encode_prompt, stop_ids
from llama2.model import Llama2
from llama2.placement import free_bytes
from llama2.serving import Request, check_request, serve


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
        help='JSON lines {"id": …, "text": …, "num_new_tokens": …, "finish_reason": "stop", '
        '"length" or "error"}, with an "error" that says why, as they finish; ids that are there '
        "already are not done again. - is stdout, where nothing is resumed, as in a pipe",
    )
    add("--max-batch", type=int, default=16, metavar="N", help="prompts at once; default: 16")
    add("--page-size", type=int, default=16, metavar="N", help="tokens of a page; default: 16")
    add(
        "--num-pages",
        type=int,
        metavar="N",
        help="of the key/value cache; default: as many as --max-batch of the prompts at hand can "
        "fill, and fit in half of the free memory. With fewer, prompts wait for each other",
    )


def run(arguments: argparse.Namespace) -> int:
    """Continues each prompt of a file and writes results as they finish.

    A killed run leaves whole lines and at most a part of one: the next run cuts that and does what
    is missing. A bad line is reported with its number and left out.

    Returns:
        0; 1 if a line was bad or ended in an error, in an earlier run too.
    Raises:
        OSError, ValueError, ImportError, FloatingPointError: about a file, an option or the model.
    """
    prompts, out = arguments.prompts, arguments.out
    if out.exists() and prompts.samefile(out):
        raise ValueError(f"--out: expected another file than --prompts; got {out}")
    complaints = Complaints(prompts)
    lines = list(read_prompts(prompts, complaints))
    num_done, done = 0, {}
    if _is_stream(out):
        file = _utf8_stdout() if is_stdout(out) else out.open("w", encoding="utf-8")
        if lines:
            with contextlib.nullcontext() if file is sys.stdout else file:
                num_done = _continue(lines, lines, file, arguments, complaints)
    else:
        done, _ = resume(out)
        if any(line.id not in done for line in lines):
            num_done, done = _go_on(lines, arguments, complaints)
    before = [done[line.id] for line in lines if line.id in done]
    print(
        f"{num_done} prompts done, {len(before)} were done before, {complaints.count} lines are "
        "bad",
        file=sys.stderr,
    )
    if any(before):
        print(
            f"{sum(before)} of those that were done before are errors: without their lines in "
            f"{out} they are done again",
            file=sys.stderr,
        )
    return 1 if complaints.count or any(before) else 0


def is_stdout(out: Path) -> bool:
    return str(out) == "-"


def _utf8_stdout() -> TextIO:
    """Results are JSON, which is UTF-8 whatever the terminal shows."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdout


def _is_stream(out: Path) -> bool:
    """Whether what is written there cannot be read again: stdout, a pipe, a device."""
    if is_stdout(out):
        return True
    if not out.exists() or out.is_file():
        return False
    if out.is_dir():
        raise IsADirectoryError(f"--out: expected a file; got a directory, {out}")
    return True


def _go_on(
    lines: list[Line], arguments: argparse.Namespace, complaints: Complaints
) -> tuple[int, dict[str | int, bool]]:
    """Adds what is missing to the file. Returns how many it did, and what was there."""
    with arguments.out.open("a", encoding="utf-8") as file:
        _lock(file)
        done, end = resume(arguments.out)  # another run may have ended just now
        todo = [line for line in lines if line.id not in done]
        num_done = _continue(todo, lines, file, arguments, complaints, end=end)
    return num_done, done


def _continue(
    todo: list[Line],
    lines: list[Line],
    file: TextIO,
    arguments: argparse.Namespace,
    complaints: Complaints,
    *,
    end: int | None = None,
) -> int:
    """Writes the results of `todo` to a file, which is cut at `end` first. Returns their number."""
    tqdm = require("tqdm").tqdm
    model, tokenizer = load(arguments)
    stops = stop_ids(tokenizer, arguments.checkpoint)
    encoded: dict[int, list[int]] = {}
    refused: dict[int, ValueError] = {}
    for line in lines:
        try:
            encoded[line.number] = encode_prompt(tokenizer, line.prompt, model.config.max_seq_len)
        except ValueError as error:
            refused[line.number] = ValueError(f"prompt: {error}")
    fitting = [line for line in lines if line.number in encoded]
    cache = _make_cache(arguments, model, fitting, encoded)
    _check_options(arguments, model, cache)
    if end is not None:
        file.truncate(end)
    served: list[Line] = []  # by the index of their request

    def requests() -> Iterator[Request]:
        for line in todo:
            try:
                if line.number in refused:
                    raise refused[line.number]
                request = _request(line, encoded[line.number], stops, arguments)
                check_request(model, cache, request)
            except ValueError as error:
                progress.clear()
                complaints.add(line.number, ValueError(str(error).replace("prompts[0]", "prompt")))
                progress.update()
                continue
            served.append(line)
            yield request

    with tqdm(total=len(todo), unit="prompt", disable=None) as progress:
        results = serve(model, requests(), cache=cache, vocab_size=tokenizer.vocab_size)
        for result in results:
            line = served[result.index]
            if result.error is not None:
                progress.clear()
                complaints.add(line.number, ValueError(result.error))
            file.write(result_line(line, result, tokenizer))
            file.flush()
            progress.update()
    return len(served)


def _lock(file: TextIO) -> None:
    """For as long as the file is open: two runs would both do what is missing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--out: expected a file that no other run writes to; got {file.name}"
        ) from error


def _make_cache(
    arguments: argparse.Namespace,
    model: Llama2,
    lines: list[Line],
    encoded: dict[int, list[int]],
) -> PagedKVCache:
    weight, config = model.lm_head.weight, model.cache_config
    dtype = CACHE_DTYPES[arguments.kv_cache_dtype] or weight.dtype
    num_pages, page_size = arguments.num_pages, max(arguments.page_size, 1)
    page_bytes = kv_bytes_per_token(config, dtype.itemsize) * page_size
    free = free_bytes(weight.device)
    if num_pages is None:
        longest = sorted(
            min(
                len(encoded[line.number])
                + line.settings.get("max_new_tokens", arguments.max_new_tokens),
                config.max_seq_len,
            )
            for line in lines
        )
        wanted = [math.ceil(max(length, 1) / page_size) for length in longest]
        wanted = wanted[-max(arguments.max_batch, 1) :]
        fitting = int(free / 2 / page_bytes)
        if fitting < 1:
            raise ValueError(
                f"--num-pages: expected memory for a page of {page_bytes:,} bytes; got none. A "
                "smaller --page-size or --kv-cache-dtype fp8 takes less"
            )
        num_pages = min(max(sum(wanted), 1), fitting)
    elif num_pages * page_bytes > free:
        raise ValueError(
            f"--num-pages: expected at most {free // page_bytes:,} pages of {page_bytes:,} bytes, "
            f"the free memory's; got {num_pages:,}"
        )
    return PagedKVCache(
        config,
        num_pages=num_pages,
        page_size=arguments.page_size,
        # A prompt at work has a page, so that more rows would stay empty.
        max_batch=min(arguments.max_batch, max(len(lines), 1), max(num_pages, 1)),
        dtype=dtype,
        device=weight.device,
    )


def _check_options(arguments: argparse.Namespace, model: Llama2, cache: PagedKVCache) -> None:
    """A wrong option is one complaint, not one about every line."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    check_request(model, cache, Request([0], min(arguments.max_new_tokens, 1), **sampling))


def _request(
    line: Line, prompt: list[int], stops: list[int], arguments: argparse.Namespace
) -> Request:
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in SETTINGS}
    if settings["seed"] is not None:
        # Apart for lines with one prompt, and the same in a run that is resumed.
        sequence = np.random.SeedSequence((settings["seed"], line.number))
        settings["seed"] = int(sequence.generate_state(1, np.uint64)[0])
    settings |= line.settings
    return Request(prompt, stop_ids=stops, **settings)
