"""A figure of training logs: a panel per quantity, a colour per run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llama2.reporting.document import printable
from llama2.reporting.drawing import series

_COLUMNS, _LEGEND_COLUMNS = 4, 2
_MOST_POINTS = 200  # per curve; with longer runs, a point is the mean of several steps
_LARGEST = 1e100  # far beyond float32; products of numbers beyond 1e154 would overflow in an axis

# The fields of a log in the order of their panels, with titles. Others follow, under their names.
_TITLES = {
    "loss": "loss (nats)",
    "reward": "combined reward (logit)",
    "reward_helpful": "reward of helpfulness (logit)",
    "reward_safety": "reward of safety (logit)",
    "objective": "reward − β · KL",
    "kl": "KL from --init (nats per answer)",
    "kl_per_token": "KL from --init (nats per token)",
    "kl_k3_per_token": "KL from --init, k3 (nats per token)",
    "entropy": "entropy (nats per token)",
    "policy_loss": "policy loss",
    "clip_fraction": "clip fraction",
    "approx_kl": "KL from old policy (nats per token)",
    "first_ratio_deviation": "largest |ratio − 1| before the first step",
    "value_loss": "value loss",
    "explained_variance": "explained variance of returns",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "critic_grad_norm": "critic's gradient norm",
    "answer_tokens_mean": "mean tokens per answer",
    "answer_tokens_max": "most tokens of an answer",
    "cut": "share of answers without an end",
    "rollout_seconds": "sampling (seconds)",
    "score_seconds": "scoring (seconds)",
    "train_seconds": "gradient steps (seconds)",
    "gathers": "weight gathers for sampling",
}
_NO_PANELS = ("step", "seconds", "tokens")  # of the last two, their growth is drawn


@dataclass(frozen=True)
class Run:
    """A run to draw.

    Attributes:
        name: its label.
        records: the records of its log, at least one; each has "step" and "seconds".
        held_out: pairs (steps done, value) by quantity.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    held_out: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """Returns a field of all records, float64 `[records]`; NaN where it is missing, not a
        number or too large for a plot."""
        found = (record.get(name) for record in self.records)
        numbers = [
            value if isinstance(value, int | float) and abs(value) <= _LARGEST else math.nan
            for value in found
        ]
        return np.array(numbers, dtype=np.float64)


@dataclass(frozen=True)
class Curve:
    """Points of one run in one panel, float64 `[points]` each.

    Attributes:
        low, high: the band around the points; None for curves without one.
    """

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def draw(runs: Sequence[Run]) -> Figure:
    """Returns the figure of at least one run; `curves` defines its points.

    Raises:
        ValueError: there is no point.
    """
    size = -(-max(len(run.records) for run in runs) // _MOST_POINTS)
    found = [curves(run, size) for run in runs]
    titles = list(dict.fromkeys(title for each in found for title in each))
    if not titles:
        raise ValueError("runs: expected a finite number in a log; got none")
    figure, panels = _grid(len(titles), -(-len(runs) // _LEGEND_COLUMNS))
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(printable(title), fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.tick_params(labelbottom=True)
        for index, each in enumerate(found):
            if title in each:
                _draw(panel, each[title], index)
    handles = [Line2D([], [], color=series(index)["color"]) for index in range(len(runs))]
    names = [printable(run.name) for run in runs]
    figure.legend(handles, names, loc="outside upper left", ncols=_LEGEND_COLUMNS)
    is_ppo = all("policy_loss" in run.records[-1] for run in runs)
    unit = "iteration" if is_ppo else "step"
    means = f"; a point is the mean of {size:,} {unit}s, a band their range" if size > 1 else ""
    figure.supxlabel(unit + means, fontsize=10)
    return figure


def curves(run: Run, size: int) -> dict[str, Curve]:
    """Returns the curves of a run by the titles of their panels: every field of its log with finite
    numbers, its results on held-out data, and its speed.

    Args:
        size: steps per point. A point of a field is the mean over these steps, with a band from the
            smallest to the largest value. A point of the speed is the average since the previous
            point.
    """
    names = dict.fromkeys(name for record in run.records for name in record)
    known = [name for name in _TITLES if name in names]
    others = [name for name in names if name not in (*_TITLES, *_NO_PANELS)]
    steps = run.values("step")
    found = {
        _TITLES.get(name, name): _means(steps, run.values(name), size) for name in known + others
    }
    for name, points in run.held_out.items():
        done, values = np.array(points, dtype=np.float64).T
        found[f"held-out {name}"] = Curve(done, values)
    seconds, tokens = run.values("seconds"), run.values("tokens")
    if np.isfinite(tokens).any():
        found["tokens per second"] = _ratio(steps, tokens, seconds, size)
    else:
        found["seconds per step"] = _ratio(steps, seconds, steps + 1, size)
    return {title: curve for title, curve in found.items() if len(curve.steps)}


def _means(steps: np.ndarray, values: np.ndarray, size: int) -> Curve:
    finite = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[finite], values[finite]
    parts = [(steps[part], values[part]) for part in _parts(steps, size)]
    means = [[where.mean(), part.mean(), part.min(), part.max()] for where, part in parts]
    return Curve(*np.array(means, dtype=np.float64).reshape(-1, 4).T)


def _ratio(steps: np.ndarray, above: np.ndarray, below: np.ndarray, size: int) -> Curve:
    """Returns the increase of `above` divided by that of `below` from point to point; both start at
    0."""
    finite = np.isfinite(steps) & np.isfinite(above) & np.isfinite(below)
    steps, above, below = steps[finite], above[finite], below[finite]
    ends = [part[-1] for part in _parts(steps, size)]
    numerators, denominators = (np.diff(x[ends], prepend=0.0) for x in (above, below))
    grows = denominators > 0  # seconds are rounded to milliseconds
    return Curve(steps[ends][grows], numerators[grows] / denominators[grows])


def _parts(steps: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the indices of the records of each group of `size` steps, in order."""
    if not len(steps):
        return []
    borders = np.flatnonzero(np.diff(steps // size)) + 1
    return np.split(np.arange(len(steps)), borders)


def _grid(count: int, legend_rows: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3 if count <= 6 else _COLUMNS)
    rows = -(-count // columns)
    height = 2.7 * rows + 0.25 * (legend_rows + 1)
    figure = Figure(figsize=(3.4 * columns, height), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for unused in places[count:]:
        unused.remove()
    return figure, places[:count]


def _draw(axes: Axes, curve: Curve, index: int) -> None:
    style = series(index) | ({"markersize": 4} if len(curve.steps) < 10 else {"marker": ""})
    axes.plot(curve.steps, curve.values, **style)
    if curve.low is not None:
        axes.fill_between(
            curve.steps, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0
        )
