"""Plots of a study: quality against speed, conversion, recall."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from llama2 import accounting
from llama2.reporting.drawing import legend, panels, plain_log, series
from llama2.reporting.statistics import noise_floor, share_estimate
from llama2.tradeoff.report.deployment_tables import Question, shares
from llama2.tradeoff.report.wording import MATCHING_NAMES, heads_name, percent
from llama2.tradeoff.roofline import Deployment
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import Comparison

Speeds = dict[str, dict[int, float]]  # by matching and number of heads, over MHA's


def relative_speeds(results: dict[str, Any], question: Question) -> Speeds:
    """Per matching, for the study's counts: tokens per second over MHA's, of the deployment's shape
    with the same share of key/value heads; at the batch that was asked for, or the largest of each.

    A count is left out whose share is no whole number of heads there, or not one that `tp` ranks
    can share; where no batch was asked for, so is one without room for a sequence, and all are
    where that is MHA.
    """
    matchings = dict.fromkeys(["same_ffn", *runs.matchings(results)])
    return {matching: _relative_speeds(results, question, matching) for matching in matchings}


def _relative_speeds(
    results: dict[str, Any], question: Question, matching: str
) -> dict[int, float]:
    study_heads, heads = results["base"]["num_q_heads"], question.config.num_q_heads
    full = accounting.matched(question.config, heads, "same_ffn")

    def speed(count: int) -> float | None:
        shape = accounting.matched(full, count, matching)
        deployment = Deployment(shape, question.gpu, question.tp)
        batch = question.batch or deployment.largest_batch(question.context)
        return deployment.decode_tokens_per_s(batch, question.context) if batch else None

    base = speed(heads)
    counts = {run["num_kv_heads"] for run in results["runs"]}
    scaled = {
        count: count * heads // study_heads
        for count in sorted(counts, reverse=True)
        if count * heads % study_heads == 0 and shares(count * heads // study_heads, question.tp)
    }
    speeds = {count: speed(there) for count, there in scaled.items()}
    return {count: found / base for count, found in speeds.items() if found and base}


@dataclass(frozen=True)
class Series:
    """Models of one kind: how each compares, by its number of key/value heads. `matching` is that
    of the shape whose speed is computed."""

    name: str
    matching: str
    points: dict[int, Comparison]


def pareto_panels(results: dict[str, Any], speeds: Speeds) -> dict[str, list[Series]]:
    """What the plot of quality against speed shows, by the title of its panel: from scratch, and
    converted at the largest α, of the counts that `speeds` has. Panels without a point are left
    out."""
    scratch = [
        Series(
            f"from scratch, {MATCHING_NAMES[matching]}",
            matching,
            {
                count: comparison
                for count in runs.fewer_heads(results, "scratch")
                if count in speeds[matching]
                and (comparison := comparisons.from_scratch(results, count, matching))
            },
        )
        for matching in runs.matchings(results)
    ]
    shown = {"From scratch, against MHA": scratch}
    if alphas := runs.alphas(results):
        methods = runs.methods(results)
        # Poor methods, which are there for comparison, would set the scale.
        shown_methods = [method for method in methods if method not in ("first", "random")]
        shown[f"Converted, α = {percent(alphas[-1])}, against the control"] = [
            Series(
                f"converted, {method}",
                "same_ffn",
                {
                    count: comparison
                    for count in runs.fewer_heads(results, "converted")
                    if count in speeds["same_ffn"]
                    and (
                        comparison := comparisons.by_conversion(results, count, method, alphas[-1])
                    )
                },
            )
            for method in shown_methods or methods
        ]
    return {title: kinds for title, kinds in shown.items() if any(kind.points for kind in kinds)}


def pareto(results: dict[str, Any], question: Question) -> Figure:
    """Quality lost against speed gained; needs a panel of `pareto_panels`."""
    speeds = relative_speeds(results, question)
    shown = pareto_panels(results, speeds)
    figure, all_axes = panels(len(shown), width=5.2, height=4.4)
    noise = noise_floor(list(runs.values(runs.mha(results)).values()))
    for axes, (title, kinds) in zip(all_axes, shown.items(), strict=True):
        axes.axhline(0, color="black", linewidth=1)
        if noise:
            spread = noise.typical_difference
            axes.axhspan(-spread, spread, color="#bbbbbb", alpha=0.4, linewidth=0, label="noise")
        axes.plot([1], [0], color="black", marker="*", markersize=13, linestyle="", label="MHA")
        for index, kind in enumerate(kinds):
            shift = 1 + 0.02 * (index - (len(kinds) - 1) / 2)  # or equal speeds hide each other
            x = [speeds[kind.matching][count] * shift for count in kind.points]
            _error_bars(axes, x, kind, index)
        _speed_axis(axes, results, speeds["same_ffn"])
        axes.set(title=title, xlabel="decode speed over MHA's (computed)")
        axes.set_ylabel("bits per byte more (measured)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=9)
    return figure


def _error_bars(axes: Axes, x: Sequence[float], kind: Series, index: int) -> None:
    estimates = [comparison.seeds for comparison in kind.points.values()]
    halves = [0.0 if e.high is None else e.high - e.mean for e in estimates]
    means = [estimate.mean for estimate in estimates]
    axes.errorbar(x, means, halves, label=kind.name, capsize=4, linewidth=1, **series(index))


def _speed_axis(axes: Axes, results: dict[str, Any], speeds: dict[int, float]) -> None:
    """Ticks where the numbers of heads are: their speed below, the number above. Numbers whose
    labels would lie on each other share one."""
    full = results["base"]["num_q_heads"]
    apart = 0.09 * math.log(max(speeds.values()) / min(speeds.values())) if speeds else 0.0
    ticks: list[float] = []
    names: list[str] = []
    for count, speed in sorted(speeds.items(), reverse=True):
        if ticks and abs(math.log(speed / ticks[-1])) <= apart:
            names[-1] += f", {count}"
        else:
            ticks.append(speed)
            names.append(str(count))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{speed:.2f}×" for speed in ticks])
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, names)
    for axis in (axes.xaxis, top.xaxis):
        axis.set_minor_formatter(NullFormatter())
    top.set_xlabel(f"key/value heads of the trained model, for {full} query heads", fontsize=9)


def conversion(results: dict[str, Any]) -> Figure:
    """Bits per byte against α: a panel per number of heads, a line per method."""
    counts, alphas = runs.fewer_heads(results, "converted"), runs.alphas(results)
    full = results["base"]["num_q_heads"]
    figure, all_axes = panels(len(counts), width=3.6, height=4.2, sharey=True)
    base = fmean(runs.values(runs.mha(results)).values())
    for axes, count in zip(all_axes, counts, strict=True):
        for index, method in enumerate(runs.methods(results)):
            found = {alpha: runs.converted(results, count, method, alpha) for alpha in alphas}
            _band(axes, found, method, **series(index))
        controls = {alpha: runs.control(results, alpha) for alpha in alphas}
        _band(axes, controls, "control: MHA trained on", color="black", marker=".", linestyle="--")
        axes.axhline(base, color="#666666", linestyle=":", label="MHA before conversion")
        scratch = runs.values(runs.scratch(results, count, "same_ffn"))
        if scratch:
            level = fmean(scratch.values())
            axes.axhline(level, color="#666666", linestyle="-.", label="from scratch, same FFN")
        axes.set(title=heads_name(count, full), xlabel="α, % of the base's steps")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plain_log(all_axes[0], "y")
    all_axes[0].set_ylabel("bits per byte (measured)")
    legend(figure, all_axes[-1])
    return figure


def _band(axes: Axes, found: dict[float, runs.Runs], name: str, **style: Any) -> None:
    """Means over seeds as a line, lowest to highest seed as a band."""
    values = {
        100 * alpha: list(runs.values(kind).values()) for alpha, kind in found.items() if kind
    }
    if not values:
        return
    axes.plot(list(values), [fmean(seeds) for seeds in values.values()], label=name, **style)
    low, high = ([end(seeds) for seeds in values.values()] for end in (min, max))
    axes.fill_between(list(values), low, high, color=style["color"], alpha=0.25, linewidth=0)


def recall(results: dict[str, Any]) -> Figure:
    """Share of recalled tokens against the number of heads, a panel per task."""
    full, alphas = results["base"]["num_q_heads"], runs.alphas(results)
    counts = sorted({run["num_kv_heads"] for run in results["runs"]}, reverse=True)
    base = runs.mha(results)
    kinds: dict[str, Callable[[int], runs.Runs]] = {
        f"from scratch, {MATCHING_NAMES[matching]}": (
            lambda count, matching=matching: runs.scratch(results, count, matching)
        )
        for matching in runs.matchings(results)
    }
    for method in runs.methods(results):
        kinds[f"converted, {method}, α = {percent(alphas[-1])}"] = lambda count, method=method: (
            runs.converted(results, count, method, alphas[-1])
        )
    tasks = runs.tasks(results)
    figure, all_axes = panels(len(tasks))
    for axes, task in zip(all_axes, tasks, strict=True):
        mean = 100 * fmean(runs.recall(base, task))
        axes.plot([0], [mean], color="black", marker="*", markersize=12, linestyle="", label="MHA")
        for index, (name, kind) in enumerate(kinds.items()):
            found = {
                place: kind(count)
                for place, count in enumerate(counts)
                if count < full and kind(count)
            }
            shift = 0.08 * (index - (len(kinds) - 1) / 2)
            estimates = [share_estimate(runs.recall(one, task)) for one in found.values()]
            low = [100 * (e.mean - (e.mean if e.low is None else e.low)) for e in estimates]
            high = [100 * ((e.mean if e.high is None else e.high) - e.mean) for e in estimates]
            means, places = [100 * e.mean for e in estimates], [place + shift for place in found]
            line = {"label": name, "capsize": 3, "linewidth": 1, **series(index)}
            axes.errorbar(places, means, [low, high], **line)
        chance = 100 * results["recall_chance"][task]
        axes.axhline(chance, color="black", linestyle=":", label="guessing")
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set(title=task, ylim=(-4, 104), xlabel=f"key/value heads for {full} query heads")
    all_axes[0].set_ylabel("% of tokens right (measured)")
    legend(figure, all_axes[-1])
    return figure
