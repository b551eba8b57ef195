"""A page as a list of blocks, rendered to one HTML file or to Markdown with SVG files.

Numbers are tagged with their origin: table columns, figures and sentences have a tag, which both
renderings print.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tag = Literal["measured", "computed", "published"]
MISSING = "–"


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Contents:
    """Links to all headings of the page."""


@dataclass(frozen=True)
class Sentence:
    """A text with the origin of its numbers; None for a text without numbers except settings."""

    text: str
    tag: Tag | None = None


@dataclass(frozen=True)
class Paragraph:
    sentences: Sequence[Sentence]
    lead: bool = False  # set in large type


@dataclass(frozen=True)
class Items:
    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Column:
    """A column of numbers with one origin or, without a tag, of names and settings."""

    name: str
    tag: Tag | None = None
    wraps: bool = True  # False: a cell stays on one line, and a narrow screen scrolls the table


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot; `name` is its file's name, `svg` the whole file."""

    name: str
    svg: str
    caption: str
    tags: Sequence[Tag]


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Contents | Paragraph | Items | Table | Figure | Code

_STYLE = """
:root { color-scheme: light dark; --text: #1c2026; --page: #fff; --line: #d0d5dc; --soft: #f3f5f8;
  --measured: #0b6e4f; --computed: #8a4b00; --published: #2b4c9b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --page: #15181d; --line: #3a414c;
  --soft: #1f242c; --measured: #6fd3ad; --computed: #f0b469; --published: #9db8ff; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 48rem; } .lead { font-size: 1.15rem; }
.badge { font-size: .72em; font-weight: 600; border: 1px solid; border-radius: .6em;
  padding: 0 .45em; white-space: nowrap; }
.measured { color: var(--measured); } .computed { color: var(--computed); }
.published { color: var(--published); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
  vertical-align: top; }
thead th { background: var(--soft); } .number { text-align: right; }
td.line { white-space: nowrap; } .line ~ td:not(.line) { min-width: 12rem; }
nav a { display: inline-block; margin: 0 1.2rem .4rem 0; }
.note, figcaption { font-size: .88rem; max-width: 48rem; margin: .3rem 0 0; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; background: #fff;
  border-radius: 4px; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  tr, figure { break-inside: avoid; } .wide { overflow: visible; } }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Returns one self-contained HTML file: styles and plots inline, no script, no network."""
    body = "\n".join(_html_block(block, blocks) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Returns the blocks as Markdown; a figure refers to `name`.svg in the same directory."""
    body = "\n\n".join(_markdown_block(block, blocks) for block in blocks)
    return f"# {_mark(title)}\n\n{body}\n"


def printable(text: str) -> str:
    """Replaces characters that cannot be shown, which file names may contain."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _badges(tags: Sequence[Tag | None]) -> str:
    return "".join(f' <span class="badge {tag}">{tag}</span>' for tag in tags if tag)


def _html_sentence(sentence: Sentence) -> str:
    return _escape(sentence.text) + _badges([sentence.tag])


def _anchor(text: str) -> str:
    """The id that GitHub gives a heading: the contents list is the same in both renderings."""
    return re.sub(r"[^\w -]", "", printable(text).lower()).strip().replace(" ", "-")


def _headings(blocks: Sequence[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, Heading)]


def _html_block(block: Block, blocks: Sequence[Block]) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{_anchor(text)}">{_escape(text)}</h2>'
        case Contents():
            links = (
                f'<a href="#{_anchor(text)}">{_escape(text)}</a>' for text in _headings(blocks)
            )
            return f"<nav>{chr(10).join(links)}</nav>"
        case Paragraph(sentences, lead):
            kind = ' class="lead"' if lead else ""
            return f"<p{kind}>{' '.join(map(_html_sentence, sentences))}</p>"
        case Items(sentences):
            items = "\n".join(f"<li>{_html_sentence(sentence)}</li>" for sentence in sentences)
            return f"<ul>\n{items}\n</ul>"
        case Table():
            return _html_table(block)
        case Figure(name, svg, caption, tags):
            return (
                f'<figure>\n<div class="wide">{_inline(name, svg, caption)}</div>\n'
                f"<figcaption>{_escape(caption)}{_badges(tags)}</figcaption>\n</figure>"
            )
        case Code(text):
            return f"<pre>{chr(10).join(map(_escape, text.splitlines()))}</pre>"


def _html_table(table: Table) -> str:
    kinds = [_class(column) for column in table.columns]
    head = "".join(
        f'<th scope="col"{kind}>{_escape(column.name)}{_badges([column.tag])}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{_escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in table.rows
    )
    note = f'\n<p class="note">{_escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide"><table>\n<caption>{_escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>{note}"
    )


def _class(column: Column) -> str:
    classes = ["number"] * bool(column.tag) + ["line"] * (not column.wraps)
    return f' class="{" ".join(classes)}"' if classes else ""


def _inline(name: str, svg: str, caption: str) -> str:
    """Returns the svg element alone, with ids made unique on the page by the plot's name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_escape(caption)}"', 1).strip()


def _mark(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", printable(text))


def _marked_tags(tags: Sequence[Tag | None]) -> str:
    return "".join(f" *({tag})*" for tag in tags if tag)


def _marked_sentence(sentence: Sentence) -> str:
    return _mark(sentence.text) + _marked_tags([sentence.tag])


def _markdown_block(block: Block, blocks: Sequence[Block]) -> str:
    match block:
        case Heading(text):
            return f"## {_mark(text)}"
        case Contents():
            return "\n".join(f"- [{_mark(text)}](#{_anchor(text)})" for text in _headings(blocks))
        case Paragraph(sentences, lead):
            text = " ".join(map(_marked_sentence, sentences))
            return f"> {text}" if lead else text
        case Items(sentences):
            return "\n".join(f"- {_marked_sentence(sentence)}" for sentence in sentences)
        case Table(title, columns, rows, note):
            head = [_mark(column.name) + _marked_tags([column.tag]) for column in columns]
            rule = ["---:" if column.tag else "---" for column in columns]
            cells = [head, rule, *([_mark(cell) for cell in row] for row in rows)]
            lines = "\n".join("| " + " | ".join(row) + " |" for row in cells)
            return f"**{_mark(title)}**\n\n{lines}" + (f"\n\n{_mark(note)}" if note else "")
        case Figure(name, _, caption, tags):
            return f"![{_mark(caption)}]({name}.svg)\n\n{_mark(caption)}{_marked_tags(tags)}"
        case Code(text):
            return "\n".join("    " + printable(line) for line in text.splitlines())
