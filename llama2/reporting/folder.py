"""Checks that a page does not overwrite foreign files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

_BEGINNING = 1000  # bytes in which a file has its mark
PAGE = ("report.html", "report.md")


def page_marks(title: str) -> dict[str, str]:
    """Returns the marks of a page's two files for `check_own_files`."""
    return dict(zip(PAGE, (f"<title>{title}</title>", f"# {title}\n"), strict=True))


def check_own_files(folder: Path, marks: Mapping[str, str], plots: Iterable[str] = ()) -> None:
    """Raises ValueError if a page, or its data, would replace other files of a folder.

    Args:
        marks: by file name, a text at the beginning of that file in an earlier page.
        plots: names of files that belong to the page if there is one.
    Raises:
        ValueError: a file has such a name but not its mark, or there is a plot without a page.
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
    return f"out: expected a directory whose {file.name} is of an earlier page; got {file}"
