"""What a study measured, as tables: text, records, conversions."""

from statistics import fmean
from typing import Any

from llama2.accounting import kv_bytes_per_token
from llama2.config import ModelConfig
from llama2.reporting.document import MISSING, Column, Table
from llama2.reporting.statistics import gap_closed
from llama2.reporting.wording import fixed
from llama2.tradeoff.report.wording import (
    METHOD_NOTES,
    digits_of,
    heads_name,
    interval,
    mean_and_spread,
    outcome,
    percent,
    plus_minus,
)
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import ACCURACY, NOT_TOLD_APART, POWER, Comparison

_PLAIN = "mean"  # Ainslie et al.'s pooling, which other methods are held against


def primary_table(results: dict[str, Any]) -> Table:
    """Returns the comparisons with MHA that were named before the first run."""

    def row(entry: dict[str, Any], comparison: Comparison) -> list[str]:
        is_text = entry["measure"] == "text"
        full = (
            results["text"]["base"]["num_q_heads"]
            if is_text
            else results["records"]["shape"]["num_q_heads"]
        )
        count, digits = entry["num_kv_heads"], digits_of(comparison.measure)
        resolvable = comparison.resolvable
        return [
            heads_name(count, full),
            f"1/{full // count}",
            "text, bits per byte" if is_text else "recall, points",
            interval(comparison.seeds, digits),
            str(comparison.seeds.n),
            outcome(comparison),
            MISSING if resolvable is None else f"{resolvable:.{digits}f}",
        ]

    return Table(
        "Comparisons with MHA that were named before the first run",
        [
            *(Column(name) for name in ("key/value heads", "share", "measure")),
            Column("difference [95 % over seeds]", "this study"),
            Column("seeds", "this study"),
            Column("verdict", "this study", words=True),
            Column(f"resolvable with {percent(POWER)} power", "this study"),
        ],
        [row(entry, comparison) for entry, comparison in comparisons.primary(results)],
        "All other comparisons on this page are secondary. Resolvable: the smallest true "
        "difference that this many seeds would tell from 0, by the spread that was found.",
    )


def text_table(results: dict[str, Any]) -> Table:
    """Returns the results in text of models trained from scratch, MHA first."""
    base = ModelConfig(**results["text"]["base"])

    def row(count: int) -> list[str]:
        found = runs.text(results, count)
        run = next(iter(found.values()))
        # All that a count of heads changes in the cache is the number of heads.
        cache = kv_bytes_per_token(base) // base.num_kv_heads * count
        comparison = None if count == base.num_q_heads else comparisons.from_scratch(results, count)
        return [
            heads_name(count, base.num_q_heads),
            str(run["intermediate_size"]),
            f"{run['parameters']:,}",
            f"{cache:,}",
            mean_and_spread(list(runs.values(found).values())),
            *_difference_cells(comparison),
        ]

    counts = [base.num_q_heads, *runs.fewer_heads(results, "text")]
    return Table(
        "Text: bits per byte on held-out files, less is better",
        [
            Column("key/value heads"),
            Column("FFN width", "this study"),
            Column("parameters", "this study"),
            Column("cache, bytes per token", "this study"),
            Column("bits per byte, mean ± sd", "this study"),
            Column("difference to MHA [95 % over seeds]", "this study"),
            Column("[95 % over files]", "this study"),
            Column("files worse", "this study"),
            Column("verdict", "this study", words=True),
        ],
        [row(count) for count in counts if runs.text(results, count)],
        "Paired by seed; the feed-forward layers make up for the parameters of the heads. A "
        "verdict needs both intervals to leave 0 out.",
    )


def _difference_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return [MISSING] * 4
    digits, files = digits_of(comparison.measure), comparison.files
    over_files = interval(files, digits).partition(" ")[2] if files.num_files > 1 else MISSING
    return [
        interval(comparison.seeds, digits),
        over_files,
        f"{files.num_worse} of {files.num_files}",
        outcome(comparison),
    ]


def records_table(results: dict[str, Any]) -> Table:
    """Returns the accuracy in every arm of "records": MHA's, and the differences of fewer heads."""
    full = results["records"]["shape"]["num_q_heads"]
    arms = runs.arms(results)
    counts = sorted(
        {count for arm in arms for count in runs.fewer_heads(results, "records", arm["name"])},
        reverse=True,
    )

    def cell(arm: dict[str, Any], count: int) -> str:
        comparison = comparisons.records(results, arm["name"], count)
        if comparison is None:
            return MISSING
        mean = f"{100 * accuracy(results, arm, count):.1f}"
        mark = " ≈" if comparison.verdict == NOT_TOLD_APART else ""
        return f"{mean} ({plus_minus(comparison.seeds, digits_of(ACCURACY))}){mark}"

    return Table(
        "Recall: per cent of answers right (points over MHA ± 95 % over seeds)",
        [
            *(Column(name) for name in ("arm", "fields", "steps", "peak learning rate", "seeds")),
            *(Column(heads_name(count, full), "this study") for count in (full, *counts)),
        ],
        [
            [
                arm["purpose"],
                str(arm["fields"]),
                f"{arm['steps']:,}",
                f"{arm['peak_lr']:g}",
                str(len(runs.records(results, arm["name"]))),
                f"{100 * accuracy(results, arm, full):.1f}",
                *(cell(arm, count) for count in counts),
            ]
            for arm in arms
        ],
        f"Guessing is right in {percent(results['records']['chance'])} of cases. ≈: not resolved.",
    )


def accuracy(results: dict[str, Any], arm: dict[str, Any], count: int) -> float:
    """Returns the mean accuracy over the seeds of an arm."""
    return fmean(runs.values(runs.records(results, arm["name"], count), "accuracy").values())


def conversion_table(results: dict[str, Any]) -> Table:
    """Returns the matrix of heads × method × α: converted models that were trained further, against
    the control that was only trained further."""
    alphas = runs.alphas(results)
    full = results["text"]["base"]["num_q_heads"]

    def cell(count: int, method: str, alpha: float) -> str:
        found = runs.values(runs.converted(results, count, method, alpha))
        comparison = comparisons.by_conversion(results, count, method, alpha)
        if comparison is None:
            return mean_and_spread(list(found.values()))
        mark = " ≈" if comparison.verdict == NOT_TOLD_APART else ""
        return f"{fmean(found.values()):.3f} ({plus_minus(comparison.seeds, 3)}){mark}"

    def closed(count: int, method: str) -> list[str]:
        return [_gap_cell(results, count, method, alpha) for alpha in alphas]

    controls = [
        mean_and_spread(list(runs.values(runs.control(results, alpha)).values()))
        for alpha in alphas
    ]
    rows = [[heads_name(full, full), "none (control)", *controls, *[MISSING] * len(alphas)]]
    rows += [
        [
            heads_name(count, full),
            method,
            *(cell(count, method, alpha) for alpha in alphas),
            *closed(count, method),
        ]
        for count in runs.fewer_heads(results, "conversion")
        for method in runs.methods(results, count)
    ]
    methods = "; ".join(
        f"{method}: {METHOD_NOTES[method]}"
        for method in runs.methods(results)
        if method in METHOD_NOTES
    )
    return Table(
        "Conversion: bits per byte (difference to the control ± 95 % over seeds)",
        [
            *(Column(name) for name in ("key/value heads", "method")),
            *(Column(f"α = {percent(alpha)}", "this study") for alpha in alphas),
            *(Column(f"gap closed, α = {percent(alpha)}", "this study") for alpha in alphas),
        ],
        rows,
        "α: steps trained after the conversion, as a share of the base's; the control trains MHA "
        "on for as many, and at α = 0 it is MHA itself. Gap closed: of mean pooling's difference "
        f"to the control. ≈: not resolved. {methods}.",
    )


def _gap_cell(results: dict[str, Any], count: int, method: str, alpha: float) -> str:
    """Returns the share of mean pooling's gap to the control that another method closes."""
    comparison = comparisons.by_conversion(results, count, _PLAIN, alpha)
    sides = [
        runs.values(found)
        for found in (
            runs.converted(results, count, _PLAIN, alpha),
            runs.converted(results, count, method, alpha),
            runs.control(results, alpha),
        )
    ]
    seeds = sorted(set.intersection(*(set(side) for side in sides)))
    if method == _PLAIN or not seeds or comparison is None or comparison.verdict != "worse":
        return MISSING
    whole = gap_closed(*(fmean(side[seed] for seed in seeds) for side in sides))
    return MISSING if whole is None else f"{fixed(100 * whole, 0)} %"


def shipped_table(results: dict[str, Any]) -> Table | None:
    """Returns the results of converting the shipped model; None if it was not run."""
    model = results["shipped"]["model"]
    original, heads = model["num_kv_heads"], model["num_q_heads"]
    alphas = [
        alpha
        for alpha in results["shipped"]["alphas"]
        if runs.shipped(results, original, alpha) is not None
    ]
    counts = runs.fewer_heads(results, "shipped")
    if not alphas or not counts:
        return None

    def cell(count: int, alpha: float) -> str:
        run = runs.shipped(results, count, alpha)
        difference = comparisons.shipped(results, count, alpha)
        if run is None or difference is None:
            return MISSING
        return f"{run['bits_per_byte']:.3f} ({interval(difference, 3)})"

    base = [f"{runs.shipped(results, original, alpha)['bits_per_byte']:.3f}" for alpha in alphas]
    rows = [[heads_name(original, heads), "none (control)", *base]]
    for count in counts:
        method = next(
            run["method"]
            for run in results["runs"]
            if run["part"] == "shipped" and run["num_kv_heads"] == count
        )
        cells = [cell(count, alpha) for alpha in alphas]
        rows.append([heads_name(count, heads), method, *cells])
    return Table(
        "The shipped model converted: bits per byte (difference to the control [95 % over files])",
        [
            *(Column(name) for name in ("key/value heads", "method")),
            *(Column(f"α = {percent(alpha)}", "this study") for alpha in alphas),
        ],
        rows,
        "One model: the interval is over held-out files and says nothing of other models.",
    )
