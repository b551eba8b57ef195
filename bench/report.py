"""Makes one page of a result file of `pytest bench`: losses first, then everything else.

    python bench/report.py RESULTS.json --out FOLDER

Writes FOLDER/report.html, which needs no other file and no network, the same page as
FOLDER/report.md and, where matplotlib is installed, the plots that both show. A ratio is a peer's
time over ours: above 1, ours is faster. A difference within the noise (one kernel timed twice) and
the spread of the rounds is a tie, not a loss.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import importable

importable.extend_path()

from record import MEASUREMENT, OURS
from record_form import read_checked

from llama2.reporting.document import (
    MISSING,
    Block,
    Column,
    Contents,
    Figure,
    Heading,
    Items,
    Paragraph,
    Sentence,
    Table,
    Tag,
    to_html,
    to_markdown,
)
from llama2.reporting.folder import check_own_files, page_marks
from llama2.storage import write_text

TITLE = "Benchmarks of the kernels"
STARVED = "* The device waited for the host within the call."

Row = dict[str, Any]
Group = dict[str, Row]  # the timed rows of one (op, pass, shape), by backend


def figure(value: float | None, digits: int = 3) -> str:
    """Formats a number to `digits` significant digits, without an exponent; `MISSING` for None."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def groups(rows: list[Row]) -> dict[tuple[str, str, str], Group]:
    """Timed rows by (op, pass, shape)."""
    found: dict[tuple[str, str, str], Group] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            found[row["op"], row["pass"], row["shape"]][row["backend"]] = row
    return dict(found)


def best_peer(group: Group) -> Row | None:
    peers = [row for name, row in group.items() if name != OURS]
    return min(peers, key=lambda row: row["median_us"], default=None)


def tie_width(ours: Row, peer: Row) -> float:
    return max(row[name] or 0.0 for row in (ours, peer) for name in ("noise", "spread"))


def losses(rows: list[Row]) -> list[tuple[float, Row, Row]]:
    """(fastest peer / ours, ours, that peer) of each group lost by more than a tie, worst first."""
    found = []
    for group in groups(rows).values():
        ours, peer = group.get(OURS), best_peer(group)
        if ours is None or peer is None:
            continue
        if ours["median_us"] / peer["median_us"] > 1 + tie_width(ours, peer):
            found.append((peer["median_us"] / ours["median_us"], ours, peer))
    return sorted(found, key=lambda loss: loss[0])


def _columns(names: Iterable[str], tag: Tag | None = None) -> list[Column]:
    return [Column(name, tag, wraps=name in ("what", "value", "why")) for name in names]


def _first_screen(content: dict[str, Any], rows: list[Row]) -> Iterator[Block]:
    environment, ceilings = content["environment"], content["ceilings"]
    if content["kind"] != MEASUREMENT:
        warning = f"{content['kind'].upper()}. No number on this page is a result."
        yield Paragraph([Sentence(warning)], lead=True)
    compared = [g for g in groups(rows).values() if OURS in g and best_peer(g) is not None]
    gpu = environment.get("gpu") or "an unknown GPU"
    told = f"{gpu}: ours is slower than the fastest peer at {len(losses(rows))} of {len(compared)}"
    yield Paragraph([Sentence(f"{told} compared shapes.", "measured")], lead=True)
    facts = {name: environment[name] for name in sorted(environment)}
    facts["started"] = content["started"]
    yield Table(
        "What ran, and on what",
        _columns(("what", "value")),
        [[name, "unknown" if value is None else str(value)] for name, value in facts.items()],
    )
    yield Table(
        "The device in this run",
        _columns(("what", "value")),  # untagged: text that may wrap on a narrow screen
        list(_device(ceilings, rows)),
    )
    yield Paragraph(
        [
            Sentence(
                "Times are device times in µs: medians, cold L2, inputs rotated. Floor: max(bytes "
                "/ bandwidth, flops / matrix rate) with the ceilings above. A step is a forward "
                "and a backward pass, timed as one call."
            )
        ]
    )


def _device(ceilings: dict[str, float] | None, rows: list[Row]) -> Iterator[list[str]]:
    if ceilings:
        yield ["copy, read + write", f"{ceilings['copy_bytes_per_s'] * 1e-12:.2f} TB/s"]
        yield ["read", f"{ceilings['read_bytes_per_s'] * 1e-12:.2f} TB/s"]
        yield ["bf16 8192³ product", f"{ceilings['mma_flops_per_s'] * 1e-12:.0f} TFLOP/s"]
    noise = sorted(row["noise"] for row in rows if row.get("noise") is not None)
    if noise:
        middle, most = noise[len(noise) // 2], noise[-1]
        yield ["noise, one call timed twice", f"median {middle:.1%}, largest {most:.1%}"]
    for name, what, unit in (
        ("sm_mhz", "clock of the SMs over the rows", "MHz"),
        ("power_w", "power over the rows", "W"),
    ):
        seen = [row[name] for row in rows if row.get(name) is not None]
        if seen:
            yield [what, f"{min(seen):.0f} to {max(seen):.0f} {unit}"]


def _losses(rows: list[Row]) -> Iterator[Block]:
    yield Heading("Losses")
    found = losses(rows)
    if not found:
        yield Paragraph([Sentence("None beyond the noise.")])
        return
    yield Table(
        "Shapes at which a peer is faster, worst first",
        [
            *_columns(("op", "pass", "shape")),
            *_columns(("ours µs",), "measured"),
            *_columns(("fastest peer",)),
            *_columns(("its µs", "peer / ours"), "measured"),
        ],
        [
            [
                *(ours["op"], ours["pass"], ours["shape"], figure(ours["median_us"])),
                *(peer["backend"], figure(peer["median_us"]), f"{ratio:.2f}"),
            ]
            for ratio, ours, peer in found
        ],
    )


def _failures(rows: list[Row]) -> Iterator[Block]:
    failed = [row for row in rows if row["status"] == "fail"]
    if failed:
        yield Heading("Failed the gate, or failed to run")
        yield Table(
            "Rows without a time, ours first",
            _columns(("op", "pass", "shape", "backend", "why")),
            [
                [row["op"], row["pass"], row["shape"], row["backend"], _one_line(row["reason"])]
                for row in sorted(failed, key=lambda row: row["backend"] != OURS)
            ],
        )


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:160]


def _summary(rows: list[Row]) -> Iterator[Block]:
    by_op: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for (op, pass_, _), group in groups(rows).items():
        if OURS in group:
            by_op[op, pass_].append(group)
    peers = sorted({name for found in by_op.values() for g in found for name in g} - {OURS})
    lines = []
    for (op, pass_), found in sorted(by_op.items()):
        cells = []
        for peer in peers:
            ratios = [g[peer]["median_us"] / g[OURS]["median_us"] for g in found if peer in g]
            cells.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else MISSING)
        share = geometric_mean(g[OURS]["sol"] for g in found)
        lines.append([op, pass_, str(len(found)), f"{share:.0%}", *cells])
    yield Heading("Geometric means")
    yield Table(
        "A peer's time over ours (above 1: ours is faster), in brackets over how many shapes",
        [
            *_columns(("op", "pass", "shapes")),
            *_columns(("% of floor", *(f"over {name}" for name in peers)), "measured"),
        ],
        lines,
    )


def _tables(rows: list[Row]) -> Iterator[Block]:
    by_op: dict[tuple[str, str], list[tuple[str, Group]]] = defaultdict(list)
    for (op, pass_, shape), group in groups(rows).items():
        by_op[op, pass_].append((shape, group))
    for (op, pass_), found in sorted(by_op.items()):
        yield Heading(f"{op}, {pass_}")
        yield _times(found)
        yield from _rates(found)
        notes = {f"{row['backend']} {row['note']}." for row in _all(found) if row.get("note")}
        if notes:
            yield Items([Sentence(note) for note in sorted(notes)])


def _all(found: list[tuple[str, Group]]) -> list[Row]:
    return [row for _, group in found for row in group.values()]


def _times(found: list[tuple[str, Group]]) -> Table:
    names = sorted({row["backend"] for row in _all(found)} - {OURS})
    lines = []
    for shape, group in found:
        some, ours, peer = next(iter(group.values())), group.get(OURS), best_peer(group)
        mine, share, ratio = MISSING, MISSING, MISSING
        if ours is not None:
            low, high = figure(ours["p20_us"]), figure(ours["p80_us"])
            mine = f"{figure(ours['median_us'])} ({low}–{high}){_mark(ours)}"
            share = f"{ours['sol']:.0%}"
            if peer is not None:
                ratio = f"{peer['median_us'] / ours['median_us']:.2f}"
        times = [
            figure(group[name]["median_us"]) + _mark(group[name]) if name in group else MISSING
            for name in names
        ]
        lines.append([shape, figure(some["floor_us"]), some["bound"], mine, share, *times, ratio])
    methods = ", ".join(sorted({row["method"] for row in _all(found)}))
    starved = any(row["starved"] for row in _all(found))
    return Table(
        f"Times in µs, by {methods}",
        [
            *_columns(("shape",)),
            *_columns(("floor",), "computed"),
            *_columns(("bound",)),
            *_columns(("ours (p20–p80)", "% of floor", *names, "peer / ours"), "measured"),
        ],
        lines,
        STARVED if starved else "",
    )


def _mark(row: Row) -> str:
    return "*" if row["starved"] else ""


def _rates(found: list[tuple[str, Group]]) -> Iterator[Block]:
    """Tokens per second, for whole models."""
    names = sorted({row["backend"] for row in _all(found) if "tokens_per_s" in row})
    if names:
        yield Table(
            "Tokens per second",
            [*_columns(("shape",)), *_columns(names, "measured")],
            [
                [shape, *(figure(group.get(name, {}).get("tokens_per_s")) for name in names)]
                for shape, group in found
            ],
        )


def _per_backend(rows: list[Row], field: str, heading: str, title: str) -> Iterator[Block]:
    names = sorted({row["backend"] for row in rows if row["status"] == "ok"})
    yield Heading(heading)
    yield Table(
        title,
        [*_columns(("op", "pass", "shape")), *_columns(names, "measured")],
        [
            [*key, *(figure(group[name][field]) if name in group else MISSING for name in names)]
            for key, group in groups(rows).items()
        ],
    )


def _skipped(rows: list[Row]) -> Iterator[Block]:
    counted: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row["status"] == "skip":
            counted[row["backend"], row["reason"]] += 1
    if counted:
        yield Heading("Not timed")
        yield Table(
            "Backends that could not be used, or lack the op",
            _columns(("backend", "why", "rows")),
            [[backend, reason, str(n)] for (backend, reason), n in sorted(counted.items())],
        )


def build(content: dict[str, Any], plots: Sequence[Figure] = ()) -> list[Block]:
    """The page of a result file's content, with those plots."""
    rows = content["rows"]
    blocks = [
        *_first_screen(content, rows),
        Contents(),
        *_losses(rows),
        *_failures(rows),
        *_summary(rows),
        *([Heading("Plots"), *plots] if plots else []),
        *_tables(rows),
        *_per_backend(rows, "host_us", "Host time", "µs of host time to launch one call"),
        *_per_backend(
            rows, "peak_mem_mib", "Memory", "MiB at the peak of one call, without its inputs"
        ),
        *_skipped(rows),
    ]
    return blocks if content["kind"] == MEASUREMENT else [_simulated(block) for block in blocks]


def _simulated(block: Block) -> Block:
    """Returns the block with the tag "simulated" in place of "measured"."""

    def tag(before: Tag | None) -> Tag | None:
        return "simulated" if before == "measured" else before

    match block:
        case Paragraph() | Items():
            sentences = [replace(each, tag=tag(each.tag)) for each in block.sentences]
            return replace(block, sentences=sentences)
        case Table():
            return replace(block, columns=[replace(x, tag=tag(x.tag)) for x in block.columns])
        case Figure():
            return replace(block, tags=[tag(each) for each in block.tags])
    return block


def write(content: dict[str, Any], folder: Path) -> Path:
    """Writes report.html, report.md and the plots; returns the path of the first.

    Raises:
        ValueError: the folder holds a file of one of these names that is not of such a page.
            Nothing is written.
    """
    plots: list[Figure] = []
    try:
        import plots as plotting
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    else:
        plots = plotting.draw(content)
    blocks = build(content, plots)
    files = {"report.html": to_html(TITLE, blocks), "report.md": to_markdown(TITLE, blocks)}
    files |= {f"{plot.name}.svg": plot.svg for plot in plots}
    check_own_files(folder, page_marks(TITLE), [f"{plot.name}.svg" for plot in plots])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return folder / "report.html"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file of --bench-json")
    parser.add_argument("--out", type=Path, help="folder; default: the file's own")
    options = parser.parse_args(arguments)
    try:
        print(write(read_checked(options.results), options.out or options.results.parent))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
