"""The options that say which care is taken of texts before a model is trained on them."""

import argparse
import math

from llama2.train.near_duplicates import LEAST_THRESHOLD, THRESHOLD

_REGION = "US"  # where --redact is given without one


def add_care_options(group: argparse._ArgumentGroup) -> None:
    """The options `exclude`, `redact` and `drop_near_duplicates`, which `Care` takes in this order.

    None of the last two is given as None; they need the packages of the extra `data`.
    """
    add = group.add_argument
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what a shell pattern matches, of documents' paths in their source and of "
        "sources' names, such as '*.md', 'private/*'; repeatable",
    )
    add(
        "--redact",
        nargs="?",
        const=_REGION,
        metavar="REGION",
        help="put <EMAIL_ADDRESS>, <PHONE_NUMBER> and <IP_ADDRESS> in the place of these; "
        f"national telephone numbers are those of REGION, by default {_REGION}",
    )
    add(
        "--drop-near-duplicates",
        nargs="?",
        type=_similarity,
        const=THRESHOLD,
        metavar="THRESHOLD",
        help="leave out texts that share this part of their five-word sequences with an earlier "
        f"one, by Jaccard's measure; by default {THRESHOLD}",
    )


def _similarity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_THRESHOLD <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"expected a number from {LEAST_THRESHOLD} to 1; got {text!r:.60}"
        )
    return value
