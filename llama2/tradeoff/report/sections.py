"""The sections of the page: what each shows, and the sentences that hold it together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure as Drawing

from llama2.reporting import drawing
from llama2.reporting.document import Block, Figure, Heading, Items, Paragraph, Sentence, Tag
from llama2.tradeoff.report import (
    deployment_plots,
    deployment_tables,
    detail_tables,
    findings,
    plots,
    tables,
)
from llama2.tradeoff.report.deployment_tables import Question
from llama2.tradeoff.study import runs


def _figure(name: str, draw: Callable[[], Drawing], caption: str, *tags: Tag) -> Figure:
    return Figure(name, drawing.svg(draw), caption, tags)


def pareto(results: dict[str, Any], question: Question) -> Iterator[Block]:
    yield Heading("Quality against speed")
    speeds = plots.relative_speeds(results, question)
    if not plots.pareto_panels(results, speeds):
        yield Paragraph(
            [
                Sentence(
                    "No plot: it needs fewer heads that were trained, whose share the deployment "
                    "can have, and a batch at which MHA can be its measure."
                )
            ]
        )
        return
    yield _figure(
        "pareto",
        lambda: plots.pareto(results, question),
        "Up is worse, right is faster. Height: bits per byte more than MHA's, of the study's small "
        "models, with the 95 % interval over seeds where there is one. Across: decode speed of "
        f"{question.shape_name} with the same share of key/value heads on "
        f"{question.gpus_name}, over the same shape with MHA, at a context of "
        f"{question.context:,} and {question.batch_name}, whether or not it fits. The shape need "
        "not lose what the small models lose. Points of equal speed are drawn a little apart.",
        "measured",
        "computed",
    )


def quality(results: dict[str, Any]) -> Iterator[Block]:
    yield Heading("Quality from scratch")
    yield Paragraph(list(findings.setting(results)))
    chance = findings.chance(results)
    yield Paragraph([findings.noise(results), *([chance] if chance else [])])
    yield from _items(findings.from_scratch(results))
    yield tables.scratch_table(results)
    yield from _present(detail_tables.file_table(results))


def conversion(results: dict[str, Any]) -> Iterator[Block]:
    if not runs.methods(results):
        return
    yield Heading("Quality by conversion")
    yield from _items(findings.by_conversion(results))
    yield _figure(
        "conversion",
        lambda: plots.conversion(results),
        "Bits per byte of converted models against α, the steps trained afterwards as a share of "
        "the base's. Lines: means over seeds; bands: lowest to highest seed.",
        "measured",
    )
    yield tables.conversion_table(results)
    yield from _present(tables.gap_table(results))


def recall(results: dict[str, Any]) -> Iterator[Block]:
    if not runs.tasks(results):
        return
    yield Heading("Recall")
    yield Paragraph(
        [
            Sentence(
                "Bits per byte of text hide how much a model can look up: these tasks need the "
                "keys and values."
            )
        ]
    )
    yield from _items(findings.recall(results))
    yield _figure(
        "recall",
        lambda: plots.recall(results),
        "Per cent of tokens right against the number of key/value heads, with the 95 % interval "
        "over seeds where there is one.",
        "measured",
    )
    yield from (detail_tables.recall_table(results, task) for task in runs.tasks(results))


def speed(question: Question, rows: list[dict[str, Any]]) -> Iterator[Block]:
    yield Heading("Speed")
    yield _figure(
        "speed",
        lambda: deployment_plots.speed(question),
        f"Decoding {question.shape_name} on {question.gpus_name}: an upper bound from the "
        "data sheet. Markers: from here on, a step reads more keys and values than weights. Bars: "
        "the end of memory."
        + (f" Lines of fewer than {question.tp} heads lie on each other." * (question.tp > 1)),
        "computed",
    )
    yield deployment_tables.speed_table(question)
    yield deployment_tables.shapes_table(question)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        yield from _measured([row for row in rows if row["shape"] == shape], question.context)
    if not rows:
        yield Paragraph([Sentence("No speed was measured.")])


def _measured(rows: list[dict[str, Any]], context: int) -> Iterator[Block]:
    """Of one shape."""
    if any(row["tag"] == "measured" for row in rows):
        yield _figure(
            f"measured-{rows[0]['shape']}",
            lambda: deployment_plots.measured(rows, context),
            f"A decode step of the {rows[0]['shape']} shape on {rows[0]['gpu']}: medians with the "
            "20th and 80th percentiles, and the floor, from rates measured in the same run, as per "
            "cent of the time. Not scaled to a whole model.",
            "measured",
        )
    yield deployment_tables.measured_table(rows)


def memory(question: Question) -> Iterator[Block]:
    yield Heading("Memory")
    yield _figure(
        "memory",
        lambda: deployment_plots.memory(question),
        f"Memory of a GPU that decodes {question.shape_name} with tp = {question.tp}: "
        "weights, reserve, and the keys and values of the batch.",
        "computed",
    )
    yield deployment_tables.memory_table(question)


def _items(sentences: Sequence[Sentence]) -> Iterator[Block]:
    if sentences:
        yield Items(sentences)


def _present(*blocks: Block | None) -> Iterable[Block]:
    return (block for block in blocks if block is not None)
