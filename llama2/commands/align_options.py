"""The options of `llama2 align`."""

import argparse

from llama2.align.recipe import PRESETS
from llama2.commands.options import integer, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="cpu",
        help="cpu: less than 20 minutes on two cores; smoke: a minute, in which every stage runs "
        "and nothing is learnt; default: %(default)s",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="page, results and plots, and in a folder of each seed models, data and log; what is "
        "there is not done again",
    )
    add(
        "--seeds",
        type=integer,
        nargs="+",
        metavar="N",
        help="each has a chain of its own, all of them side by side; default: the preset's",
    )
