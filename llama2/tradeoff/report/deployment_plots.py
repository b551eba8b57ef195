"""Plots of speed and memory: predicted for the deployment, and measured where there are rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama2.reporting.drawing import head_colours, legend_below, panel, plain_log
from llama2.tradeoff.question import Question
from llama2.tradeoff.report.deployment_tables import SHOWN_BATCH
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.roofline import GIB, Deployment


def speed_by_batch(question: Question) -> Figure:
    """Plots tokens per second against the batch, to the end of memory."""
    figure, axes = panel()
    for style, deployment in _styled(question):
        _speed_line(
            axes,
            lambda x, of=deployment: of.decode_tokens_per_s(x, question.context),
            1,
            deployment.largest_batch(question.context),
            deployment.crossover_batch(question.context),
            style,
        )
    axes.set(xlabel="batch, sequences", title=f"at a context of {question.context:,} tokens")
    return _finished(figure, axes, question.batch)


def speed_by_context(question: Question) -> Figure:
    """Plots tokens per second against the context, to the end of memory."""
    figure, axes = panel()
    batch = question.batch or SHOWN_BATCH
    for style, deployment in _styled(question):
        _speed_line(
            axes,
            lambda x, of=deployment: of.decode_tokens_per_s(batch, x),
            64,
            deployment.largest_context(batch),
            deployment.crossover_context(batch),
            style,
        )
    axes.set(xlabel="context, tokens", title=f"at a batch of {batch:,}")
    return _finished(figure, axes, question.context)


def _styled(question: Question) -> Iterator[tuple[dict[str, Any], Deployment]]:
    deployments = question.deployments()
    for count, (colour, marker) in head_colours(deployments).items():
        label = heads_name(count, question.config.num_q_heads)
        yield {"color": colour, "marker": marker, "label": label}, deployments[count]


def _finished(figure: Figure, axes: Axes, marked: int | None) -> Figure:
    axes.set_ylabel("tokens per second")
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.set(xlim=(1, 10), ylim=(1, 10))
        axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")
    elif marked:
        axes.axvline(marked, color="#666666", linestyle=":")
    plain_log(axes, "x")
    plain_log(axes, "y")
    legend_below(figure, axes, 3)
    return figure


def _speed_line(
    axes: Axes,
    speed: Callable[[int], float],
    first: int,
    last: int,
    crossover: int,
    style: dict[str, Any],
) -> None:
    """Draws a line to `last`, where memory ends, a bar there and a marker at the crossover."""
    if last < first:
        axes.plot([], [], **style | {"label": f"{style['label']}: does not fit"})
        return
    x = sorted({round(value) for value in np.geomspace(first, last, 60)})
    axes.plot(x, [speed(value) for value in x], color=style["color"], linewidth=1.4)
    axes.plot([last], [speed(last)], color=style["color"], marker="|", markersize=13)
    inside = first <= crossover <= last
    at = ([crossover], [speed(crossover)]) if inside else ([], [])
    axes.plot(*at, markeredgecolor="black", markersize=7, **style)


def memory(question: Question) -> Figure:
    """Plots the memory of a GPU against the context: weights, reserve, and the batch's cache."""
    batch = question.batch or SHOWN_BATCH
    figure, axes = panel()
    contexts = np.geomspace(64, max(131_072, question.context), 80)
    fixed = []
    for style, deployment in _styled(question):
        fixed.append((deployment.weight_bytes_per_rank + deployment.reserved_bytes) / GIB)
        cache = batch * contexts * deployment.kv_bytes_per_token_per_rank / GIB
        axes.plot(contexts, fixed[-1] + cache, markevery=13, **style)
    size = question.gpu.memory_bytes / GIB
    axes.axhline(size, color="black", linestyle="--", label=f"memory: {size:.0f} GiB")
    axes.axvline(question.context, color="#666666", linestyle=":", label="expected context")
    axes.set(xlabel="context, tokens", title=f"at a batch of {batch:,}")
    axes.set_ylabel("GiB per GPU")
    axes.set(yscale="log", ylim=(0.8 * min(size, *fixed), 4 * max(size, *fixed)))
    plain_log(axes, "x")
    plain_log(axes, "y")
    legend_below(figure, axes, 3)
    return figure


def measured(rows: Sequence[dict[str, Any]], expected_context: int) -> Figure:
    """Plots the measured time of a step of one shape against batch, at the context nearest to
    the expected one."""
    found = [row for row in rows if row["tag"] == "measured"]
    context = min(
        {row["context"] for row in found}, key=lambda one: (abs(one - expected_context), one)
    )
    found = [row for row in found if row["context"] == context]
    figure, axes = panel()
    colours = head_colours({row["num_kv_heads"] for row in found})
    for count, (colour, marker) in colours.items():
        line = sorted(
            (row for row in found if row["num_kv_heads"] == count), key=lambda row: row["batch"]
        )
        x, y = [row["batch"] for row in line], [row["microseconds"] for row in line]
        ends = [
            [row["microseconds"] - row["microseconds_p20"] for row in line],
            [row["microseconds_p80"] - row["microseconds"] for row in line],
        ]
        style = {"color": colour, "marker": marker}
        style["label"] = heads_name(count, line[0]["num_q_heads"])
        axes.errorbar(x, y, ends, capsize=3, **style)
    axes.set(title=f"{found[0]['num_layers']} layers, context {context:,}")
    axes.set(xlabel="batch, sequences", ylabel="microseconds")
    plain_log(axes, "x")
    plain_log(axes, "y")
    legend_below(figure, axes, 3)
    return figure
