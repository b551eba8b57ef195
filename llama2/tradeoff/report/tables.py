"""Bits per byte that a study measured, as tables: from scratch and by conversion."""

from statistics import fmean
from typing import Any

from llama2.accounting import kv_bytes_per_token
from llama2.config import ModelConfig
from llama2.reporting.document import MISSING, Column, Table
from llama2.reporting.statistics import gap_closed
from llama2.tradeoff.report.wording import (
    MATCHING_NAMES,
    METHOD_NOTES,
    alpha_columns,
    heads_name,
    interval,
    mean_and_spread,
    percent,
    plus_minus,
)
from llama2.tradeoff.study import runs
from llama2.tradeoff.study.comparisons import (
    NOT_TOLD_APART,
    Comparison,
    by_conversion,
    from_scratch,
)
from llama2.tradeoff.study.runs import Runs

_PLAIN = "mean"  # Ainslie et al.'s pooling, which other methods are held against


def scratch_table(results: dict[str, Any]) -> Table:
    """Fewer key/value heads trained from scratch, beside MHA, for every matching that was run."""
    base = ModelConfig(**results["base"])
    kinds = [(base.num_q_heads, "same_ffn")]
    kinds += [
        (count, matching)
        for count in runs.fewer_heads(results, "scratch")
        for matching in runs.matchings(results)
    ]
    rows = [
        _scratch_row(base, count, matching, found, from_scratch(results, count, matching))
        for count, matching in kinds
        if (found := runs.scratch(results, count, matching))
    ]
    return Table(
        "From scratch: fewer key/value heads against MHA",
        [
            Column("key/value heads"),
            Column("matching"),
            Column("FFN width", "computed"),
            Column("parameters", "computed"),
            Column("FLOPs per token", "computed"),
            Column("cache, bytes per token", "computed"),
            Column("bits per byte, mean ± sd", "measured"),
            Column("difference to MHA [95 % over seeds]", "measured"),
            Column("[95 % over files]", "measured"),
            Column("files worse", "measured"),
            Column("verdict", "measured"),
        ],
        rows,
        "Differences are paired by seed; below zero is better. A verdict other than "
        f"“{NOT_TOLD_APART}” needs both intervals to leave 0 out. FLOPs: forward, mean over a "
        "training sequence. Cache: two bytes a value.",
    )


def _scratch_row(
    base: ModelConfig, count: int, matching: str, found: Runs, comparison: Comparison | None
) -> list[str]:
    run = next(iter(found.values()))
    is_base = count == base.num_q_heads
    # All that a count of heads changes in the cache is the number of heads.
    cache = kv_bytes_per_token(base) // base.num_kv_heads * count
    return [
        heads_name(count, base.num_q_heads),
        MISSING if is_base else MATCHING_NAMES[matching],
        str(run["intermediate_size"]),
        f"{run['parameters']:,}",
        f"{run['flops_per_token']:,}",
        f"{cache:,}",
        mean_and_spread(_bits(found)),
        *([MISSING] * 4 if is_base else _comparison_cells(comparison)),
    ]


def _comparison_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return [MISSING] * 4
    files = comparison.files
    return [
        interval(comparison.seeds),
        f"[{files.low:+.4f}, {files.high:+.4f}]" if files.num_files > 1 else MISSING,
        f"{files.num_worse} of {files.num_files}",
        comparison.verdict,
    ]


def conversion_table(results: dict[str, Any]) -> Table:
    """MHA converted to fewer heads and trained on, beside the control that only trained on."""
    alphas, methods = runs.alphas(results), runs.methods(results)

    def cell(count: int, method: str, alpha: float) -> str:
        found = runs.converted(results, count, method, alpha)
        comparison = by_conversion(results, count, method, alpha)
        if not found or comparison is None:
            return mean_and_spread(_bits(found))
        mark = " ≈" if comparison.verdict == NOT_TOLD_APART else ""
        return f"{fmean(_bits(found)):.3f} ({plus_minus(comparison.seeds)}){mark}"

    def steps(alpha: float) -> str:
        run = next(run for run in results["runs"] if run["alpha"] == alpha)
        return f"{run['steps']:,} for {percent(alpha)}"

    full = results["base"]["num_q_heads"]
    controls = [mean_and_spread(_bits(runs.control(results, alpha))) for alpha in alphas]
    rows = [[heads_name(full, full), "none (control)", *controls]]
    rows += [
        [heads_name(count, full), method, *(cell(count, method, alpha) for alpha in alphas)]
        for count in runs.fewer_heads(results, "converted")
        for method in runs.methods(results, count)
    ]
    return Table(
        "By conversion: bits per byte (difference to the control ± 95 % over seeds)",
        alpha_columns(["key/value heads", "method"], alphas),
        rows,
        "α: steps trained after the conversion, as a share of the base's; in steps "
        f"{', '.join(map(steps, alphas))}. The control trains MHA on for as many; at α = 0 it is "
        "MHA itself. Its own cells: mean ± sd. ≈: not told apart from the control. "
        + "; ".join(f"{name}: {METHOD_NOTES[name]}" for name in methods if name in METHOD_NOTES),
    )


def _bits(found: Runs) -> list[float]:
    return list(runs.values(found).values())


def gap_table(results: dict[str, Any]) -> Table | None:
    """How much of mean pooling's gap to the control another method closes; None without both."""
    alphas, methods = runs.alphas(results), runs.methods(results)
    if _PLAIN not in methods or len(methods) < 2:
        return None
    full = results["base"]["num_q_heads"]
    rows = [
        [
            heads_name(count, full),
            method,
            *(_gap_cell(results, count, method, alpha) for alpha in alphas),
        ]
        for count in runs.fewer_heads(results, "converted")
        for method in runs.methods(results, count)
        if method != _PLAIN
    ]
    return Table(
        "Share of mean pooling's gap to the control that another method closes (lowest to highest "
        "seed)",
        alpha_columns(["key/value heads", "method"], alphas),
        rows,
        "100 %: as good as the control. Below zero: worse than mean pooling. Only where mean "
        "pooling is told apart from the control: otherwise there is no gap to speak of.",
    )


def _gap_cell(results: dict[str, Any], count: int, method: str, alpha: float) -> str:
    plain, better, control = (
        runs.values(found)
        for found in (
            runs.converted(results, count, _PLAIN, alpha),
            runs.converted(results, count, method, alpha),
            runs.control(results, alpha),
        )
    )
    comparison = by_conversion(results, count, _PLAIN, alpha)
    seeds = sorted(plain.keys() & better.keys() & control.keys())
    if not seeds or comparison is None or comparison.verdict not in ("worse", "one seed"):
        return MISSING
    whole = gap_closed(*(fmean(side[seed] for seed in seeds) for side in (plain, better, control)))
    each = [gap_closed(plain[seed], better[seed], control[seed]) for seed in seeds]
    known = [share for share in each if share is not None]
    if whole is None:
        return MISSING
    if len(seeds) == 1:
        return f"{whole:.0%}"
    return f"{whole:.0%} ({min(known):.0%} to {max(known):.0%})"
