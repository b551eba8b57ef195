"""Every Python block of the documentation runs as it stands, each in a process of its own.

Without a GPU the blocks run in Triton's interpreter, with device="cpu" where they say
device="cuda"; nothing else is changed. A block that needs what no test has, such as a checkpoint,
is preceded by the line `<!-- needs: … -->` and is skipped. Which ones do is listed here, so that
none is skipped unseen.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+?) -->\n+)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARKED = ["a checkpoint"]


class Block(NamedTuple):
    where: str
    code: str
    needs: str | None


def blocks(text: str, name: str) -> list[Block]:
    return [
        Block(f"{name}:{text[: match.start('code')].count(chr(10))}", match["code"], match["needs"])
        for match in _BLOCK.finditer(text)
    ]


DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "llama2").rglob("*.md")})
BLOCKS = [
    block
    for document in DOCUMENTS
    for block in blocks(document.read_text(encoding="utf-8"), str(document.relative_to(ROOT)))
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_it_runs_as_it_stands(block, tmp_path):
    if block.needs is not None:
        pytest.skip(f"{block.where} needs {block.needs}")
    code, environment = block.code, dict(os.environ)
    if not torch.cuda.is_available():
        code = code.replace('device="cuda"', 'device="cpu"')
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # where nothing can be imported or read by accident
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{block.where}\n{result.stderr}"


def test_those_that_are_skipped_are_known():
    assert [block.needs for block in BLOCKS if block.needs is not None] == MARKED


def test_no_block_is_missed():
    """Nor is one fenced in another way than the pattern knows."""
    starts = sum(
        len(
            re.findall(
                r"^[ \t]*(?:```|~~~)[ \t]*py",
                document.read_text(encoding="utf-8"),
                re.MULTILINE | re.IGNORECASE,
            )
        )
        for document in DOCUMENTS
    )
    assert len(BLOCKS) == starts > 0


def test_what_a_block_is():
    text = "a\n```python\nx = 1\n```\n<!-- needs: a GPU -->\n\n```python\ny\n```\n```\nz\n```\n"
    assert blocks(text, "R.md") == [
        Block("R.md:2", "x = 1\n", None),
        Block("R.md:7", "y\n", "a GPU"),
    ]
