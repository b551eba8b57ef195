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
        help="cpu: less than 20 minutes on two cores; smoke: a minute, runs every stage without "
        "learning anything; default: %(default)s",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="directory for the page, results and plots, and for each seed's models, data and log; "
        "finished stages are not repeated",
    )
    add(
        "--seeds",
        type=integer,
        nargs="+",
        metavar="N",
        help="run a chain of stages for each seed, in parallel; default: the preset's seeds",
    )
