"""The documentation: every Python block runs, every command exists, every link leads somewhere.

Documents are README.md, the other Markdown files at the root and the manuals in kernels/, llama2/
and bench/. Each Python block runs as it stands, in a process of its own, in which torch, Triton and
Transformers were imported before. Without a GPU it runs in
Triton's interpreter, with device="cpu" where it says device="cuda"; nothing else is changed. A
block that needs what no test has, such as a checkpoint, is preceded by the line `<!-- needs: … -->`
and is skipped. MARKED lists these, so that none is skipped unseen.

The other blocks are commands. They are not run: the tests check that their options exist.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import forked

from gqa_kernels import fused
from llama2.cli import _parser

ROOT = Path(__file__).parent.parent
FRONT_PAGE_LINES = 160
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+?) -->\n+)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMANDS = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
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


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MANUALS = [ROOT / "kernels" / "README.md", ROOT / "bench" / "README.md"]
DOCUMENTS = {
    _name(path): path.read_text(encoding="utf-8")
    for path in sorted({*ROOT.glob("*.md"), *(ROOT / "llama2").rglob("*.md"), *MANUALS})
}
PAGES = DOCUMENTS | {
    _name(path): path.read_text(encoding="utf-8")
    for folder in ("bench", "tests")
    for path in sorted((ROOT / folder).rglob("*.md"))
}
BLOCKS = [block for name, text in DOCUMENTS.items() for block in blocks(text, name)]


@pytest.mark.parametrize("name", sorted({block.where.partition(":")[0] for block in BLOCKS}))
def test_blocks_run_as_they_stand(name, tmp_path):
    """In folders from which nothing can be imported or read by accident."""
    runnable = {block.where: block.code for block in BLOCKS if block.needs is None}
    codes = {where: code for where, code in runnable.items() if where.startswith(f"{name}:")}
    environment = {}
    if not torch.cuda.is_available():
        codes = {
            where: code.replace('device="cuda"', 'device="cpu"') for where, code in codes.items()
        }
        environment["TRITON_INTERPRET"] = "1"
    forked(codes, tmp_path, "torch", "triton", "transformers", **environment)


def test_a_block_that_fails_is_named(tmp_path):
    codes = {"good:1": "x = 1", "bad:2": "assert x", "good:3": "import os; assert not os.listdir()"}
    with pytest.raises(AssertionError, match=r"NameError(.|\n)*failed: \['bad:2'\]"):
        forked(codes, tmp_path)


def test_those_that_are_skipped_are_known():
    assert [block.needs for block in BLOCKS if block.needs is not None] == MARKED


def test_no_block_is_missed():
    """Nor is one fenced in another way than the pattern knows."""
    pattern = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*py", re.MULTILINE | re.IGNORECASE)
    starts = sum(len(pattern.findall(text)) for text in DOCUMENTS.values())
    assert len(BLOCKS) == starts > 0


def test_what_a_block_is():
    text = "a\n```python\nx = 1\n```\n<!-- needs: a GPU -->\n\n```python\ny\n```\n```\nz\n```\n"
    assert blocks(text, "R.md") == [
        Block("R.md:2", "x = 1\n", None),
        Block("R.md:7", "y\n", "a GPU"),
    ]


# --- commands --------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The command lines of a document's blocks, without comments and line breaks."""
    lines = []
    for block in _COMMANDS.findall(text):
        joined = block.replace("\\\n", " ")
        lines += [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def _subcommands() -> dict[str, argparse.ArgumentParser]:
    found = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices)


def _known_options(command: str) -> set[str] | str | None:
    """What a command's options must be among, or the text that names them; None: not ours."""
    if match := re.search(r"(?:^|-m )llama2 ([a-z][a-z-]*)", command):
        return set(_subcommands()[match[1]]._option_string_actions)
    if match := re.match(r"python (bench/\w+\.py)", command):
        return (ROOT / match[1]).read_text(encoding="utf-8")
    if match := re.search(r"-m (llama2(?:\.\w+)+) ", f"{command} "):
        return (ROOT / (match[1].replace(".", "/") + ".py")).read_text(encoding="utf-8")
    if re.match(r"pytest bench/", command):
        return (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    return None


def unknown(command: str) -> list[str]:
    """The options of a command, and targets of `make`, that do not exist."""
    if command.startswith("make "):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        return [name for name in command.split()[1:] if f"\n{name}:" not in makefile]
    known = _known_options(command)
    options = re.findall(r"(?<!\S)--[a-z][\w-]*", re.sub(r"^torchrun .*?-m ", "-m ", command))
    if known is None or "evaluation.lm_eval" in command:  # lm-eval's own options
        return []
    if isinstance(known, str):
        return [option for option in options if f'"{option}"' not in known]
    return [option for option in options if option not in known]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_exist(name):
    wrong = {command: found for command in commands(DOCUMENTS[name]) if (found := unknown(command))}
    assert not wrong


def test_a_command_that_does_not_exist_is_found():
    assert unknown("llama2 generate --prompt x --length 3") == ["--length"]
    assert unknown("torchrun --nproc-per-node 2 -m llama2 sft --tp 2 --tq 2") == ["--tq"]
    assert unknown("python bench/gpu.py --out x --quick") == ["--quick"]
    assert unknown("make demo brunch") == ["brunch"]
    with pytest.raises(KeyError):
        unknown("llama2 degenerate --prompt x")
    assert commands("```\na \\\n  b  # c\n# d\n```\n") == ["a    b"]


# --- links -----------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCED.sub("", text)):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def _leads_somewhere(name: str, link: str) -> bool:
    path, _, fragment = link.partition("#")
    target = (ROOT / name).parent / path if path else ROOT / name
    if not fragment:
        return target.exists()
    return target.is_file() and fragment in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = _LINK.findall(_FENCED.sub("", PAGES[name]))
    assert not [link for link in links if not _leads_somewhere(name, link)]


def test_a_link_that_leads_nowhere_is_found():
    assert _leads_somewhere("README.md", "kernels/README.md#limits")
    assert not _leads_somewhere("README.md", "kernels/README.md#no-limits")
    assert not _leads_somewhere("kernels/README.md", "kernels/README.md")


def test_what_an_anchor_is():
    text = "# A `b`: c's\n## A `b`: c's\n```\n# no\n```\n### Key/value [heads?](x.md)\n"
    assert anchors(text) == {"a-b-cs", "a-b-cs-1", "keyvalue-heads"}


# --- the front page and numbers -----------------------------------------------------------------


def test_the_front_page_is_short():
    assert len(DOCUMENTS["README.md"].splitlines()) <= FRONT_PAGE_LINES


def test_long_manuals_begin_with_their_contents():
    for name, text in DOCUMENTS.items():
        if Path(name).name == "README.md" and len(text.splitlines()) > FRONT_PAGE_LINES:
            head = text.split("\n## ")[0]
            sections = set(re.findall(r"\]\(#([^)]+)\)", head))
            missing = {
                slug
                for slug in anchors("\n".join(re.findall(r"^## .+$", text, re.MULTILINE)))
                if slug not in sections
            }
            assert not missing, name


def test_the_table_of_gradients_is_that_of_the_results(tmp_path):
    results = tmp_path / "gradients.json"
    results.write_bytes((ROOT / "bench" / "results" / "gradients.json").read_bytes())
    printed = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gradients.py"), "--plot", "--results", str(results)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    assert results.with_suffix(".svg").stat().st_size > 0
    rows = printed.strip().splitlines()[2:]
    assert len(rows) == 12
    for row in rows:
        assert row in DOCUMENTS["kernels/README.md"]


def test_the_front_page_quotes_the_plot_under_it():
    content = json.loads((ROOT / "bench" / "results" / "gradients.json").read_text("utf-8"))
    at_four = content["offsets"].index(4.0)
    theirs, ours = (
        100 * content["errors"][name]["dq"][at_four] for name in ("PyTorch, fused", "gqa_kernels")
    )
    sentence = " ".join(DOCUMENTS["README.md"].split())
    assert f"an error of {theirs:.0f} % in bfloat16, this package's with {ours:.1f} %" in sentence


def test_the_manual_lists_every_function():
    table = re.findall(r"^\| `(\w+)\(", DOCUMENTS["kernels/README.md"], re.MULTILINE)
    assert set(fused.__all__) <= set(table)
