"""The page about the effect of every stage on a model, in HTML and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from llama2.align.report import plots
from llama2.align.stages import KINDS
from llama2.align.statistics import (
    NOT_TOLD_APART,
    ONE_SEED,
    Chains,
    Measure,
    difference,
    measures,
    share,
    verdict,
)
from llama2.reporting.document import (
    MISSING,
    Block,
    Code,
    Column,
    Figure,
    Heading,
    Items,
    Paragraph,
    Sentence,
    Table,
    to_html,
    to_markdown,
)
from llama2.reporting.drawing import svg
from llama2.reporting.folder import check_own_files, page_marks
from llama2.reporting.statistics import Estimate
from llama2.reporting.wording import signed
from llama2.storage import write_text

TITLE = "What each stage of alignment does to a small model"
RESULTS = "results.json"
_MARKS = {**page_marks(TITLE), RESULTS: '"kind": "align"'}


def check_folder(folder: Path, names: Sequence[str] = ()) -> None:
    """Calls `check_own_files` for a page of this kind; errors as there."""
    check_own_files(folder, _MARKS, names)


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes report.html, report.md and the plots; returns the path of the first.

    Args:
        results: "preset", its name; "caution"; "command"; "made_with"; "failed", the seeds whose
            chain failed; "chains", the results of `measured` by seed, at least one.
    Raises:
        ValueError: `check_folder` refuses the folder. Nothing is written.
    """
    check_folder(folder, [f"{name}.svg" for name in plots.OF_MODELS | plots.OF_TRAINING])
    blocks = list(_blocks(results))
    written = {"report.html": to_html(TITLE, blocks), "report.md": to_markdown(TITLE, blocks)}
    written |= {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Figure)}
    for name, text in written.items():
        write_text(folder / name, text)
    return folder / "report.html"


def _blocks(results: Mapping[str, Any]) -> Iterator[Block]:
    chains: Chains = {int(seed): chain for seed, chain in results["chains"].items()}
    yield from _first_screen(results, chains)
    yield Heading("What each stage changes")
    yield _shares(chains)
    yield _differences(chains)
    for name in plots.OF_MODELS:
        yield _figure(name, chains)
    yield _examples(chains)
    yield Heading("How the stages went")
    for name in plots.OF_TRAINING:
        yield _figure(name, chains)
    yield _reward_models(chains)
    yield from _limits()
    yield from _reproduce(results, chains)


def _first_screen(results: Mapping[str, Any], chains: Chains) -> Iterator[Block]:
    yield Paragraph(
        [
            Sentence(
                "A small base model goes through the stages of Llama 2-Chat's making (Touvron et "
                "al. 2023, arXiv:2307.09288): supervised fine-tuning, two reward models from "
                "comparisons, rounds of rejection sampling, PPO. The tasks are synthetic; the "
                "reader whose preferences are learnt is a program that knows the right answers."
            )
        ],
        lead=True,
    )
    if results["caution"]:
        yield Paragraph([Sentence(results["caution"])], lead=True)
    if results["failed"]:
        seeds = ", ".join(map(str, results["failed"]))
        yield Paragraph(
            [Sentence(f"The chains of these seeds failed and are left out: {seeds}.")], lead=True
        )
    yield Items(list(findings(chains)))
    yield Paragraph(
        [
            Sentence("Measured: here, by running it.", "measured"),
            Sentence("Numbers without a tag are settings and names."),
        ]
    )
    yield Paragraph(
        [
            Sentence(
                "Models are named after the stage that made them: “sft” is the fine-tuned model, "
                "“round-1” and so on were trained further on the best answers of the rounds of "
                "rejection sampling up to then, and “ppo” is the last of these after PPO."
            )
        ]
    )


def _models(chains: Chains) -> list[str]:
    return list(next(iter(chains.values()))["models"])


def findings(chains: Chains) -> Iterator[Sentence]:
    """Yields, for each stage, what became better or worse than in the model before it, and for the
    last stage the effect of all stages. A difference whose interval includes 0 is not called better
    or worse."""
    models = _models(chains)
    steps = [*pairwise(models), (models[0], models[-1])]
    for baseline, model in dict.fromkeys(steps):
        told = []
        for measure in measures(chains):
            found = difference(chains, measure, model, baseline)
            said = verdict(found, measure)
            if said not in (NOT_TOLD_APART, ONE_SEED):
                told.append(f"{said} in {measure.name} ({_points(found)})")
        if found.excludes_zero is None:
            yield Sentence(f"{model} against {baseline}: one seed tells nothing.")
        elif told:
            yield Sentence(f"{model} against {baseline}: {'; '.join(told)}.", "measured")
        else:
            yield Sentence(f"{model} against {baseline}: {NOT_TOLD_APART} in any measure.")


def _shares(chains: Chains) -> Table:
    models = _models(chains)
    return Table(
        "Share of answers, mean over seeds with its 95 % interval",
        [Column("measure"), *(Column(model, "measured") for model in models)],
        [
            [measure.name, *(_percent(share(chains, measure, model)) for model in models)]
            for measure in measures(chains)
        ],
    )


def _differences(chains: Chains) -> Table:
    models = _models(chains)
    steps = list(dict.fromkeys([*pairwise(models), (models[0], models[-1])]))
    return Table(
        "Difference in percentage points, paired by seed, with its 95 % interval",
        [
            Column("measure"),
            *(Column(f"{model} − {baseline}", "measured") for baseline, model in steps),
        ],
        [
            [
                measure.name,
                *(_judged(chains, measure, model, baseline) for baseline, model in steps),
            ]
            for measure in measures(chains)
        ],
        "A difference is called “better” or “worse” only where its interval excludes 0.",
    )


def _judged(chains: Chains, measure: Measure, model: str, baseline: str) -> str:
    found = difference(chains, measure, model, baseline)
    return f"{_points(found)}, {verdict(found, measure)}"


def _examples(chains: Chains) -> Table:
    seed, chain = next(iter(chains.items()))
    models = _models(chains)
    return Table(
        f"What the models of seed {seed} answer to the first held-out request of each family",
        [
            *(Column("request"), Column("right answer")),
            *(Column(model, "measured", words=True) for model in models),
        ],
        [
            [each["request"], each["expected"], *(each["answers"][model] for model in models)]
            for each in chain["examples"]
        ],
    )


def _percent(found: Estimate) -> str:
    mean = f"{100 * found.mean:.1f} %"
    if found.low is None:
        return mean
    return f"{mean} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _points(found: Estimate) -> str:
    mean = signed(100 * found.mean, 1)
    if found.low is None:
        return mean
    return f"{mean} [{signed(100 * found.low, 1)}, {signed(100 * found.high, 1)}]"


def _figure(name: str, chains: Chains) -> Figure:
    draw, caption = plots.drawn(name, chains)
    return Figure(name, svg(draw), caption, ["measured"])


def _reward_models(chains: Chains) -> Table:
    rows = []
    for kind in KINDS:
        found = [chain["reward"][kind] for chain in chains.values()]
        ratings = dict.fromkeys(rating for each in found for rating in each["by_rating"])
        rows.append([kind, "all", *_counted(found)])
        rows += [
            [kind, rating, *_counted([each["by_rating"].get(rating) for each in found])]
            for rating in ratings
        ]
    return Table(
        "Reward models on held-out comparisons",
        [
            *(Column("reward model"), Column("rating")),
            *(Column("pairs", "measured"), Column("right", "measured")),
        ],
        rows,
        "Pairs of all seeds; the share is the mean over seeds.",
    )


def _counted(found: Sequence[Mapping[str, Any] | None]) -> list[str]:
    there = [each for each in found if each is not None]
    if not there:
        return [MISSING, MISSING]
    pairs = sum(each["pairs"] for each in there)
    return [f"{pairs:,}", f"{100 * fmean(each['accuracy'] for each in there):.1f} %"]


def _limits() -> Iterator[Block]:
    yield Heading("Limits")
    yield Items(
        [
            Sentence(text)
            for text in (
                "The model has 1.4 million parameters and knows a dozen kinds of tasks. What a "
                "stage does to it says nothing of what it does to a large one.",
                "Preferences come from a program: they are consistent, and no reader's.",
                "A seed draws the tasks, all samples and the order of the data; the base model is "
                "the same for all. An interval over seeds speaks of other such seeds.",
                "The presets' settings were chosen by such measurements, of some of the same "
                "seeds: other seeds may do worse.",
                "“Not told apart” does not mean “equal”.",
            )
        ]
    )


def _reproduce(results: Mapping[str, Any], chains: Chains) -> Iterator[Block]:
    yield Heading("How to reproduce")
    made_with = results["made_with"]
    packages = ", ".join(f"{name} {version}" for name, version in made_with["packages"].items())
    yield Code(results["command"])
    yield Paragraph(
        [
            Sentence(
                f"Preset “{results['preset']}”, seeds {', '.join(map(str, chains))}; {packages}, "
                f"{made_with['gpu'] or 'a CPU'} ({made_with['machine']}), commit "
                f"{made_with['commit'] or 'unknown'}."
            )
        ]
    )
    first, chain = next(iter(chains.items()))
    rows = [
        [
            name,
            f"{fmean(each['stages'][name]['seconds'] for each in chains.values()):.0f}",
            f"{fmean(each['stages'][name]['cpu_seconds'] for each in chains.values()):.0f}",
        ]
        for name in chain["stages"]
    ]
    totals = [f"{sum(float(row[column]) for row in rows):.0f}" for column in (1, 2)]
    yield Table(
        "Time of each stage, mean over seeds, all seeds side by side",
        [Column("stage"), Column("seconds", "measured"), Column("CPU seconds", "measured")],
        [*rows, ["all", *totals]],
        "A stage that was interrupted counts from where it went on.",
    )
    yield Paragraph([Sentence(f"The stages of seed {first}, one after another:")])
    yield Code("\n".join(" ".join(stage["command"]) for stage in chain["stages"].values()))
