"""The page: one HTML file, and the same in Markdown, of a study and of a deployment on paper."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2.config import ModelConfig
from llama2.reporting.document import (
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
from llama2.storage import write_text
from llama2.tradeoff import published
from llama2.tradeoff.recommend import Recommendation
from llama2.tradeoff.report import deployment_tables, findings, sections
from llama2.tradeoff.report.deployment_tables import Question
from llama2.tradeoff.report.folder import TITLE, check_folder
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.roofline import Gpu
from llama2.tradeoff.study import runs


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
        measured_rows: of `measured.measure_decode`, each with the name of its "shape" and its
            "num_q_heads" beside.
        command: that makes this page, for its last section; the study's own is in its result.
    Returns:
        the path of report.html.
    Raises:
        ValueError: a result from which no honest page can be made (`runs.check`), measured rows
            with figures that are not finite, a deployment that does not exist, or a folder as
            `check_folder` refuses it. Nothing is written.
    """
    if results is not None:
        runs.check(results)
    rows = list(measured_rows or ())
    deployment_tables.check_measured(rows)
    question = Question(config, gpu, context, batch, tp)
    blocks = list(_blocks(results, question, recommendation, rows, command))
    written = {"report.html": to_html(TITLE, blocks), "report.md": to_markdown(TITLE, blocks)}
    written |= {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Figure)}
    check_folder(folder, written)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        write_text(folder / name, text)
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
        yield from sections.pareto(results, question)
        yield from sections.quality(results)
        yield from sections.conversion(results)
        yield from sections.recall(results)
    yield from sections.speed(question, rows)
    yield from sections.memory(question)
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
                f"How many key/value heads should {question.shape_name} have to decode on "
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
        yield share or Sentence(
            "None of its models has that share of key/value heads, so that it says nothing of this "
            "recommendation."
        )
    yield from findings.from_scratch(results, numbers=False)
    yield findings.noise(results)


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
