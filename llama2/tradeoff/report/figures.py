"""A plot as a block of the page."""

from collections.abc import Callable

from matplotlib.figure import Figure as Drawing

from llama2.reporting import drawing
from llama2.reporting.document import Figure, Tag


def figure(name: str, draw: Callable[[], Drawing], caption: str, *tags: Tag) -> Figure:
    return Figure(name, drawing.svg(draw), caption, tags)
