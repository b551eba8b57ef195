"""The options of `llama2 sft`."""

import argparse
from pathlib import Path

from llama2.chat_format import FORMATS
from llama2.commands.care_options import add_care_options
from llama2.commands.training_options import add_folders, add_lines, add_machine, add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, work="")
    add = parser.add_argument
    add(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="the model to fine-tune; default: the small base model that comes with this package",
    )
    _add_data(parser.add_argument_group("data"))
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--epochs",
        type=float,
        default=2.0,
        metavar="X",
        help="passes over the data; default: 2",
    )
    add_recipe(recipe, row="row", batch_size=64, peak_lr=2e-5, warmup_steps=0, save_every=100)
    add_machine(parser.add_argument_group("machine"))


def _add_data(group: argparse._ArgumentGroup) -> None:
    add_lines(
        group,
        form='{"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "completion": …}',
        bad="are not dialogues or too long",
        held_out="dialogues",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="chat",
        help="how dialogues are written: chat: [INST] prompt [/INST] answer, as the released "
        "models expect; separator: a special token between prompt and answer, as the paper "
        "describes; default: chat",
    )
    add_care_options(group)
