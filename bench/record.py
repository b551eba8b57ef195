"""The result file: rewritten after every row, so that a run cut short still reports.

Nothing here imports PyTorch: results are read where there is none.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEASUREMENT = "measurement"
DRY_RUN = "dry run: simulated times, not a measurement"
OURS = "triton"  # the backend that the others are compared with


@dataclass
class Row:
    """One line of a result file. `status`: "ok"; "skip", not applicable here; "fail"."""

    status: str
    info: dict[str, Any]
    reason: str = ""
    samples: list[float] = field(default_factory=list)  # seconds

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "reason": self.reason, **self.info}


class Record:
    """Rows and what they were measured on.

    Args:
        path: None keeps everything in memory.
        kind: `MEASUREMENT` or `DRY_RUN`; the report shows any other than the first as a warning.
    """

    def __init__(self, path: Path | None, kind: str, environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": 1,
            "kind": kind,
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "argv": [_without_folders(argument) for argument in sys.argv],
            "environment": environment,
            "ceilings": None,
            "groups_left": 0,  # that the budget did not reach
            "rows": [],
        }

    def resume(self) -> set[str]:
        """Takes over the rows of the file, if there is one; returns their groups.

        Raises:
            ValueError: the file is of another kind or GPU.
        """
        if self.path is None or not self.path.exists():
            return set()
        before = read(self.path)
        for mine, theirs in (
            (self.content["kind"], before["kind"]),
            (self.content["environment"]["gpu"], before["environment"]["gpu"]),
        ):
            if mine != theirs:
                raise ValueError(f"{self.path}: expected a file of {mine}; got one of {theirs}")
        self.content["rows"] = before["rows"]
        return {f"{row['op']}|{row['pass']}|{row['shape']}" for row in before["rows"]}

    def set_ceilings(self, ceilings: dict[str, float]) -> None:
        self.content["ceilings"] = ceilings
        self.write()

    def add(self, row: Row) -> None:
        self.content["rows"].append(row.to_json())
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A reader, or a run that is killed now, finds the old file or the new one.
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _without_folders(argument: str) -> str:
    """What was asked for, without where on whose machine."""
    option, equals, value = argument.rpartition("=")
    return option + equals + Path(value).name


def read(path: Path) -> dict[str, Any]:
    """A result file's content.

    Raises:
        ValueError: not a result file, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a result file of `pytest bench`; {error}") from error
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise ValueError(f"{path}: expected a result file of `pytest bench` (schema 1)")
    return content
