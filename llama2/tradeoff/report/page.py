"""The page: one HTML file, and the same in Markdown, of a study and of a deployment on paper."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2.reporting.document import (
    Block,
    Code,
    Contents,
    Heading,
    Items,
    Markup,
    Paragraph,
    Sentence,
    figures_of,
    to_html,
    to_json,
    to_markdown,
)
from llama2.storage import write_text
from llama2.tradeoff.question import Question
from llama2.tradeoff.report import (
    decision,
    deployment,
    deployment_tables,
    interactive,
    study_sections,
)
from llama2.tradeoff.report.folder import TITLE, check_folder
from llama2.tradeoff.study import runs


def write_page(
    results: dict[str, Any] | None,
    folder: Path,
    question: Question,
    *,
    measured_rows: Sequence[dict[str, Any]] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Writes report.html (self-contained), report.md and the plots, *.svg, that the latter shows.

    Every table and plot says whether it was measured, predicted, published or found by the study.
    The same arguments give the same bytes.

    Args:
        results: of a study; None makes a page without the study's sections.
        question: the deployment that the page opens with.
        measured_rows: of `measured.measure_decode`, each with the name of its "shape" and its
            "num_q_heads" beside.
        command: that makes this page, for its last section; the study's own is in its result.
    Returns:
        the page for a program, as `llama2.reporting.document.to_json`.
    Raises:
        ValueError: a result from which no honest page can be made (`runs.check`), measured rows
            with figures that are not finite, or a folder as `check_folder` refuses it. Nothing is
            written.
    """
    if results is not None:
        runs.check(results)
    rows = list(measured_rows or ())
    deployment_tables.check_measured(rows)
    blocks = list(page_blocks(results, question, rows, command))
    written = {
        "report.html": to_html(TITLE, blocks, interactive.STYLE),
        "report.md": to_markdown(TITLE, blocks),
    }
    written |= {f"{figure.name}.svg": figure.svg for figure in figures_of(blocks)}
    check_folder(folder, written)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        write_text(folder / name, text)
    return to_json(TITLE, blocks)


def page_blocks(
    results: dict[str, Any] | None,
    question: Question,
    rows: list[dict[str, Any]],
    command: str | None,
) -> Iterator[Block]:
    yield from decision.headline(question, results)
    yield Markup(interactive.form(question))
    yield from decision.counts(question, results, rows)
    yield from deployment.curves(question)
    yield Contents()
    if results is not None:
        yield from study_sections.sections(results, question)
    yield from deployment.tables(question, rows)
    yield from deployment.publications()
    yield from _limits(results)
    yield from _reproduce(results, command)
    yield Markup(interactive.script(question, results))


def _limits(results: dict[str, Any] | None) -> Iterator[Block]:
    yield Heading("Limits")
    limits = [
        "Predicted speed and memory are a model on paper: no launches, no activations beyond the "
        "reserve, no communication between GPUs.",
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
        yield Paragraph(
            [Sentence("How this page was written; its fields do not change this section.")]
        )
        yield Code("\n".join(dict.fromkeys(commands)))
    if results is None:
        yield Paragraph([Sentence("The figures follow from the settings above alone.")])
        return
    environment, corpus = results["environment"], results["corpus"]
    yield Paragraph(
        [
            Sentence(
                f"Study “{results['preset']}” of {results['date']}: seeds "
                f"{', '.join(map(str, results['text']['seeds']))}; Python {environment['python']}, "
                f"torch {environment['torch']}, {environment['device']}, "
                f"{environment['processes']} processes, "
                f"commit {environment['commit'] or 'unknown'}."
            ),
            Sentence(f"It took {results['cpu_seconds']:,.0f} seconds of one core."),
            Sentence(
                f"SHA-256 of the study's code {environment['source']}, of the training text "
                f"{corpus['train']['sha256']}, of the held-out text "
                f"{corpus['held_out']['sha256']}."
            ),
        ]
    )
