"""What a mean of bits per byte hides, as tables: recall, and single held-out files."""

from statistics import fmean
from typing import Any

from llama2.reporting.document import MISSING, Column, Table
from llama2.reporting.statistics import share_estimate
from llama2.tradeoff.report.wording import MATCHING_NAMES, alpha_columns, heads_name, percent
from llama2.tradeoff.study import runs
from llama2.tradeoff.study.comparisons import compare
from llama2.tradeoff.study.runs import Runs


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
            for method in runs.methods(results, count)
        ]
    chance = results["recall_chance"][task]
    columns = alpha_columns(["key/value heads", "made"], alphas)
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
