"""The folder of a page: what may be written over there."""

from collections.abc import Iterable
from pathlib import Path

TITLE = "What fewer key/value heads cost and buy"

_BEGINNING = 1000  # bytes in which a file says whose it is
_MARKS = {
    "report.html": f"<title>{TITLE}</title>",
    "report.md": f"# {TITLE}\n",
    "results.json": '"kind": "study"',
    "log.jsonl": '"origin": ',
    "measured.json": '"num_kv_heads": ',
}


def check_folder(folder: Path, plots: Iterable[str] = ()) -> None:
    """Refuses a folder where a page, or a study, would replace what is none.

    Args:
        plots: names of files that belong to the page if there is one.
    Raises:
        ValueError: a file has the name, but not the beginning of one of these; or a plot has no
            page.
    """
    for name, mark in _MARKS.items():
        file = folder / name
        if file.exists():
            with file.open("rb") as opened:
                ours = mark.encode() in opened.read(_BEGINNING)
            if not ours:
                raise ValueError(_foreign(file))
    if not (folder / "report.md").exists():
        for name in plots:
            if (folder / name).exists():
                raise ValueError(_foreign(folder / name))


def _foreign(file: Path) -> str:
    return f"out: expected a directory in which {file.name} is of an earlier page; got {file}"
