"""The result file. It is rewritten after every row, so an interrupted run keeps its rows.

This module does not import PyTorch.
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
    """One row of a result file. `status` is "ok", "skip" (not applicable here) or "fail"."""

    status: str
    info: dict[str, Any]
    reason: str = ""
    samples: list[float] = field(default_factory=list)  # seconds

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "reason": self.reason, **self.info}


class Record:
    """Rows and the environment in which they were measured.

    Args:
        path: None keeps everything in memory.
        kind: `MEASUREMENT` or `DRY_RUN`; the report warns unless it is `MEASUREMENT`.
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
            "groups_left": 0,  # not measured within the budget
            "rows": [],
        }

    def resume(self) -> set[str]:
        """Loads the rows of the file if it exists; returns their groups.

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
        # Written to another file and renamed, so the file is complete at any time.
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _without_folders(argument: str) -> str:
    """Returns a command-line argument with file names instead of paths of this machine."""
    option, equals, value = argument.rpartition("=")
    return option + equals + Path(value).name


def read(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a result file, or one of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a result file of `pytest bench`; {error}") from error
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise ValueError(f"{path}: expected a result file of `pytest bench` (schema 1)")
    return content
