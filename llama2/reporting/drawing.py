"""The look of plots: style, colours, axes; files are reproducible byte for byte.

Numbers of heads, which are ordered, have colours of viridis; kinds of runs have colours of Okabe
and Ito's palette. Both can be distinguished by colour-blind readers, and every series has its own
marker as well.
"""

import io
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

_STYLE = {
    "figure.facecolor": "white",
    "font.size": 10.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same in every viewer
    "svg.hashsalt": "tradeoff",
    "text.parse_math": False,  # names may contain $
}
_NO_METADATA = {  # no time, no version
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
    "png": {"Software": None},
}
_DPI = 72 * 2  # dots per inch of a PNG; an SVG has 72 of its units per inch
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vP*X<>"


def image(draw: Callable[[], Figure], form: str) -> bytes:
    """Draws a figure in this module's style, which does not outlast the call, and returns the
    file's contents.

    Args:
        form: "svg" or "png".
    """
    written = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's settings would change the bytes
        matplotlib.rcParams.update(_STYLE)
        settings = {"metadata": _NO_METADATA[form], "bbox_inches": "tight", "dpi": _DPI}
        draw().savefig(written, format=form, **settings)
    return written.getvalue()


def svg(draw: Callable[[], Figure]) -> str:
    """Returns the text of the SVG file of `image`."""
    return image(draw, "svg").decode("utf-8")


def panels(
    count: int, *, width: float = 4.6, height: float = 3.7, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def panel(width: float = 4.4, height: float = 3.3) -> tuple[Figure, Axes]:
    """Returns a figure with one panel, readable on a narrow screen."""
    figure, (axes,) = panels(1, width=width, height=height)
    return figure, axes


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Draws the legend below the axes, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")


def plain_log(axes: Axes, name: str) -> None:
    """Makes an axis logarithmic, with ticks such as 2k; more ticks for a shorter range."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    steps = (1, 1.5, 2, 3, 5) if high < 8 * low else (1, 2, 5) if high < 200 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def head_colours(counts: Iterable[int]) -> dict[int, tuple[Any, str]]:
    """Returns a colour and a marker for each count; more heads are darker."""
    ordered = sorted(counts, reverse=True)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(ordered)))
    return {
        count: (tuple(shade), _MARKERS[index % len(_MARKERS)])
        for index, (count, shade) in enumerate(zip(ordered, shades, strict=True))
    }


def series(index: int) -> dict[str, Any]:
    return {"color": _PALETTE[index % len(_PALETTE)], "marker": _MARKERS[index % len(_MARKERS)]}
