"""The command `llama2 generate`: streams the continuation of one prompt, or continues a batch."""

import argparse
import io
import re
import sys
from pathlib import Path

from llama2.commands.options import add_generation_options, load, make_generator, sampling
from llama2.commands.speculation import (
    add_speculation_options,
    check_options,
    report,
    speculation,
)
from llama2.commands.text import encode_prompt, require_utf8, stream_text
from llama2.generate import check_tokens
from llama2.stops import stop_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_generation_options(parser, max_new_tokens=128)
    add_speculation_options(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for a batch"
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="a UTF-8 text file to continue; - reads stdin"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints each prompt with its continuation and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `load`, `speculation` and
            `Generator.generate`; or there is no prompt, or one is not UTF-8.
    """
    prompts = [require_utf8("--prompt", prompt) for prompt in arguments.prompt or ()]
    if arguments.prompt_file is not None:
        prompts.append(_read_prompt(arguments.prompt_file))
    if not prompts:
        raise ValueError("generate: expected --prompt TEXT or --prompt-file FILE; got neither")
    check_options(arguments)
    model, tokenizer = load(arguments)
    drafter = speculation(arguments, tokenizer)
    generator = make_generator(arguments, model, tokenizer, drafter)
    settings = sampling(arguments)
    stops = stop_ids(tokenizer, arguments.checkpoint)
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_prompt(tokenizer, prompt, model.config.max_seq_len))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    try:
        check_tokens(model.config, encoded, settings["max_new_tokens"], ())
    except ValueError as error:
        text = re.sub(r"prompts\[(\d+)\]", lambda match: f"prompt {int(match[1]) + 1}", str(error))
        raise ValueError(text.replace("max_new_tokens", "--max-new-tokens")) from error
    if len(prompts) == 1:
        pieces = stream_text(generator, tokenizer, encoded[0], stops=stops, **settings)
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        report(generator)
        return 0
    continuations = generator.generate(encoded, stop_ids=stops, **settings)
    for number, (prompt, new) in enumerate(zip(encoded, continuations, strict=True), 1):
        print(f"--- prompt {number} of {len(prompts)}")
        print(tokenizer.decode(prompt + new))
    report(generator)
    return 0


def _read_prompt(name: str) -> str:
    if name == "-":
        if sys.stdin is None:
            raise ValueError("--prompt-file: expected an open stdin for -; got a closed one")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(newline="")  # line ends as they are
        return require_utf8("--prompt-file", sys.stdin.read())
    try:
        return Path(name).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: expected UTF-8 in {name}; {error}") from error
