"""Provenance of a result: the command, the packages, the machine and the commit of the checkout."""

import argparse
import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def made_with(arguments: argparse.Namespace, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the provenance that a result file records.

    Args:
        packages: packages to record besides gqa-kernels and torch.
    """
    return {
        "command": vars(arguments).get("command_line"),
        "packages": {name: version(name) for name in ("gqa-kernels", "torch", *packages)},
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit_of(Path(__file__)),
    }


def source_sha256(folder: Path) -> str:
    """Returns the SHA-256 of the names and contents of a folder's Python files, in the order of
    their names. Any checkout or installation with the same files has the same hash."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def commit_of(file: Path) -> str | None:
    """Returns the checkout's commit, with "+changes" if it is not clean; None if there is no git,
    no checkout, or a checkout that does not track the file, such as another project's around an
    install."""
    file = file.resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}+changes" if changed else name
