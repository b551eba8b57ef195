"""The plots of a report: rates over sizes, and every row under its roofline."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write files

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from record import MEASUREMENT

Row = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]


def draw(content: dict[str, Any], folder: Path) -> list[str]:
    """Writes what the rows allow; returns the files' names."""
    rows = [row for row in content["rows"] if row["status"] == "ok"]
    files = []

    def save(name: str, axes: Axes, title: str) -> None:
        gpu = content["environment"].get("gpu")
        axes.set_title(f"{title}\n{gpu}", fontsize=10)
        if content["kind"] != MEASUREMENT:
            axes.text(
                0.5, 0.5, content["kind"].upper(), transform=axes.transAxes, rotation=25,
                ha="center", va="center", fontsize=14, color="red", alpha=0.5, wrap=True,
            )  # fmt: skip
        axes.figure.savefig(folder / name, dpi=110, bbox_inches="tight")
        plt.close(axes.figure)
        files.append(name)

    for pass_ in ("fwd", "bwd"):
        for model in sorted({row["model"] for row in rows if row["op"] == "flash_attention"}):
            lines = _series(
                rows,
                lambda row, model=model, pass_=pass_: (
                    (row["op"], row["pass"], row["model"]) == ("flash_attention", pass_, model)
                    and row["sizes"]["causal"]
                    and row["sizes"]["seq_len_q"] == row["sizes"]["seq_len_kv"]
                    and row["sizes"]["batch"] * row["sizes"]["seq_len_q"] == 16384
                ),
                "seq_len_q",
                "tflops",
            )
            if lines:
                axes = _axes(lines, "sequence length", "TFLOP/s")
                title = f"causal attention {pass_}, heads of {model}, 16384 tokens"
                save(f"attention_{pass_}_{model}.png", axes, title)
    for op, size in (
        ("rms_norm", "hidden_size"),
        ("add_rms_norm", "hidden_size"),
        ("swiglu", "intermediate_size"),
    ):
        for pass_ in ("fwd", "bwd"):
            lines = _series(
                rows,
                lambda row, op=op, pass_=pass_: (
                    (row["op"], row["pass"]) == (op, pass_) and row["sizes"]["num_tokens"] == 8192
                ),
                size,
                "tbps",
            )
            if lines:
                axes = _axes(lines, size.replace("_", " "), "TB/s")
                save(f"{op}_{pass_}.png", axes, f"{op} {pass_}, 8192 tokens")
    for model in sorted({row["model"] for row in rows if row["op"] == "decode_attention"}):
        for batch in (1, 64):
            lines = _series(
                rows,
                lambda row, model=model, batch=batch: (
                    (row["op"], row["model"]) == ("decode_attention", model)
                    and row["sizes"]["batch"] == batch
                    and not row["sizes"]["ragged"]
                    and not {"page_size", "cache_dtype"} & set(row["sizes"])
                ),
                "max_seq_len",
                "tbps",
            )
            if lines:
                axes = _axes(lines, "context", "TB/s")
                title = f"decode attention, heads of {model}, batch {batch}"
                save(f"decode_{model}_B{batch}.png", axes, title)
    if rows and content["ceilings"]:
        save("roofline.png", _roofline(rows, content["ceilings"]), "roofline, triton backend")
    return files


def _series(rows: list[Row], wanted: Callable[[Row], bool], size: str, rate: str) -> Lines:
    """(size, rate) points of the wanted rows, by backend."""
    lines: Lines = defaultdict(list)
    for row in rows:
        if wanted(row):
            lines[row["backend"]].append((row["sizes"][size], row[rate]))
    return {name: sorted(points) for name, points in lines.items()}


def _axes(lines: Lines, xlabel: str, ylabel: str) -> Axes:
    _, axes = plt.subplots(figsize=(6.5, 4))
    for name, points in sorted(lines.items(), key=lambda line: line[0] != "triton"):
        width = 2.5 if name == "triton" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes


def _roofline(rows: list[Row], ceilings: dict[str, float]) -> Axes:
    """TFLOP/s over flops per byte: the two ceilings, and every row of ours under them."""
    _, axes = plt.subplots(figsize=(6.5, 4))
    by_op: Lines = defaultdict(list)
    for row in rows:
        if row["backend"] == "triton" and row["flops"] and row["bytes"]:
            by_op[row["op"]].append((row["flops"] / row["bytes"], row["tflops"]))
    for op, points in sorted(by_op.items()):
        axes.scatter(*zip(*points, strict=True), s=16, label=op)
    intensity = [2.0**power for power in range(-3, 15)]
    bandwidth, matrix = ceilings["copy_bytes_per_s"], ceilings["mma_flops_per_s"]
    axes.plot(
        intensity,
        [min(matrix, x * bandwidth) * 1e-12 for x in intensity],
        color="black",
        linewidth=1,
        label="ceilings of this run",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("flops per byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return axes
