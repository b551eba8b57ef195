"""Makes `gqa_kernels` and `llama2` importable from a checkout that nobody has installed."""

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def search_path() -> list[str]:
    """Folders to add to the import path; none where the packages are installed.

    The checkout's root is not among them: there `kernels/` would be found under the import name
    `kernels`, which belongs to another package. A folder with a link to `llama2` is.
    """
    if all(importlib.util.find_spec(name) for name in ("gqa_kernels", "llama2")):
        return []
    checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]  # each has a folder of its own
    links = Path(tempfile.gettempdir()) / f"gqa_kernels_path_{os.getuid()}_{checkout}"
    links.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (links / "llama2").symlink_to(ROOT / "llama2", target_is_directory=True)
    return [str(ROOT / "kernels"), str(links)]


def extend_path() -> None:
    """Adds `search_path` to this process's path, and to that of the processes it starts."""
    added = search_path()
    sys.path[:0] = added
    inherited = os.environ.get("PYTHONPATH")
    if added:
        os.environ["PYTHONPATH"] = os.pathsep.join([*added, *([inherited] if inherited else [])])


def make_importable() -> None:
    """`extend_path`; without a GPU the kernels run in Triton's interpreter, if this comes first."""
    extend_path()
    import torch

    if not torch.cuda.is_available():
        from gqa_kernels import interpreter

        interpreter.enable()
