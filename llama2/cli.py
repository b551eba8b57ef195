"""The `llama2` command: generate, chat, serve-offline, demo, pretrain, convert, tradeoff."""

import argparse
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable

import torch

from gqa_kernels import __version__
from llama2.commands import (
    chat,
    convert,
    generate,
    pretrain_options,
    serve_offline,
    tradeoff_options,
)
from llama2.placement import add_device_option

Run = Callable[[argparse.Namespace], int]

_EXAMPLES = """examples:
  llama2 generate --prompt "def main():" --max-new-tokens 64
  llama2 chat --checkpoint DIR --temperature 0.6 --top-p 0.9
  llama2 serve-offline --prompts prompts.jsonl --out results.jsonl --max-batch 64
  llama2 pretrain --work build/run --out build/model --steps 2000 --warmup-steps 100 --text DIR
  llama2 convert Llama-2-7b-hf Llama-2-7b-gqa8 --num-kv-heads 8
  llama2 tradeoff --preset none --out build/paper --shape 70B --gpu H100
"""
# What a user can cause. Anything else is a defect and keeps its traceback.
_COMPLAINTS = (
    OSError,
    ValueError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    MemoryError,
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
        return _complain(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # as a CPU says it
            raise
        return _complain(error)


def _complain(error: Exception) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | RuntimeError) and "memory" in text.lower():
        text = (
            "expected memory for this call; a smaller batch, fewer new tokens, --dtype bfloat16 or "
            f"--kv-cache-dtype fp8 take less, where the command has them. {text}"
        )
    print(f"llama2: {text}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama2",
        description="Llama 2 on plain PyTorch or on Triton kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, help_line, add_arguments, run in (
        ("generate", "continue a text", generate.add_arguments, generate.run),
        ("chat", "converse with a chat model", chat.add_arguments, chat.run),
        (
            "serve-offline",
            "continue a file of prompts",
            serve_offline.add_arguments,
            serve_offline.run,
        ),
        (
            "demo",
            "both backends side by side on the shipped model",
            add_device_option,
            _on_request("demo", "models"),
        ),
        (
            "pretrain",
            "train a model from scratch or go on with one",
            pretrain_options.add_arguments,
            _on_request("pretrain", "models"),
        ),
        (
            "convert",
            "a checkpoint with fewer key/value heads",
            convert.add_arguments,
            convert.run,
        ),
        (
            "tradeoff",
            "what each number of key/value heads costs",
            tradeoff_options.add_arguments,
            _on_request("tradeoff", "tradeoff"),
        ),
    ):
        command = commands.add_parser(name, help=help_line)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _on_request(name: str, extra: str) -> Run:
    """`run` of a command whose module is imported only now: it needs packages of an extra."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            module = importlib.import_module(f"llama2.commands.{name}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("llama2", "gqa_kernels"):
                raise
            raise ImportError(
                f"llama2 {name} needs {error.name}: pip install gqa-kernels[{extra}]"
            ) from error
        return module.run(arguments)

    return run


if __name__ == "__main__":
    sys.exit(main())
