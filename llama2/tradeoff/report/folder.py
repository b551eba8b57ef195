"""The folder of a page: what may be written over there."""

from collections.abc import Iterable
from pathlib import Path

from llama2.reporting.folder import check_own_files, page_marks

TITLE = "What fewer key/value heads cost and buy"

_MARKS = {
    **page_marks(TITLE),
    "results.json": '"kind": "study"',
    "log.jsonl": '"num_kv_heads": ',
    "measured.json": '"num_kv_heads": ',
}


def check_folder(folder: Path, plots: Iterable[str] = ()) -> None:
    """`check_own_files` of a page of this kind; errors as there."""
    check_own_files(folder, _MARKS, plots)
