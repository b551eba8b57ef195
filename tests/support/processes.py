"""Code in a process of its own."""

import os
import subprocess
import sys


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
