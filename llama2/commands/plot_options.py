"""The options of `llama2 plot`."""

import argparse

from llama2.commands.options import path

SUFFIXES = (".svg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        type=path,
        nargs="+",
        metavar="RUN",
        help="the --work directory of a training run, finished or still running; several runs are "
        "drawn in one figure",
    )
    add(
        "--out",
        type=path,
        metavar="FILE",
        help="the figure, .svg or .png; default: log.svg in the first RUN",
    )
