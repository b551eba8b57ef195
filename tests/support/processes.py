"""Runs code in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def fresh(code: str, **environment: str) -> None:
    """Runs code in a new process, in a folder from which nothing can be imported by accident."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def compiling(*arguments: str, folder: Path = SUPPORT) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process in which Triton compiles, with a folder on its path."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = filter(None, [str(folder), environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
