"""The `llama2` command: generate, chat, serve-offline, demo, pretrain, convert, tradeoff."""

import argparse
import io
import os
import shlex
import sys
from pathlib import Path

import torch

from llama2 import checkpoint, convert_command, serve_command
from llama2.chat import chat
from llama2.checkpoint import SHIPPED
from llama2.generate import Generator
from llama2.kv_cache import CACHE_DTYPES
from llama2.model import Llama2
from llama2.placement import add_device_option, add_options, place
from llama2.text import require_utf8, stop_ids, stream_text
from llama2.tokenizer import Tokenizer, check_fits
from llama2.tradeoff import command as tradeoff_command
from llama2.train import command as pretrain_command

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a user can cause. Anything else is a defect and keeps its traceback.
_COMPLAINTS = (
    OSError,
    ValueError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    torch.OutOfMemoryError,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's.

    Returns:
        The exit status: 0; 1 if the demo's backends differ; 2 after a one-line complaint on stderr
        about what the user gave; 130 after Ctrl-C.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
            output.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    arguments.command_line = shlex.join(["llama2", *argv])
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except _COMPLAINTS as error:
        print(f"llama2: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _generate(arguments: argparse.Namespace) -> int:
    prompts = [require_utf8("--prompt", prompt) for prompt in arguments.prompt or ()]
    if arguments.prompt_file is not None:
        prompts.append(_read_prompt(arguments.prompt_file))
    if not prompts:
        raise ValueError("generate: expected --prompt TEXT or --prompt-file FILE; got neither")
    model, tokenizer = _load(arguments)
    generator = Generator(model, cache_dtype=CACHE_DTYPES[arguments.kv_cache_dtype])
    settings = _settings(arguments)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if len(prompts) == 1:
        pieces = stream_text(generator, tokenizer, encoded[0], **settings)
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    continuations = generator.generate(encoded, stop_ids=stop_ids(tokenizer), **settings)
    for number, (prompt, new) in enumerate(zip(encoded, continuations, strict=True), 1):
        print(f"--- prompt {number} of {len(prompts)}")
        print(tokenizer.decode(prompt + new))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    system = arguments.system and require_utf8("--system", arguments.system)
    model, tokenizer = _load(arguments)
    if arguments.checkpoint == SHIPPED:
        print(
            "note: the shipped model continues Python source; it was never taught to answer",
            file=sys.stderr,
        )
    generator = Generator(model, cache_dtype=CACHE_DTYPES[arguments.kv_cache_dtype])
    chat(generator, tokenizer, system=system, **_settings(arguments))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from llama2 import demo  # needs tqdm, whose absence is a complaint like any other

    return demo.run(SHIPPED, arguments.device)


def _load(arguments: argparse.Namespace) -> tuple[Llama2, Tokenizer]:
    placement = place(arguments.backend, arguments.device)
    if arguments.backend == "auto" or placement.interpreted:
        placement.announce()
    dtype = arguments.dtype and _DTYPES[arguments.dtype]
    model = checkpoint.load(
        arguments.checkpoint, placement.ops, dtype=dtype, device=placement.device
    )
    tokenizer = Tokenizer(arguments.checkpoint / "tokenizer.model")
    check_fits(tokenizer, model.config.vocab_size, arguments.checkpoint)
    return model, tokenizer


def _settings(arguments: argparse.Namespace) -> dict[str, float | int | None]:
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


def _read_prompt(name: str) -> str:
    if name == "-":
        return require_utf8("--prompt-file", sys.stdin.read())
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: expected UTF-8 in {name}; {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama2", description="Llama 2 on plain PyTorch or on Triton kernels."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="continue a text")
    _add_model_options(command, max_new_tokens=128)
    command.add_argument(
        "--prompt", action="append", metavar="TEXT", help="give it again for a batch"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text; - is stdin")
    command.set_defaults(run=_generate)

    command = commands.add_parser("chat", help="converse with a chat model")
    _add_model_options(command, max_new_tokens=512)
    command.add_argument("--system", metavar="TEXT", help="instructions for the conversation")
    command.set_defaults(run=_chat)

    command = commands.add_parser("serve-offline", help="continue a file of prompts")
    _add_model_options(command, max_new_tokens=128)
    serve_command.add_arguments(command)
    command.set_defaults(run=lambda arguments: serve_command.run(arguments, _load))

    command = commands.add_parser("demo", help="both backends side by side on the shipped model")
    add_device_option(command)
    command.set_defaults(run=_demo)

    command = commands.add_parser("pretrain", help="train a model from scratch or go on with one")
    pretrain_command.add_arguments(command)
    command.set_defaults(run=pretrain_command.run)

    command = commands.add_parser("convert", help="a checkpoint with fewer key/value heads")
    convert_command.add_arguments(command)
    command.set_defaults(run=convert_command.run)

    command = commands.add_parser("tradeoff", help="what each number of key/value heads costs")
    tradeoff_command.add_arguments(command)
    command.set_defaults(run=tradeoff_command.run)
    return parser


def _add_model_options(command: argparse.ArgumentParser, max_new_tokens: int) -> None:
    add = command.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=SHIPPED,
        metavar="DIR",
        help="Hugging Face's or Meta's files with tokenizer.model; default: a small model of "
        "Python source that comes with this package",
    )
    add_options(command)
    add("--dtype", choices=_DTYPES, help="default: the checkpoint's")
    add(
        "--kv-cache-dtype",
        choices=CACHE_DTYPES,
        default="auto",
        help="of the key/value cache: auto, the default, is the model's; fp8 and int8 round, in "
        "half the memory of 16 bits",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="default: %(default)s",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="default: 0, the likeliest token",
    )
    add("--top-p", type=float, default=1.0, metavar="P", help="default: 1, no cut")
    add("--seed", type=int, metavar="N", help="default: another one every time")


if __name__ == "__main__":
    sys.exit(main())
