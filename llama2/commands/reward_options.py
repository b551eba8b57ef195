"""The options of `llama2 reward`."""

import argparse
from pathlib import Path

from llama2.commands.training_options import add_folders, add_lines, add_machine, add_recipe
from llama2.rlhf.comparisons import MARGINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, work="")
    add = parser.add_argument
    add(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="a chat model, which gets a new head, or a reward model to train further; default: "
        "the small chat model that comes with this package",
    )
    add_lines(
        parser.add_argument_group("data"),
        form='{"prompt": …, "chosen": …, "rejected": …, "rating": …}',
        bad="are not comparisons, are too long, or lack the rating that --margins needs",
        held_out="comparisons",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--epochs",
        type=float,
        default=1.0,
        metavar="X",
        help="passes over the data; default: 1",
    )
    recipe.add_argument(
        "--margins",
        choices=MARGINS,
        help="the loss's margin between the scores of a pair, by its rating: small 1, 2/3, 1/3, 0; "
        "large 3, 2, 1, 0; default: small if every line has a rating, otherwise none",
    )
    sizes = {"text": "prompt and answer", "batch_size": 512}
    add_recipe(recipe, row="pair", **sizes, peak_lr=1e-5, warmup_steps=None, save_every=100)
    add_machine(parser.add_argument_group("machine"))
