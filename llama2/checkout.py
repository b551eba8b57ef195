"""The git checkout that a file is in: which commit made a result."""

import subprocess
from pathlib import Path


def commit_of(file: Path) -> str | None:
    """The checkout's commit, with "+changes" where it is not clean; None where there is no git, no
    checkout, or one that does not track the file, such as another project's around an install."""
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
