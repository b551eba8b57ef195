"""Makes `gqa_kernels` and `llama2` importable from a checkout that is not installed."""

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def search_path() -> list[str]:
    """The folders to add to the import path; none if the packages are installed.

    They do not include the checkout's root, where `kernels/` would be imported under the name of
    another package, but a folder with a link to `llama2`.
    """
    if all(importlib.util.find_spec(name) for name in ("gqa_kernels", "llama2")):
        return []
    checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]  # one folder per checkout
    links = Path(tempfile.gettempdir()) / f"gqa_kernels_path_{os.getuid()}_{checkout}"
    links.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (links / "llama2").symlink_to(ROOT / "llama2", target_is_directory=True)
    return [str(ROOT / "kernels"), str(links)]


def extend_path() -> None:
    """Adds `search_path` to the import path of this process and of processes that it starts."""
    added = search_path()
    sys.path[:0] = added
    inherited = os.environ.get("PYTHONPATH")
    if added:
        os.environ["PYTHONPATH"] = os.pathsep.join([*added, *([inherited] if inherited else [])])


def make_importable() -> None:
    """Calls `extend_path` and, without a GPU, enables Triton's interpreter. Call it before anything
    imports Triton."""
    extend_path()
    import torch

    if not torch.cuda.is_available():
        from gqa_kernels import interpreter

        interpreter.enable()
