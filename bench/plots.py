"""The plots of a report: rates over sizes, and every row of ours under the roofline."""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import llama2.reporting.headless  # noqa: F401  (imports matplotlib without a display)

# isort: split
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import MEASUREMENT, OURS

from llama2.reporting import document
from llama2.reporting.drawing import panels, series, svg

Row = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]


def draw(content: dict[str, Any]) -> list[document.Figure]:
    """The plots that the rows of a result file allow."""
    rows = [row for row in content["rows"] if row["status"] == "ok"]
    names = sorted({row["backend"] for row in rows}, key=lambda name: (name != OURS, name))
    styles = {name: series(index) for index, name in enumerate(names)}  # the same in all plots
    plots = []
    for name, caption, size, rate, wanted in _wanted(rows):
        lines = _series(rows, wanted, size, rate)
        if lines:

            def plot(lines=lines, size=size, rate=rate) -> Figure:
                return _marked(_rates(lines, styles, _AXES[size], _AXES[rate]), content["kind"])

            plots.append(document.Figure(name, svg(plot), caption, ["measured"]))
    if rows and content["ceilings"]:
        caption = (
            "Roofline: every row of ours (triton) under the two ceilings of this run, its copy "
            "bandwidth and its matrix rate. Flops and bytes are computed."
        )
        drawn = svg(lambda: _marked(_roofline(rows, content["ceilings"]), content["kind"]))
        plots.append(document.Figure("roofline", drawn, caption, ["measured", "computed"]))
    return plots


_AXES = {
    "seq_len_q": "sequence length, tokens",
    "max_seq_len": "context, tokens",
    "hidden_size": "hidden size",
    "intermediate_size": "intermediate size",
    "tflops": "TFLOP/s",
    "tbps": "TB/s",
}


def _wanted(rows: list[Row]) -> Iterator[tuple[str, str, str, str, Callable[[Row], bool]]]:
    """(name, caption, size, rate, which rows) of every plot over a size."""
    for pass_ in ("fwd", "bwd"):
        for model in sorted({row["model"] for row in rows if row["op"] == "flash_attention"}):

            def attention(row: Row, model=model, pass_=pass_) -> bool:
                sizes = row["sizes"]
                return (
                    (row["op"], row["pass"], row["model"]) == ("flash_attention", pass_, model)
                    and sizes["causal"]
                    and sizes["seq_len_q"] == sizes["seq_len_kv"]
                    and sizes["batch"] * sizes["seq_len_q"] == 16384
                )

            caption = f"Causal attention, {pass_}, heads of {model}, 16,384 tokens per call."
            yield f"attention_{pass_}_{model}", caption, "seq_len_q", "tflops", attention
    for op, size in (
        ("rms_norm", "hidden_size"),
        ("add_rms_norm", "hidden_size"),
        ("swiglu", "intermediate_size"),
    ):
        for pass_ in ("fwd", "bwd"):

            def row_op(row: Row, op=op, pass_=pass_) -> bool:
                return (row["op"], row["pass"]) == (op, pass_) and row["sizes"][
                    "num_tokens"
                ] == 8192

            yield f"{op}_{pass_}", f"{op}, {pass_}, 8,192 tokens.", size, "tbps", row_op
    for model in sorted({row["model"] for row in rows if row["op"] == "decode_attention"}):
        for batch in (1, 64):

            def decode(row: Row, model=model, batch=batch) -> bool:
                return (
                    (row["op"], row["model"]) == ("decode_attention", model)
                    and row["sizes"]["batch"] == batch
                    and not row["sizes"]["ragged"]
                    and not {"page_size", "cache_dtype"} & set(row["sizes"])
                )

            caption = f"Decode attention, heads of {model}, batch {batch}."
            yield f"decode_{model}_B{batch}", caption, "max_seq_len", "tbps", decode


def _series(rows: list[Row], wanted: Callable[[Row], bool], size: str, rate: str) -> Lines:
    """(size, rate) points of the wanted rows, by backend."""
    lines: Lines = defaultdict(list)
    for row in rows:
        if wanted(row):
            lines[row["backend"]].append((row["sizes"][size], row[rate]))
    return {name: sorted(points) for name, points in lines.items()}


def _rates(lines: Lines, styles: dict[str, dict[str, Any]], xlabel: str, ylabel: str) -> Figure:
    figure, [axes] = panels(1)
    for name, style in styles.items():
        if name in lines:
            width = 2.5 if name == OURS else 1.2
            axes.plot(*zip(*lines[name], strict=True), linewidth=width, label=name, **style)
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [_size(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    _legend_below(figure, axes)
    return figure


def _size(size: float) -> str:
    return f"{size // 1024:.0f}Ki" if size >= 10240 and size % 1024 == 0 else f"{size:.0f}"


def _roofline(rows: list[Row], ceilings: dict[str, float]) -> Figure:
    """TFLOP/s over flops per byte: the two ceilings, and every row of ours under them."""
    figure, [axes] = panels(1, height=4.3)
    by_op: Lines = defaultdict(list)
    for row in rows:
        if row["backend"] == OURS and row["flops"] and row["bytes"]:
            by_op[row["op"]].append((row["flops"] / row["bytes"], row["tflops"]))
    for index, (op, points) in enumerate(sorted(by_op.items())):
        axes.scatter(*zip(*points, strict=True), s=18, label=op, **series(index))
    bandwidth, matrix = ceilings["copy_bytes_per_s"], ceilings["mma_flops_per_s"]
    intensity = [2.0**-3, matrix / bandwidth, 2.0**14]
    rates = [min(matrix, x * bandwidth) * 1e-12 for x in intensity]
    axes.plot(intensity, rates, color="black", linewidth=1, label="ceilings of this run")
    axes.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # in place of mathtext
    _legend_below(figure, axes)
    return figure


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the axes, where it covers no data and the plot fits a narrow screen."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)


def _marked(figure: Figure, kind: str) -> Figure:
    """Writes the kind of the numbers across the plot unless they are measurements."""
    if kind != MEASUREMENT:
        axes = figure.axes[0]
        axes.text(
            0.5, 0.5, textwrap.fill(kind.upper(), 28), transform=axes.transAxes, rotation=25,
            ha="center", va="center", fontsize=12, color="red", alpha=0.5,
        )  # fmt: skip
    return figure
