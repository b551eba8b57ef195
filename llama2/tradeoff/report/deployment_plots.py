"""Plots of speed and memory: computed for the deployment, and measured where there are rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama2.reporting.drawing import head_colours, legend, panels, plain_log
from llama2.tradeoff.report.deployment_tables import SHOWN_BATCHES, Question
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.roofline import GIB

_DEFAULT_BATCH = SHOWN_BATCHES[-1]  # against the context, where no batch was asked for


def speed(question: Question) -> Figure:
    """Tokens per second against batch and against context, to the end of memory."""
    deployments, heads = question.deployments(), question.config.num_q_heads
    figure, (by_batch, by_context) = panels(2, width=4.8, height=4)
    batch = question.batch or _DEFAULT_BATCH
    for count, (colour, marker) in head_colours(deployments).items():
        deployment = deployments[count]
        style = {"color": colour, "marker": marker, "label": heads_name(count, heads)}
        _speed_line(
            by_batch,
            lambda x, of=deployment: of.decode_tokens_per_s(x, question.context),
            1,
            deployment.largest_batch(question.context),
            deployment.crossover_batch(question.context),
            style,
        )
        _speed_line(
            by_context,
            lambda x, of=deployment: of.decode_tokens_per_s(batch, x),
            64,
            deployment.largest_context(batch),
            deployment.crossover_context(batch),
            style,
        )
    by_batch.set(xlabel="batch, sequences", title=f"at a context of {question.context:,} tokens")
    by_context.set(xlabel="context, tokens", title=f"at a batch of {batch:,}")
    by_batch.set_ylabel("tokens per second (computed)")
    for axes in (by_batch, by_context):
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.set(xlim=(1, 10), ylim=(1, 10))
            axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")
        plain_log(axes, "x")
        plain_log(axes, "y")
    legend(figure, by_batch)
    return figure


def _speed_line(
    axes: Axes,
    speed: Callable[[int], float],
    first: int,
    last: int,
    crossover: int,
    style: dict[str, Any],
) -> None:
    """A line to `last`, where memory ends, with a bar there and the marker at the crossover."""
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
    """Bytes on a GPU against the context: weights, reserve, and keys and values of the batch."""
    deployments, heads = question.deployments(), question.config.num_q_heads
    batch = question.batch or _DEFAULT_BATCH
    figure, (axes,) = panels(1, width=6.6, height=4)
    contexts = np.geomspace(64, max(131_072, question.context), 80)
    for count, (colour, marker) in head_colours(deployments).items():
        deployment = deployments[count]
        cache = batch * contexts * deployment.kv_bytes_per_token_per_rank
        used = (deployment.weight_bytes_per_rank + deployment.reserved_bytes + cache) / GIB
        style = {"color": colour, "marker": marker, "markevery": 13}
        axes.plot(contexts, used, label=heads_name(count, heads), **style)
    size = question.gpu.memory_bytes / GIB
    axes.axhline(size, color="black", linestyle="--", label=f"{question.gpu.name}: {size:.0f} GiB")
    axes.axvline(question.context, color="#666666", linestyle=":", label="expected context")
    axes.set(xlabel="context, tokens", title=f"batch {batch:,}")
    axes.set_ylabel("GiB per GPU (computed)")
    fixed = [d.weight_bytes_per_rank + d.reserved_bytes for d in deployments.values()]
    axes.set(
        yscale="log", ylim=(0.8 * min(size, min(fixed) / GIB), 4 * max(size, max(fixed) / GIB))
    )
    plain_log(axes, "x")
    plain_log(axes, "y")
    legend(figure, axes)
    return figure


def measured(rows: Sequence[dict[str, Any]], expected_context: int) -> Figure:
    """Measured time of a step of one shape, and its per cent of the floor, against batch, at the
    context nearest to the expected one."""
    found = [row for row in rows if row["tag"] == "measured"]
    context = min(
        {row["context"] for row in found}, key=lambda one: (abs(one - expected_context), one)
    )
    found = [row for row in found if row["context"] == context]
    figure, (time, floor) = panels(2, width=4.8, height=4)
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
        time.errorbar(x, y, ends, capsize=3, **style)
        floor.plot(x, [row["percent_of_floor"] for row in line], **style)
    time.set(title=f"a step of {found[0]['num_layers']} layers, context {context:,}")
    time.set_ylabel("microseconds (measured)")
    floor.set(title="share of the device's own rate", ylim=(0, 105))
    floor.set_ylabel("% of the floor (measured)")
    plain_log(time, "y")
    for axes in (time, floor):
        axes.set_xlabel("batch, sequences")
        plain_log(axes, "x")
    legend(figure, time)
    return figure
