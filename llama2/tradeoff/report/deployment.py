"""The sections on speed and memory, and the published tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from llama2.reporting.document import (
    Block,
    Figures,
    Heading,
    Markup,
    Paragraph,
    Sentence,
)
from llama2.tradeoff import published
from llama2.tradeoff.question import Question
from llama2.tradeoff.report import deployment_plots, deployment_tables
from llama2.tradeoff.report.figures import figure
from llama2.tradeoff.report.wording import FIXED_SETTING


def curves(question: Question) -> Iterator[Block]:
    """Yields the plots of speed and memory, which page.js redraws for other settings."""
    yield Heading("Speed and memory")
    yield Markup('<p id="legend"></p>')
    yield Figures(
        [
            figure(
                "speed-batch",
                lambda: deployment_plots.speed_by_batch(question),
                "An upper bound. From a dot on, a step reads more keys and values than weights; a "
                "line ends where memory does. Lines of fewer heads than GPUs lie on each other.",
                "predicted",
            ),
            figure(
                "speed-context",
                lambda: deployment_plots.speed_by_context(question),
                "The same against the context.",
                "predicted",
            ),
            figure(
                "memory",
                lambda: deployment_plots.memory(question),
                "Weights, reserve, and the keys and values of the batch, against the memory that "
                "there is.",
                "predicted",
            ),
        ]
    )


def tables(question: Question, rows: list[dict[str, Any]]) -> Iterator[Block]:
    yield Heading("Other shapes and several GPUs")
    yield Paragraph([Sentence(FIXED_SETTING)])
    yield deployment_tables.shapes_table(question)
    yield deployment_tables.memory_table(question)
    if rows:
        yield Heading("Measured speed")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        yield from _measured([row for row in rows if row["shape"] == shape], question.context)


def _measured(rows: Sequence[dict[str, Any]], context: int) -> Iterator[Block]:
    """Yields the plot and the table of the measured rows of one shape."""
    if any(row["tag"] == "measured" for row in rows):
        yield figure(
            f"measured-{rows[0]['shape']}",
            lambda: deployment_plots.measured(rows, context),
            f"A decode step of layers of the {rows[0]['shape']} shape on {rows[0]['gpu']}: medians "
            "with the 20th and 80th percentiles. Not scaled to a whole model.",
            "measured",
        )
    yield deployment_tables.measured_table(rows)


def publications() -> Iterator[Block]:
    yield Heading("Published tables")
    yield Paragraph([Sentence("Other models, data and machines than those of this page.")])
    yield from map(deployment_tables.published_table, published.TABLES)
