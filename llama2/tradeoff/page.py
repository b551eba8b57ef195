"""The page: one HTML file, and the same in Markdown, of a study and of a deployment on paper."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2.config import PUBLISHED, ModelConfig
from llama2.tradeoff import (
    accounting,
    deployment_tables,
    detail_tables,
    findings,
    plots,
    published,
    runs,
    tables,
)
from llama2.tradeoff.deployment_tables import Question
from llama2.tradeoff.document import (
    Block,
    Code,
    Figure,
    Heading,
    Items,
    Paragraph,
    Sentence,
    to_html,
    to_markdown,
)
from llama2.tradeoff.recommend import Recommendation
from llama2.tradeoff.roofline import Gpu
from llama2.tradeoff.wording import heads_name, parameters_name

TITLE = "What fewer key/value heads cost and buy"


def write_page(
    results: dict[str, Any] | None,
    folder: Path,
    *,
    config: ModelConfig,
    gpu: Gpu,
    context: int,
    batch: int | None = None,
    tp: int = 1,
    recommendation: Recommendation | None = None,
    measured_rows: Sequence[dict[str, Any]] | None = None,
    command: str | None = None,
) -> Path:
    """Writes report.html (self-contained), report.md and the plots, *.svg, that the latter shows.

    Every number is tagged measured, computed or published. The same arguments give the same bytes.

    Args:
        results: of a study; None makes a page of computed speed and memory only.
        config, gpu, context, batch, tp: the deployment; a batch of None is the largest that fits.
        measured_rows: of `measured.measure_decode`.
        command: that makes this page, for its last section; the study's own is in its result.
    Returns:
        the path of report.html.
    Raises:
        ValueError: a result from which no honest page can be made (`runs.check`), measured rows
            with figures that are not finite, or a deployment that does not exist. Nothing is
            written.
    """
    if results is not None:
        runs.check(results)
    rows = list(measured_rows or ())
    deployment_tables.check_measured(rows)
    question = Question(config, gpu, context, batch, tp)
    blocks = list(_blocks(results, question, recommendation, rows, command))
    written = {"report.html": to_html(TITLE, blocks), "report.md": to_markdown(TITLE, blocks)}
    written |= {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Figure)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return folder / "report.html"


def _blocks(
    results: dict[str, Any] | None,
    question: Question,
    recommendation: Recommendation | None,
    rows: list[dict[str, Any]],
    command: str | None,
) -> Iterator[Block]:
    yield from _first_screen(results, question, recommendation)
    if results is not None:
        yield from _pareto(results, question)
        yield from _quality(results)
        yield from _conversion(results)
        yield from _recall(results)
    yield from _speed(question, rows)
    yield from _memory(question)
    yield Heading("Published tables")
    yield Paragraph(
        [Sentence("Other models, data and machines: shown beside, not mixed with, what is above.")]
    )
    yield from map(deployment_tables.published_table, published.TABLES)
    yield from _limits(results)
    yield from _reproduce(results, command)


def _first_screen(
    results: dict[str, Any] | None, question: Question, recommendation: Recommendation | None
) -> Iterator[Block]:
    config = question.config
    yield Paragraph(
        [
            Sentence(
                f"How many key/value heads should {_shape_name(config)} have to decode on "
                f"{question.gpus_name}, with {question.context:,} tokens per sequence and "
                f"{question.batch_name}?"
            )
        ],
        lead=True,
    )
    if recommendation is not None:
        heads = heads_name(recommendation.num_kv_heads, config.num_q_heads)
        yield Paragraph([Sentence(f"By speed and memory: {heads}.", "computed")], lead=True)
        yield Items([_reason(reason) for reason in recommendation.reasons])
    yield Paragraph(list(_quality_in_short(results, question, recommendation)))
    yield Paragraph(
        [
            Sentence("Measured: here, by running it.", "measured"),
            Sentence("Arithmetic on shapes and data sheets.", "computed"),
            Sentence("In the paper that is named.", "published"),
            Sentence("Numbers without a tag are settings and names."),
        ]
    )


def _reason(text: str) -> Sentence:
    return Sentence(text, "computed" if any(c.isdigit() for c in text) else None)


def _quality_in_short(
    results: dict[str, Any] | None, question: Question, recommendation: Recommendation | None
) -> Iterator[Sentence]:
    if results is None:
        yield Sentence("No study was run: this page says nothing measured of quality.")
        return
    yield Sentence("Quality, of the study's small models only.")
    if recommendation is not None:
        heads = question.config.num_q_heads
        share = findings.at_share(results, recommendation.num_kv_heads, heads)
        yield share or Sentence("None of them has that share of key/value heads beside MHA.")
    yield from findings.from_scratch(results, numbers=False)
    yield findings.noise(results)


def _shape_name(config: ModelConfig) -> str:
    """The published name where only the key/value heads and the length may differ."""
    for name, shape in PUBLISHED.items():
        same = ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "vocab_size")
        if all(getattr(shape, field) == getattr(config, field) for field in same):
            return f"the {name} shape"
    size = parameters_name(accounting.num_parameters(config))
    return f"a model of {config.num_layers} layers of width {config.hidden_size} ({size})"


def _figure(name: str, draw: Any, caption: str, *tags: Any) -> Figure:
    return Figure(name, plots.svg(draw), caption, tags)


def _pareto(results: dict[str, Any], question: Question) -> Iterator[Block]:
    yield Heading("Quality against speed")
    if not plots.relative_speeds(results, question, "same_ffn") or not (
        findings.from_scratch(results) or findings.by_conversion(results)
    ):
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
        f"{_shape_name(question.config)} with the same share of key/value heads on "
        f"{question.gpus_name}, over the same shape with MHA, at a context of "
        f"{question.context:,} and {question.batch_name}, whether or not it fits. The shape need "
        "not lose what the small models lose. Points of equal speed are drawn a little apart.",
        "measured",
        "computed",
    )


def _quality(results: dict[str, Any]) -> Iterator[Block]:
    yield Heading("Quality from scratch")
    yield Paragraph(list(findings.setting(results)))
    chance = findings.chance(results)
    yield Paragraph([findings.noise(results), *([chance] if chance else [])])
    yield from _items(findings.from_scratch(results))
    yield tables.scratch_table(results)
    yield from _present(detail_tables.file_table(results))


def _conversion(results: dict[str, Any]) -> Iterator[Block]:
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


def _recall(results: dict[str, Any]) -> Iterator[Block]:
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


def _speed(question: Question, rows: list[dict[str, Any]]) -> Iterator[Block]:
    yield Heading("Speed")
    yield _figure(
        "speed",
        lambda: plots.speed(question),
        f"Decoding {_shape_name(question.config)} on {question.gpus_name}: an upper bound from the "
        "data sheet. Markers: from here on, a step reads more keys and values than weights. Bars: "
        "the end of memory.",
        "computed",
    )
    yield deployment_tables.speed_table(question)
    yield deployment_tables.shapes_table(question)
    if any(row["tag"] == "measured" for row in rows):
        yield _figure(
            "measured",
            lambda: plots.measured(rows, question),
            f"A decode step on {rows[0]['gpu']}: medians with the 20th and 80th percentiles, and "
            "the floor, from rates measured in the same run, as per cent of the time. Not scaled "
            "to a whole model.",
            "measured",
        )
    if rows:
        yield deployment_tables.measured_table(rows, question.config.num_q_heads)
    else:
        yield Paragraph([Sentence("No speed was measured.")])


def _memory(question: Question) -> Iterator[Block]:
    yield Heading("Memory")
    yield _figure(
        "memory",
        lambda: plots.memory(question),
        f"Memory of a GPU that decodes {_shape_name(question.config)} with tp = {question.tp}: "
        "weights, reserve, and the keys and values of the batch.",
        "computed",
    )
    yield deployment_tables.memory_table(question)


def _limits(results: dict[str, Any] | None) -> Iterator[Block]:
    yield Heading("Limits")
    limits = [
        "Speed and memory without the tag “measured” are a model on paper: no launches, no "
        "activations beyond the reserve, no communication between GPUs.",
        "Published numbers are of other models, data and machines.",
    ]
    if results is not None:
        limits[:0] = [
            "The models are tiny and see little text. Nothing is extrapolated from them to 7B or "
            "any other size.",
            "An interval over seeds speaks of other seeds, one over files of other files of the "
            "same kind; neither speaks of other text.",
            "Which verdict is right when two intervals disagree is not decided here: it is then "
            "“not told apart”, which does not mean “equal”.",
        ]
    yield Items([Sentence(limit) for limit in limits])


def _reproduce(results: dict[str, Any] | None, command: str | None) -> Iterator[Block]:
    commands = [results["command"]] if results is not None else []
    commands += [command] if command else []
    yield Heading("How to reproduce")
    if commands:
        yield Code("\n".join(dict.fromkeys(commands)))
    if results is None:
        yield Paragraph([Sentence("The figures follow from the settings above alone.")])
        return
    environment, corpus = results["environment"], results["corpus"]
    yield Paragraph(
        [
            Sentence(
                f"Study “{results['preset']}” of {results['date']}: seeds "
                f"{', '.join(map(str, results['seeds']))}; Python {environment['python']}, "
                f"torch {environment['torch']}, {environment['device']}, "
                f"{environment['processes']} processes, "
                f"commit {environment['commit'] or 'unknown'}."
            ),
            Sentence(f"It took {results['seconds']:,.0f} seconds.", "measured"),
            Sentence(
                f"SHA-256 of the text: training {corpus['train']['sha256']}, held out "
                f"{corpus['held_out']['sha256']}."
            ),
        ]
    )


def _items(sentences: Sequence[Sentence]) -> Iterator[Block]:
    if sentences:
        yield Items(sentences)


def _present(*blocks: Block | None) -> Iterable[Block]:
    return (block for block in blocks if block is not None)
