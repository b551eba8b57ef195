"""The options of `llama2 evaluate`."""

import argparse

from llama2.commands.options import DTYPES, integer, path
from llama2.placement import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        type=path,
        required=True,
        metavar="DIR",
        help="Hugging Face's or Meta's files with tokenizer.model",
    )
    add(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME,…",
        help="tasks, groups and tags of lm-eval or of --task-path; * stands for any characters",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="FILE",
        help="the results and what they were made with, as JSON",
    )
    add(
        "--task-path",
        type=path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of YAML tasks of your own; repeatable. Relative paths of data in them begin "
        "in the working directory",
    )
    add(
        "--num-fewshot", type=integer, metavar="N", help="examples in a prompt; default: the task's"
    )
    add("--limit", type=integer, metavar="N", help="questions of a task, for a try; default: all")
    add(
        "--apply-chat-template",
        action="store_true",
        help="ask in Llama 2's chat format, with examples as earlier turns",
    )
    add("--system-instruction", metavar="TEXT", help="what a prompt begins with")
    add("--batch-size", type=integer, default=16, metavar="N", help="default: %(default)s")
    add(
        "--max-length",
        type=integer,
        metavar="N",
        help="tokens that the model is given at once; default: the checkpoint's context length",
    )
    add_options(parser)
    add("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add(
        "--cache",
        type=path,
        metavar="DIR",
        help="a folder of your own where answers are kept, so that an interrupted evaluation goes "
        "on; those of other weights are told apart",
    )


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names of tasks; got {text!r}")
    return names
