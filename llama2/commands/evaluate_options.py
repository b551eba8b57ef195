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
        help="directory with Hugging Face's or Meta's files and tokenizer.model",
    )
    add(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME,…",
        help="tasks, groups and tags of lm-eval or of --task-path; * matches any characters",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="FILE",
        help="the results, with versions and settings, as JSON",
    )
    add(
        "--task-path",
        type=path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of your own YAML tasks; repeatable. Relative data paths in them start at "
        "the working directory",
    )
    add("--num-fewshot", type=integer, metavar="N", help="examples per prompt; default: the task's")
    add(
        "--limit",
        type=integer,
        metavar="N",
        help="questions per task, for a quick test; default: all",
    )
    add(
        "--apply-chat-template",
        action="store_true",
        help="write prompts in Llama 2's chat format, with examples as earlier turns",
    )
    add("--system-instruction", metavar="TEXT", help="text at the beginning of every prompt")
    add(
        "--batch-size",
        type=integer,
        default=16,
        metavar="N",
        help="sequences per call; default: %(default)s",
    )
    add(
        "--max-length",
        type=integer,
        metavar="N",
        help="the longest context in tokens; default: the checkpoint's context length",
    )
    add_options(parser)
    add("--dtype", choices=DTYPES, help="dtype of the weights; default: the checkpoint's")
    add(
        "--cache",
        type=path,
        metavar="DIR",
        help="a folder that keeps answers, so that an interrupted evaluation resumes; answers of "
        "other weights are kept apart",
    )


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names of tasks; got {text!r}")
    return names
