"""What a study measured, as tables: from scratch, by conversion, recall, file by file."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from llama2.config import ModelConfig
from llama2.tradeoff import runs
from llama2.tradeoff.accounting import kv_bytes_per_token
from llama2.tradeoff.comparisons import (
    NOT_TOLD_APART,
    Comparison,
    by_conversion,
    compare,
    from_scratch,
)
from llama2.tradeoff.document import MISSING, Column, Table
from llama2.tradeoff.runs import Runs
from llama2.tradeoff.statistics import Estimate, gap_closed, share_estimate

MATCHING_NAMES = {
    "same_ffn": "same FFN",
    "exact": "parameters matched",
    "paper": "paper's factor",
}
METHOD_NOTES = {
    "aligned": "heads of a group turned towards each other, then their mean",
    "mean": "mean of a group's heads (Ainslie et al. 2023, arXiv:2305.13245)",
    "first": "a group's first head",
    "random": "new random heads",
}
_PLAIN = "mean"  # Ainslie et al.'s pooling, which other methods are held against


def heads_name(num_kv_heads: int, num_q_heads: int) -> str:
    """The field's name of a number of key/value heads: MHA, MQA or GQA with the number."""
    if num_kv_heads == num_q_heads:
        return f"MHA ({num_kv_heads})"
    return "MQA (1)" if num_kv_heads == 1 else f"GQA ({num_kv_heads})"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def interval(estimate: Estimate, digits: int = 3) -> str:
    """Signed mean with its interval, or the mean alone where one seed gives none."""
    if estimate.low is None:
        return f"{estimate.mean:+.{digits}f}"
    return f"{estimate.mean:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def plus_minus(estimate: Estimate) -> str:
    """`interval`, shorter: the signed mean ± half the interval's width."""
    half = "" if estimate.high is None else f" ± {estimate.high - estimate.mean:.3f}"
    return f"{estimate.mean:+.3f}{half}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds; the mean alone of one."""
    if not values:
        return MISSING
    mean = f"{fmean(values):.3f}"
    return f"{mean} ± {stdev(values):.3f}" if len(values) > 1 else mean


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
        mean_and_spread(list(runs.values(found).values())),
        *([MISSING] * 4 if is_base else _comparison_cells(comparison)),
    ]


def _comparison_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return [MISSING] * 4
    files = comparison.files
    return [
        interval(comparison.seeds),
        f"[{files.low:+.3f}, {files.high:+.3f}]",
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

    full = results["base"]["num_q_heads"]
    controls = [mean_and_spread(_bits(runs.control(results, alpha))) for alpha in alphas]
    rows = [[heads_name(full, full), "none (control)", *controls]]
    rows += [
        [heads_name(count, full), method, *(cell(count, method, alpha) for alpha in alphas)]
        for count in runs.fewer_heads(results, "converted")
        for method in methods
    ]
    return Table(
        "By conversion: bits per byte (difference to the control ± 95 % over seeds)",
        _alpha_columns(["key/value heads", "method"], alphas),
        rows,
        "α: steps trained after the conversion, as a share of the base's. The control trains MHA "
        "on for as many steps; at α = 0 it is MHA itself. Its own cells: mean ± sd. "
        "≈: not told apart from the control. "
        + "; ".join(f"{name}: {METHOD_NOTES[name]}" for name in methods if name in METHOD_NOTES),
    )


def _bits(found: Runs) -> list[float]:
    return list(runs.values(found).values())


def _alpha_columns(names: Sequence[str], alphas: Sequence[float]) -> list[Column]:
    return [Column(name) for name in names] + [
        Column(f"α = {percent(alpha)}", "measured") for alpha in alphas
    ]


def gap_table(results: dict[str, Any]) -> Table | None:
    """How much of mean pooling's gap to the control another method closes; None without both."""
    alphas = runs.alphas(results)
    others = [method for method in runs.methods(results) if method != _PLAIN]
    if _PLAIN not in runs.methods(results) or not others:
        return None
    full = results["base"]["num_q_heads"]
    rows = [
        [
            heads_name(count, full),
            method,
            *(_gap_cell(results, count, method, alpha) for alpha in alphas),
        ]
        for count in runs.fewer_heads(results, "converted")
        for method in others
    ]
    return Table(
        "Share of mean pooling's gap to the control that another method closes (lowest to highest "
        "seed)",
        _alpha_columns(["key/value heads", "method"], alphas),
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


def recall_table(results: dict[str, Any], task: str) -> Table:
    """Per cent of a task's tokens that are right: from scratch, and converted at every α."""
    full = results["base"]["num_q_heads"]
    alphas = runs.alphas(results)
    no_alphas = [MISSING] * len(alphas)
    rows = [
        [
            heads_name(full, full),
            "none",
            _share(runs.mha(results), task),
            *(_share(runs.control(results, alpha), task) for alpha in alphas),
        ]
    ]
    for count in sorted(
        {*runs.fewer_heads(results, "scratch"), *runs.fewer_heads(results, "converted")},
        reverse=True,
    ):
        rows += [
            [
                heads_name(count, full),
                f"from scratch, {MATCHING_NAMES[matching]}",
                _share(found, task),
                *no_alphas,
            ]
            for matching in runs.matchings(results)
            if (found := runs.scratch(results, count, matching))
        ]
        rows += [
            [
                heads_name(count, full),
                f"converted, {method}",
                MISSING,
                *(_share(runs.converted(results, count, method, alpha), task) for alpha in alphas),
            ]
            for method in runs.methods(results)
            if count in runs.fewer_heads(results, "converted")
        ]
    chance = results["recall_chance"][task]
    columns = _alpha_columns(["key/value heads", "made"], alphas)
    columns.insert(2, Column("from scratch", "measured"))
    return Table(
        f"Recall, {task}: per cent of tokens right [95 % over seeds]",
        columns,
        rows,
        f"Guessing is right in {percent(chance)} of cases (computed). MHA's row has, under α, the "
        "control that trained on.",
    )


def _share(found: Runs, task: str) -> str:
    shares = runs.recall(found, task)
    if not shares:
        return MISSING
    estimate = share_estimate(shares)
    mean = f"{100 * estimate.mean:.1f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def file_table(results: dict[str, Any], largest: int = 10) -> Table | None:
    """The held-out files whose bits per byte change most with the fewest heads from scratch.

    None where nothing was trained from scratch with fewer heads.
    """
    full = results["base"]["num_q_heads"]
    matchings = runs.matchings(results)
    compared = {
        count: found
        for count in runs.fewer_heads(results, "scratch")
        if (found := runs.scratch(results, count, matchings[0]))
        and compare(results, found, runs.mha(results))
    }
    if not compared:
        return None
    files = results["corpus"]["held_out"]["files"]
    base = runs.mha(results)
    changes = {
        count: [
            fmean(
                (found[seed]["bits"][i] - base[seed]["bits"][i]) / file["bytes"]
                for seed in found.keys() & base.keys()
            )
            for i, file in enumerate(files)
        ]
        for count, found in compared.items()
    }
    fewest = changes[min(changes)]
    order = sorted(range(len(files)), key=lambda i: (-abs(fewest[i]), files[i]["path"]))[:largest]
    rows = [
        [
            files[i]["path"],
            f"{files[i]['bytes']:,}",
            f"{fmean(run['bits'][i] / files[i]['bytes'] for run in base.values()):.3f}",
            *(f"{change[i]:+.3f}" for change in changes.values()),
        ]
        for i in order
    ]
    return Table(
        f"File by file: bits per byte, the {len(rows)} largest differences of {len(files)} files",
        [
            Column("held-out file"),
            Column("bytes", "measured"),
            Column("MHA", "measured"),
            *(Column(f"{heads_name(count, full)} − MHA", "measured") for count in changes),
        ],
        rows,
        f"From scratch, {MATCHING_NAMES[matchings[0]]}, mean over seeds; chosen for being extreme, "
        "so a single row proves nothing.",
    )
