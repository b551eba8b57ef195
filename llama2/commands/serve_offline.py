"""The command `llama2 serve-offline`: continues a file of prompts by continuous batching."""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.checkpoint.files import require
from llama2.commands.caches import add_cache_options, make_cache
from llama2.commands.json_lines import Complaints, lock_output
from llama2.commands.offline_files import SETTINGS, Line, read_prompts, result_line, resume
from llama2.commands.options import add_generation_options, integer, load
from llama2.commands.text import encode_prompt
from llama2.model import Llama2
from llama2.requests import Request, check_request, seed_of
from llama2.serving import DEFAULT_PREFILL_BUDGET, serve
from llama2.stops import stop_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_generation_options(parser, max_new_tokens=128)
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines {"prompt": TEXT, "id": …}; a line may set max_new_tokens, temperature, '
        "top_p and seed, which override the options; the default id is the line's number",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines {"id": …, "text": …, "num_new_tokens": …, "finish_reason": "stop", '
        '"length" or "error"}, in the order in which they finish; "error" gives the reason. '
        "Prompts whose ids the file already has are skipped. - is stdout; stdout and pipes cannot "
        "be resumed",
    )
    add_cache_options(parser)
    add(
        "--prefill-budget",
        type=integer,
        default=DEFAULT_PREFILL_BUDGET,
        metavar="N",
        help="most prompt tokens computed between two tokens of a running prompt; 0: no limit; "
        f"default: {DEFAULT_PREFILL_BUDGET}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Continues each prompt of a file and writes each result when it is finished.

    A killed run leaves whole lines and at most one partial line; the next run cuts the partial line
    off and continues the missing prompts. A bad line is reported with its number and skipped.

    Returns:
        0; 1 if a line was bad or ended in an error, in this run or an earlier one.
    Raises:
        OSError, ValueError, ImportError, FloatingPointError: about a file, an option or the model.
    """
    prompts, out = arguments.prompts, arguments.out
    if out.exists() and prompts.samefile(out):
        raise ValueError(f"--out: expected a file other than --prompts; got {out}")
    complaints = Complaints()
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
        f"{num_done} prompts done, {len(before)} were done before, {complaints.count} bad lines",
        file=sys.stderr,
    )
    if any(before):
        print(
            f"{sum(before)} of those that were done before are errors: remove their lines from "
            f"{out} to run them again",
            file=sys.stderr,
        )
    return 1 if complaints.count or any(before) else 0


def is_stdout(out: Path) -> bool:
    return str(out) == "-"


def _utf8_stdout() -> TextIO:
    """Returns stdout set to UTF-8, the encoding of JSON, whatever the terminal's is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdout


def _is_stream(out: Path) -> bool:
    """Returns whether the output cannot be read back: stdout, a pipe or a device."""
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
    """Appends the missing results to the file. Returns their number, and what the file had
    before."""
    with arguments.out.open("a", encoding="utf-8") as file:
        lock_output(file)
        done, end = resume(arguments.out)  # again: another run may have ended since
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
    """Cuts a file at `end`, appends the results of `todo` and returns their number."""
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
    lengths = [
        len(encoded[line.number]) + line.settings.get("max_new_tokens", arguments.max_new_tokens)
        for line in lines
        if line.number in encoded
    ]
    cache = make_cache(arguments, model, lengths)
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
                complaints.add(
                    arguments.prompts,
                    line.number,
                    ValueError(str(error).replace("prompts[0]", "prompt")),
                )
                progress.update()
                continue
            served.append(line)
            yield request

    with tqdm(total=len(todo), unit="prompt", disable=None) as progress:
        results = serve(
            model,
            requests(),
            cache=cache,
            vocab_size=tokenizer.vocab_size,
            prefill_budget=arguments.prefill_budget,
        )
        for result in results:
            line = served[result.index]
            if result.error is not None:
                progress.clear()
                complaints.add(arguments.prompts, line.number, ValueError(result.error))
            file.write(result_line(line, result, tokenizer))
            file.flush()
            progress.update()
    return len(served)


def _check_options(arguments: argparse.Namespace, model: Llama2, cache: PagedKVCache) -> None:
    """Checks the options once, so that a wrong one is not reported for every line."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "seed")}
    check_request(model, cache, Request([0], min(arguments.max_new_tokens, 1), **sampling))


def _request(
    line: Line, prompt: list[int], stops: list[int], arguments: argparse.Namespace
) -> Request:
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in SETTINGS}
    settings["seed"] = seed_of(settings["seed"], line.number)
    settings |= line.settings
    return Request(prompt, stop_ids=stops, **settings)
