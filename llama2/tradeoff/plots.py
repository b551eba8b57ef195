"""The page's plots as SVG text: the same input gives the same bytes.

Numbers of heads, which have an order, are colours of viridis; kinds of runs are colours of Okabe
and Ito's palette: both can be told apart by readers who do not see all colours, and every series
has a marker of its own as well.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llama2.tradeoff import accounting, comparisons, runs
from llama2.tradeoff.comparisons import Comparison
from llama2.tradeoff.deployment_tables import SHOWN_BATCHES, Question, shares
from llama2.tradeoff.roofline import GIB, Deployment
from llama2.tradeoff.statistics import noise_floor, share_estimate
from llama2.tradeoff.wording import MATCHING_NAMES, heads_name, percent

_STYLE = {
    "figure.facecolor": "white",
    "font.size": 10.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "svg.hashsalt": "tradeoff",
    "text.parse_math": False,  # a name with a $ is a name
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no time, no version
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vP*X<>"
_DEFAULT_BATCH = SHOWN_BATCHES[-1]  # of plots against the context, where no batch was asked for

Point = tuple[int, Comparison]  # a number of heads, and how it compares


def svg(draw: Callable[[], Figure]) -> str:
    """Draws in this module's style, which ends with the call, and gives the file's text."""
    written = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own settings would change the bytes
        matplotlib.rcParams.update(_STYLE)
        draw().savefig(written, format="svg", metadata=_NO_METADATA, bbox_inches="tight")
    return written.getvalue()


def _panels(
    count: int, *, width: float = 4.6, height: float = 3.7, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def _plain_log(axes: Axes, name: str) -> None:
    """A logarithmic axis with plain numbers, the more of them the shorter its range."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    steps = (1, 1.5, 2, 3, 5) if high < 8 * low else (1, 2, 5) if high < 200 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


def _head_colours(counts: Iterable[int]) -> dict[int, tuple[Any, str]]:
    """A colour and a marker for each count, dark for many heads."""
    ordered = sorted(counts, reverse=True)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ordered)))
    return {
        count: (tuple(shade), _MARKERS[index % len(_MARKERS)])
        for index, (count, shade) in enumerate(zip(ordered, shades, strict=True))
    }


def _series(index: int) -> dict[str, Any]:
    return {"color": _PALETTE[index % len(_PALETTE)], "marker": _MARKERS[index % len(_MARKERS)]}


def relative_speeds(results: dict[str, Any], question: Question, matching: str) -> dict[int, float]:
    """For the study's counts: tokens per second over MHA's, of the deployment's shape with the same
    share of key/value heads; at the batch that was asked for, or each count's largest.

    A count is left out whose share is no whole number of heads there, or not one that `tp` ranks
    can share; all are where MHA has no room for a sequence and no batch was asked for.
    """
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


def pareto(results: dict[str, Any], question: Question) -> Figure:
    """Quality lost against speed gained: trained from scratch, and converted at the largest α."""
    alphas = runs.alphas(results)
    methods = [method for method in runs.methods(results) if method in ("aligned", "mean")]
    methods = methods or runs.methods(results)[:2]
    scratch = {
        f"from scratch, {MATCHING_NAMES[matching]}": (
            matching,
            _points(
                (count, comparisons.from_scratch(results, count, matching))
                for count in runs.fewer_heads(results, "scratch")
            ),
        )
        for matching in runs.matchings(results)
    }
    converted = {
        f"converted, {method}": (
            "same_ffn",
            _points(
                (count, comparisons.by_conversion(results, count, method, alphas[-1]))
                for count in runs.fewer_heads(results, "converted")
            ),
        )
        for method in methods
    }
    halves = {
        "From scratch, against MHA": scratch,
        f"Converted, α = {percent(alphas[-1]) if alphas else ''}, against the control": converted,
    }
    halves = {
        title: half for title, half in halves.items() if any(points for _, points in half.values())
    }
    figure, panels = _panels(max(len(halves), 1), width=5.2, height=4.4)
    noise = noise_floor(list(runs.values(runs.mha(results)).values()))
    for axes, (title, half) in zip(panels, halves.items(), strict=False):
        axes.axhline(0, color="black", linewidth=1)
        if noise:
            spread = noise.typical_difference
            axes.axhspan(-spread, spread, color="#bbbbbb", alpha=0.4, linewidth=0, label="noise")
        axes.plot([1], [0], color="black", marker="*", markersize=13, linestyle="", label="MHA")
        for index, (name, (matching, points)) in enumerate(half.items()):
            speeds = relative_speeds(results, question, matching)
            shown = [(count, point) for count, point in points if count in speeds]
            shift = 1 + 0.02 * (index - (len(half) - 1) / 2)  # or equal speeds hide each other
            _error_bars(axes, [speeds[count] * shift for count, _ in shown], shown, name, index)
        _speed_axis(axes, results, relative_speeds(results, question, "same_ffn"))
        axes.set(title=title, xlabel="decode speed over MHA's (computed)")
        axes.set_ylabel("bits per byte more (measured)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=9)
    return figure


def _points(pairs: Iterable[tuple[int, Comparison | None]]) -> list[Point]:
    return [(count, comparison) for count, comparison in pairs if comparison]


def _error_bars(
    axes: Axes, x: Sequence[float], points: Sequence[Point], name: str, index: int
) -> None:
    estimates = [comparison.seeds for _, comparison in points]
    halves = [0.0 if e.high is None else e.high - e.mean for e in estimates]
    means = [estimate.mean for estimate in estimates]
    axes.errorbar(x, means, halves, label=name, capsize=4, linewidth=1, **_series(index))


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
    figure, panels = _panels(len(counts), width=3.6, height=4.2, sharey=True)
    base = fmean(runs.values(runs.mha(results)).values())
    for axes, count in zip(panels, counts, strict=True):
        for index, method in enumerate(runs.methods(results)):
            found = {alpha: runs.converted(results, count, method, alpha) for alpha in alphas}
            _band(axes, found, method, **_series(index))
        controls = {alpha: runs.control(results, alpha) for alpha in alphas}
        _band(axes, controls, "control: MHA trained on", color="black", marker=".", linestyle="--")
        axes.axhline(base, color="#666666", linestyle=":", label="MHA before conversion")
        scratch = runs.values(runs.scratch(results, count, "same_ffn"))
        if scratch:
            level = fmean(scratch.values())
            axes.axhline(level, color="#666666", linestyle="-.", label="from scratch, same FFN")
        axes.set(title=heads_name(count, full), xlabel="α, % of the base's steps")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _plain_log(panels[0], "y")
    panels[0].set_ylabel("bits per byte (measured)")
    _legend(figure, panels[-1])
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
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for index, (name, kind) in enumerate(kinds.items()):
            found = {place: kind(count) for place, count in enumerate(counts) if kind(count)}
            shift = 0.08 * (index - (len(kinds) - 1) / 2)
            estimates = [share_estimate(runs.recall(one, task)) for one in found.values()]
            low = [100 * (e.mean - (e.mean if e.low is None else e.low)) for e in estimates]
            high = [100 * ((e.mean if e.high is None else e.high) - e.mean) for e in estimates]
            means, places = [100 * e.mean for e in estimates], [place + shift for place in found]
            line = {"label": name, "capsize": 3, "linewidth": 1, **_series(index)}
            axes.errorbar(places, means, [low, high], **line)
        chance = 100 * results["recall_chance"][task]
        axes.axhline(chance, color="black", linestyle=":", label="guessing")
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set(title=task, ylim=(-4, 104), xlabel=f"key/value heads for {full} query heads")
    panels[0].set_ylabel("% of tokens right (measured)")
    _legend(figure, panels[-1])
    return figure


def speed(question: Question) -> Figure:
    """Tokens per second against batch and against context, to the end of memory."""
    deployments, heads = question.deployments(), question.config.num_q_heads
    figure, (by_batch, by_context) = _panels(2, width=4.8, height=4)
    batch = question.batch or _DEFAULT_BATCH
    for count, (colour, marker) in _head_colours(deployments).items():
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
        _plain_log(axes, "x")
        _plain_log(axes, "y")
    _legend(figure, by_batch)
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
    figure, (axes,) = _panels(1, width=6.6, height=4)
    contexts = np.geomspace(64, max(131_072, question.context), 80)
    for count, (colour, marker) in _head_colours(deployments).items():
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
    axes.set(yscale="log", ylim=(0.8 * min(fixed) / GIB, 4 * max(size, max(fixed) / GIB)))
    _plain_log(axes, "x")
    _plain_log(axes, "y")
    _legend(figure, axes)
    return figure


def measured(rows: Sequence[dict[str, Any]], question: Question) -> Figure:
    """Measured time of a step, and its per cent of the floor, against batch at one context."""
    found = [row for row in rows if row["tag"] == "measured"]
    context = min(
        {row["context"] for row in found}, key=lambda one: (abs(one - question.context), one)
    )
    found = [row for row in found if row["context"] == context]
    figure, (time, floor) = _panels(2, width=4.8, height=4)
    colours = _head_colours({row["num_kv_heads"] for row in found})
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
        style["label"] = heads_name(count, question.config.num_q_heads)
        time.errorbar(x, y, ends, capsize=3, **style)
        floor.plot(x, [row["percent_of_floor"] for row in line], **style)
    time.set(title=f"a step of {found[0]['num_layers']} layers, context {context:,}")
    time.set_ylabel("microseconds (measured)")
    floor.set(title="share of the device's own rate", ylim=(0, 105))
    floor.set_ylabel("% of the floor (measured)")
    _plain_log(time, "y")
    for axes in (time, floor):
        axes.set_xlabel("batch, sequences")
        _plain_log(axes, "x")
    _legend(figure, time)
    return figure
