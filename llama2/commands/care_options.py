"""The options for filtering and redacting texts before a model is trained on them."""

import argparse
import math

from llama2.train.near_duplicates import LEAST_THRESHOLD, THRESHOLD

_REGION = "US"  # of --redact without a REGION


def add_care_options(group: argparse._ArgumentGroup) -> None:
    """Adds `--exclude`, `--redact` and `--drop-near-duplicates`, the arguments of `Care` in order.

    The last two default to None and need the packages of the extra `data`.
    """
    add = group.add_argument
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out documents whose path in their source, or whose source's name, matches a "
        "shell pattern such as '*.md' or 'private/*'; repeatable",
    )
    add(
        "--redact",
        nargs="?",
        const=_REGION,
        metavar="REGION",
        help="replace e-mail addresses, telephone numbers and IP addresses by <EMAIL_ADDRESS>, "
        f"<PHONE_NUMBER> and <IP_ADDRESS>; REGION is the country of national telephone numbers; "
        f"off by default; without a value {_REGION}",
    )
    add(
        "--drop-near-duplicates",
        nargs="?",
        type=_similarity,
        const=THRESHOLD,
        metavar="THRESHOLD",
        help="leave out texts whose five-word sequences have at least this Jaccard similarity with "
        f"those of an earlier text; off by default; without a value {THRESHOLD}",
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
