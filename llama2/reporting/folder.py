"""The folder of a page: what may be written over there."""

from collections.abc import Iterable, Mapping
from pathlib import Path

_BEGINNING = 1000  # bytes in which a file says whose it is
PAGE = ("report.html", "report.md")


def page_marks(title: str) -> dict[str, str]:
    """Returns the marks, as of `check_own_files`, of a page's two files."""
    return dict(zip(PAGE, (f"<title>{title}</title>", f"# {title}\n"), strict=True))


def check_own_files(folder: Path, marks: Mapping[str, str], plots: Iterable[str] = ()) -> None:
    """Refuses a folder where a page, or its data, would replace what is none.

    Args:
        marks: by the names of files, what stands in the beginning of one of an earlier page.
        plots: names of files that belong to the page if there is one.
    Raises:
        ValueError: a file has the name, but not the beginning of one of these; or a plot has no
            page.
    """
    for name, mark in marks.items():
        file = folder / name
        if file.exists():
            with file.open("rb") as opened:
                ours = mark.encode() in opened.read(_BEGINNING)
            if not ours:
                raise ValueError(_foreign(file))
    if not (folder / PAGE[1]).exists():
        for name in plots:
            if (folder / name).exists():
                raise ValueError(_foreign(folder / name))


def _foreign(file: Path) -> str:
    return f"out: expected a directory in which {file.name} is of an earlier page; got {file}"
