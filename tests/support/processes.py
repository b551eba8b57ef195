"""Runs code in separate processes."""

import json
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


_FORKS = """
import importlib, json, os, sys, traceback
for module in sys.argv[1:]:
    importlib.import_module(module)
given, failed = json.load(sys.stdin), []
for number, (name, code) in enumerate(given.items()):
    process = os.fork()
    if not process:
        try:
            os.mkdir(str(number))
            os.chdir(str(number))
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if os.waitpid(process, 0)[1]:
        failed.append(name)
if failed:
    sys.exit(f"failed: {failed}")
"""


def forked(codes: dict[str, str], folder: Path, *imported: str, **environment: str) -> None:
    """Runs each code in a process of its own, in a new folder in `folder`. They are forked from one
    that has imported only these modules."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, "-c", _FORKS, *imported],
        cwd=folder,
        env=kept | environment,
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr


def compiling(*arguments: str, folder: Path = SUPPORT) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process in which Triton compiles, with a folder on its path."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = filter(None, [str(folder), environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
