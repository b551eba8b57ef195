"""A page as a list of blocks, rendered to one HTML file, to Markdown with SVG files, or to JSON.

Tables and figures show the origin of their numbers in one badge; a table whose columns differ in
origin shows one badge per group of columns.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

Tag = Literal["measured", "computed", "predicted", "published", "simulated", "this study"]
MISSING = "–"


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Contents:
    """Links to all headings of the page."""


@dataclass(frozen=True)
class Sentence:
    """A text with the origin of its numbers; None for a text without numbers except settings, or
    next to a table or figure that shows the origin."""

    text: str
    tag: Tag | None = None


@dataclass(frozen=True)
class Paragraph:
    """`name` is the id of its HTML element, for a script."""

    sentences: Sequence[Sentence]
    lead: bool = False  # set in large type
    name: str = ""


@dataclass(frozen=True)
class Items:
    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Column:
    """A column of numbers with one origin or, without a tag, of names and settings.

    Attributes:
        wraps: whether a cell may take several lines; a narrow screen scrolls the table.
        words: the cells are text, aligned left, although they have a tag.
        key: the attribute data-key of the column's cells in HTML, for a script.
    """

    name: str
    tag: Tag | None = None
    wraps: bool = True
    words: bool = False
    key: str = ""

    @property
    def is_number(self) -> bool:
        return self.tag is not None and not self.words


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header.

    Attributes:
        name: the id of its HTML element; row_keys: the attributes data-key of its rows, for a
            script.
        marked: the index of a row that is highlighted.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""
    name: str = ""
    row_keys: Sequence[str] = ()
    marked: int | None = None


@dataclass(frozen=True)
class Figure:
    """A plot; `name` is its file's name, plot-`name` the id of its HTML element, `svg` the whole
    file."""

    name: str
    svg: str
    caption: str
    tags: Sequence[Tag]


@dataclass(frozen=True)
class Figures:
    """Plots beside each other where there is room."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Markup:
    """HTML that is inserted unchanged, and left out of the other renderings: forms, scripts."""

    html: str


Block = Heading | Contents | Paragraph | Items | Table | Figure | Figures | Code | Markup

_STYLE = """
:root { color-scheme: light dark; --text: #1c2026; --page: #fff; --line: #d0d5dc; --soft: #f3f5f8;
  --marked: #e4f3ec; --measured: #0b6e4f; --predicted: #8a4b00; --published: #2b4c9b;
  --study: #7a2f86; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --page: #15181d; --line: #3a414c;
  --soft: #1f242c; --marked: #1d3a30; --measured: #6fd3ad; --predicted: #f0b469;
  --published: #9db8ff; --study: #dfa3ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 48rem; } .lead { font-size: 1.15rem; } a { color: var(--published); }
.badge { font-size: .75rem; font-weight: 600; border: 1px solid; border-radius: .6em;
  padding: 0 .45em; white-space: nowrap; }
.measured { color: var(--measured); } .computed, .predicted, .simulated { color: var(--predicted); }
.published { color: var(--published); } .study { color: var(--study); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
  vertical-align: top; }
thead th { background: var(--soft); vertical-align: bottom; }
thead .group { border-left: 3px solid var(--page); }
tbody th { font-weight: inherit; }
tr > th:first-child { position: sticky; left: 0; background: var(--page); }
thead tr > th:first-child { background: var(--soft); }
td.number, th.number { text-align: right; } td.number, tbody th { white-space: nowrap; }
td:not(.number) { min-width: 6rem; }
td.words, .line ~ td:not(.line) { min-width: 12rem; } td.line { white-space: nowrap; }
tr.marked > * , tr.marked > th:first-child { background: var(--marked); font-weight: 600; }
.note, figcaption { font-size: .88rem; max-width: 48rem; margin: .3rem 0 0; }
figure { margin: 1rem 0; min-width: 0; }
.plots { display: grid; gap: 0 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.plot { background: #fff; color: #1c2026; border-radius: 4px; }
.plot svg { display: block; max-width: 100%; height: auto; }
.plot svg:not([width]) { width: 100%; max-width: 36rem; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
nav { margin: 1.5rem 0; } nav a { display: inline-block; margin: 0 1.2rem .4rem 0; }
@media (max-width: 30rem) { body { padding: .8rem; } th, td { padding: .25rem .4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  tr, figure { break-inside: avoid; } .wide { overflow: visible; } }
"""


def to_html(title: str, blocks: Sequence[Block], style: str = "") -> str:
    """Returns one self-contained HTML file: styles, plots and scripts inline, no network."""
    body = "\n".join(_html_block(block, blocks) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Returns the blocks as Markdown; a figure refers to `name`.svg in the same directory."""
    shown = (_markdown_block(block, blocks) for block in blocks if not isinstance(block, Markup))
    return "\n\n".join([f"# {_mark(title)}", *shown]) + "\n"


def to_json(title: str, blocks: Sequence[Block]) -> dict[str, Any]:
    """Returns the blocks as JSON objects: their fields and "kind"; figures without the SVG text."""
    shown = [block for block in blocks if not isinstance(block, Markup | Contents)]
    return {"title": title, "blocks": [_json_block(block) for block in shown]}


def figures_of(blocks: Sequence[Block]) -> list[Figure]:
    """Returns all plots of a page."""
    return [
        figure
        for block in blocks
        for figure in (block.figures if isinstance(block, Figures) else [block])
        if isinstance(figure, Figure)
    ]


def _json_block(block: Block) -> dict[str, Any]:
    if isinstance(block, Figures):
        return {"kind": "figures", "figures": [_json_block(figure) for figure in block.figures]}
    fields = {name: value for name, value in asdict(block).items() if name != "svg"}
    return {"kind": type(block).__name__.lower(), **fields}


def printable(text: str) -> str:
    """Replaces characters that cannot be shown, which file names may contain."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _badges(tags: Sequence[Tag | None]) -> str:
    return "".join(f' <span class="badge {tag.split()[-1]}">{tag}</span>' for tag in tags if tag)


def _html_sentence(sentence: Sentence) -> str:
    return _escape(sentence.text) + _badges([sentence.tag])


def _headings(blocks: Sequence[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, Heading)]


def _anchor(text: str) -> str:
    """The id that GitHub gives a heading: the contents list is the same in both renderings."""
    return re.sub(r"[^\w -]", "", printable(text).lower()).strip().replace(" ", "-")


def _html_block(block: Block, blocks: Sequence[Block]) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{_anchor(text)}">{_escape(text)}</h2>'
        case Contents():
            links = (
                f'<a href="#{_anchor(text)}">{_escape(text)}</a>' for text in _headings(blocks)
            )
            return f"<nav>{chr(10).join(links)}</nav>"
        case Paragraph(sentences, lead, name):
            attributes = f' id="{name}"' * bool(name) + ' class="lead"' * lead
            return f"<p{attributes}>{' '.join(map(_html_sentence, sentences))}</p>"
        case Items(sentences):
            items = "\n".join(f"<li>{_html_sentence(sentence)}</li>" for sentence in sentences)
            return f"<ul>\n{items}\n</ul>"
        case Table():
            return _html_table(block)
        case Figure(name, svg, caption, tags):
            return (
                f'<figure id="plot-{name}">\n'
                f'<div class="plot">{_inline(name, svg, caption)}</div>\n'
                f"<figcaption>{_escape(caption)}{_badges(tags)}</figcaption>\n</figure>"
            )
        case Figures(figures):
            shown = "\n".join(_html_block(figure, blocks) for figure in figures)
            return f'<div class="plots">\n{shown}\n</div>'
        case Code(text):
            return f"<pre>{chr(10).join(map(_escape, text.splitlines()))}</pre>"
        case Markup(text):
            return text


def _origins(table: Table) -> list[Tag]:
    return list(dict.fromkeys(column.tag for column in table.columns if column.tag))


def _html_table(table: Table) -> str:
    origins = _origins(table)
    groups = ""
    if len(origins) > 1:
        cells = (
            f'<th class="group" colspan="{len(list(columns))}">{_badges([tag]).strip()}</th>'
            for tag, columns in groupby(table.columns, key=lambda column: column.tag)
        )
        groups = f"<tr>{''.join(cells)}</tr>"
    kinds = [_class(column) for column in table.columns]
    keys = [f' data-key="{column.key}"' if column.key else "" for column in table.columns]
    head = "".join(
        f'<th scope="col"{kind}>{_escape(column.name)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )

    def row_of(index: int, row: Sequence[str]) -> str:
        attributes = f' data-key="{table.row_keys[index]}"' if table.row_keys else ""
        attributes += ' class="marked"' if index == table.marked else ""
        first, *rest = (
            (_escape(cell), kind + key) for cell, kind, key in zip(row, kinds, keys, strict=True)
        )
        cells = "".join(f"<td{attribute}>{cell}</td>" for cell, attribute in rest)
        return f'<tr{attributes}><th scope="row"{first[1]}>{first[0]}</th>{cells}</tr>'

    rows = "\n".join(row_of(index, row) for index, row in enumerate(table.rows))
    note = f'\n<p class="note">{_escape(table.note)}</p>' if table.note else ""
    name = f' id="{table.name}"' if table.name else ""
    title = _escape(table.title)
    return (
        f"<h3>{title}{_badges(origins) if len(origins) == 1 else ''}</h3>\n"
        f'<div class="wide" tabindex="0"><table{name} aria-label="{title}">\n'
        f"<thead>{groups}<tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>{note}"
    )


def _class(column: Column) -> str:
    found = {"number": column.is_number, "words": column.words, "line": not column.wraps}
    names = " ".join(name for name, has in found.items() if has)
    return f' class="{names}"' * bool(names)


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
        case Table():
            return _markdown_table(block)
        case Figure(name, _, caption, tags):
            return f"![{_mark(caption)}]({name}.svg)\n\n{_mark(caption)}{_marked_tags(tags)}"
        case Figures(figures):
            return "\n\n".join(_markdown_block(figure, blocks) for figure in figures)
        case Code(text):
            return "\n".join("    " + printable(line) for line in text.splitlines())
        case Markup():
            raise TypeError("block: expected one that Markdown can show; got Markup")


def _markdown_table(table: Table) -> str:
    origins = _origins(table)
    several = len(origins) > 1
    head = [
        _mark(column.name) + _marked_tags([column.tag] if several else [])
        for column in table.columns
    ]
    rule = ["---:" if column.is_number else "---" for column in table.columns]
    cells = [head, rule, *([_mark(cell) for cell in row] for row in table.rows)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    badge = "" if several else _marked_tags(origins)
    note = f"\n\n{_mark(table.note)}" if table.note else ""
    return f"**{_mark(table.title)}**{badge}\n\n{lines}{note}"
