"""Plots of a study: quality against speed, and recall against heads and against steps."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from llama2.reporting.drawing import head_colours, legend_below, panel, series
from llama2.reporting.statistics import share_estimate
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import candidates
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import Comparison

Series = Mapping[str, Mapping[int, Comparison]]  # by a name, of each number of heads


def relative_speeds(question: Question, study_heads: int) -> dict[int, float]:
    """Returns the question's tokens per second over MHA's, by the study's number of key/value
    heads that is the same share of heads; without those that the deployment cannot have."""
    found = {
        each.num_kv_heads * study_heads / question.config.num_q_heads: each.speed_up
        for each in candidates(question)
    }
    return {int(count): speed for count, speed in found.items() if speed and count.is_integer()}


def text_series(results: dict[str, Any], speeds: Mapping[int, float]) -> Series:
    found = {
        count: comparison
        for count in runs.fewer_heads(results, "text")
        if count in speeds and (comparison := comparisons.from_scratch(results, count))
    }
    return {"from scratch": found} if found else {}


def records_series(results: dict[str, Any], speeds: Mapping[int, float]) -> Series:
    found = {
        arm_name(arm): {
            count: comparison
            for count in runs.fewer_heads(results, "records", arm["name"])
            if count in speeds and (comparison := comparisons.records(results, arm["name"], count))
        }
        for arm in runs.arms(results)
    }
    return {name: points for name, points in found.items() if points}


def arm_name(arm: dict[str, Any]) -> str:
    return f"{arm['fields']} fields, {arm['steps']:,} steps, rate {arm['peak_lr']:g}"


def pareto(kinds: Series, speeds: Mapping[int, float], ylabel: str) -> Figure:
    """Plots differences from MHA against the speed of the same share of heads."""
    figure, axes = panel(height=3.6)
    axes.axhline(0, color="black", linewidth=1)
    axes.plot([1], [0], color="black", marker="*", markersize=12, linestyle="", label="MHA")
    for index, (name, points) in enumerate(kinds.items()):
        shift = 1 + 0.015 * (index - (len(kinds) - 1) / 2)  # or error bars hide each other
        estimates = [comparison.seeds for comparison in points.values()]
        halves = [0.0 if e.high is None else e.high - e.mean for e in estimates]
        axes.errorbar(
            [speeds[count] * shift for count in points],
            [estimate.mean for estimate in estimates],
            halves,
            label=name,
            capsize=4,
            linewidth=1,
            **series(index),
        )
    _speed_axis(axes, speeds)
    axes.set(xlabel="predicted decode speed over MHA's", ylabel=ylabel)
    legend_below(figure, axes, 1)
    return figure


def _speed_axis(axes: Axes, speeds: Mapping[int, float]) -> None:
    """Sets ticks at the counts of heads: their speed below, the count above. Counts whose labels
    would overlap share a tick."""
    apart = 0.09 * math.log(max(speeds.values()) / min(speeds.values()))
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
    top.set_xlabel("key/value heads of the study's models", fontsize=9)


def recall(results: dict[str, Any]) -> Figure:
    """Plots the accuracy in "records" against the number of key/value heads, a line per arm."""
    full, arms = results["records"]["shape"]["num_q_heads"], runs.arms(results)
    counts = sorted({c for arm in arms for c in arm["num_kv_heads"]}, reverse=True)
    figure, axes = panel(height=4)
    for index, arm in enumerate(arms):
        found = {
            place: runs.records(results, arm["name"], count)
            for place, count in enumerate(counts)
            if runs.records(results, arm["name"], count)
        }
        estimates = [
            share_estimate(list(runs.values(each, "accuracy").values())) for each in found.values()
        ]
        shift = 0.06 * (index - (len(arms) - 1) / 2)
        axes.errorbar(
            [place + shift for place in found],
            [100 * e.mean for e in estimates],
            [
                [100 * (e.mean - (e.mean if e.low is None else e.low)) for e in estimates],
                [100 * ((e.mean if e.high is None else e.high) - e.mean) for e in estimates],
            ],
            label=arm_name(arm),
            capsize=3,
            linewidth=1.2,
            **series(index),
        )
    chance = 100 * results["records"]["chance"]
    axes.axhline(chance, color="black", linestyle=":", label="guessing")
    axes.set_xticks(range(len(counts)), [heads_name(count, full) for count in counts])
    axes.set(ylim=(0, 104), xlabel="key/value heads", ylabel="% of answers right")
    legend_below(figure, axes, 1)
    return figure


def learning(results: dict[str, Any], arms: list[dict[str, Any]]) -> Figure:
    """Plots the training loss in "records" against steps: means over seeds, arms by line style."""
    full = results["records"]["shape"]["num_q_heads"]
    counts = {count for arm in arms for count in arm["num_kv_heads"]}
    figure, axes = panel(height=4)
    for count, (colour, _) in head_colours(counts).items():
        for arm, style in zip(arms, ("-", "--", ":"), strict=False):
            found = list(runs.records(results, arm["name"], count).values())
            lengths = {len(run["loss_curve"]) for run in found}
            if not found or lengths == {0}:
                continue
            curve = [
                fmean(losses) for losses in zip(*(run["loss_curve"] for run in found), strict=False)
            ]
            steps = (np.arange(len(curve)) + 0.5) * arm["steps"] / len(curve)
            label = f"{heads_name(count, full)}, {arm['steps']:,} steps"
            axes.plot(steps, curve, color=colour, linestyle=style, label=label)
    axes.set(xlabel="training steps", ylabel="training loss, nats", ylim=(0, None))
    legend_below(figure, axes, 2)
    return figure
