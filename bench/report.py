"""A result file of `pytest bench` as one page: losses first, then everything else.

    python bench/report.py RESULTS.json --out FOLDER

writes FOLDER/report.md and, where matplotlib is installed, the plots that it shows. A ratio is a
peer's time over ours: above 1, ours is faster. A difference within the noise (one kernel timed
twice) and the spread of the rounds is a tie, and no loss.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import MEASUREMENT, read

OURS = "triton"

Row = dict[str, Any]


class Table:
    """A markdown table."""

    def __init__(self, *columns: str) -> None:
        self.lines = [" | ".join(columns), " | ".join("---" for _ in columns)]

    def add(self, *cells: Any) -> None:
        self.lines.append(" | ".join(str(cell) for cell in cells))

    def __str__(self) -> str:
        return "\n".join(f"| {line} |" for line in self.lines)


def figure(value: float | None, digits: int = 3) -> str:
    """A number to that many significant digits, without an exponent; "–" for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def groups(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Timed rows by (op, pass, shape), then by backend."""
    found: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            found[row["op"], row["pass"], row["shape"]][row["backend"]] = row
    return dict(found)


def best_peer(group: dict[str, Row]) -> Row | None:
    peers = [row for name, row in group.items() if name != OURS]
    return min(peers, key=lambda row: row["median_us"], default=None)


def tie_width(ours: Row, peer: Row) -> float:
    return max(row[name] or 0.0 for row in (ours, peer) for name in ("noise", "spread"))


def losses(rows: list[Row]) -> list[tuple[float, Row, Row]]:
    """(ours / best peer, ours, that peer) of every group that we lose beyond a tie, worst first."""
    found = []
    for group in groups(rows).values():
        ours, peer = group.get(OURS), best_peer(group)
        if ours is None or peer is None:
            continue
        ratio = ours["median_us"] / peer["median_us"]
        if ratio > 1 + tie_width(ours, peer):
            found.append((ratio, ours, peer))
    return sorted(found, key=lambda loss: -loss[0])


def _header(content: dict[str, Any], rows: list[Row]) -> list[str]:
    environment, ceilings = content["environment"], content["ceilings"]
    lines = [f"# Benchmarks on {environment.get('gpu')}", ""]
    if content["kind"] != MEASUREMENT:
        lines += [f"> **{content['kind'].upper()}.** No number on this page is a result.", ""]
    table = Table("what", "value")
    for name in sorted(environment):
        table.add(name, environment[name] if environment[name] is not None else "unknown")
    table.add("started", content["started"])
    if ceilings:
        table.add("copy, read + write", f"{ceilings['copy_bytes_per_s'] * 1e-12:.2f} TB/s")
        table.add("read", f"{ceilings['read_bytes_per_s'] * 1e-12:.2f} TB/s")
        table.add("bf16 8192³ product", f"{ceilings['mma_flops_per_s'] * 1e-12:.0f} TFLOP/s")
    noise = sorted(row["noise"] for row in rows if row.get("noise") is not None)
    if noise:
        middle, most = noise[len(noise) // 2], noise[-1]
        table.add("noise, one call timed twice", f"median {middle:.1%}, largest {most:.1%}")
    for name, unit in (("sm_mhz", "MHz"), ("power_w", "W")):
        seen = [row[name] for row in rows if row.get(name) is not None]
        if seen:
            table.add(f"{name} over the rows", f"{min(seen):.0f} to {max(seen):.0f} {unit}")
    return [
        *lines,
        str(table),
        "",
        "Times are device times in µs: medians, cold L2, inputs rotated. Floor: max(bytes / "
        "bandwidth, flops / matrix rate) with the ceilings above, measured in this run. A step is "
        "a forward and a backward pass, timed as one call.",
        "",
    ]


def _losses(rows: list[Row]) -> list[str]:
    found = losses(rows)
    compared = [g for g in groups(rows).values() if OURS in g and best_peer(g) is not None]
    lines = ["## Losses", "", f"{len(found)} of {len(compared)} compared shapes.", ""]
    if found:
        table = Table("op", "pass", "shape", "ours µs", "fastest peer", "its µs", "ours / peer")
        for ratio, ours, peer in found:
            table.add(
                ours["op"], ours["pass"], ours["shape"], figure(ours["median_us"]),
                peer["backend"], figure(peer["median_us"]), f"{ratio:.2f}",
            )  # fmt: skip
        lines += [str(table), ""]
    return lines


def _failures(rows: list[Row]) -> list[str]:
    failed = [row for row in rows if row["status"] == "fail"]
    if not failed:
        return []
    table = Table("op", "pass", "shape", "backend", "why")
    for row in sorted(failed, key=lambda row: row["backend"] != OURS):
        reason = row["reason"].replace("|", "/").replace("\n", " ")
        table.add(row["op"], row["pass"], row["shape"], row["backend"], reason[:160])
    return ["## Failed the gate, or failed to run", "", str(table), ""]


def _summary(rows: list[Row]) -> list[str]:
    by_op: dict[tuple[str, str], list[dict[str, Row]]] = defaultdict(list)
    for (op, pass_, _), group in groups(rows).items():
        if OURS in group:
            by_op[op, pass_].append(group)
    peers = sorted({name for found in by_op.values() for g in found for name in g} - {OURS})
    table = Table("op", "pass", "shapes", "% of floor", *(f"over {name}" for name in peers))
    for (op, pass_), found in sorted(by_op.items()):
        cells = []
        for peer in peers:
            ratios = [g[peer]["median_us"] / g[OURS]["median_us"] for g in found if peer in g]
            cells.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "–")
        share = geometric_mean(g[OURS]["sol"] for g in found)
        table.add(op, pass_, len(found), f"{share:.0%}", *cells)
    return [
        "## Geometric means",
        "",
        "A peer's time over ours (above 1: ours is faster), in brackets over how many shapes.",
        "",
        str(table),
        "",
    ]


def _tables(rows: list[Row]) -> list[str]:
    by_op: dict[tuple[str, str], list[tuple[str, dict[str, Row]]]] = defaultdict(list)
    for (op, pass_, shape), group in groups(rows).items():
        by_op[op, pass_].append((shape, group))
    lines = []
    for (op, pass_), found in sorted(by_op.items()):
        names = sorted({name for _, group in found for name in group} - {OURS})
        table = Table(
            "shape", "floor µs", "bound", "ours µs (p20–p80)", "% of floor", *names, "peer / ours"
        )
        for shape, group in found:
            some, ours, peer = next(iter(group.values())), group.get(OURS), best_peer(group)
            mine, share, ratio = "–", "–", "–"
            if ours is not None:
                low, high = figure(ours["p20_us"]), figure(ours["p80_us"])
                mine = f"{figure(ours['median_us'])} ({low}–{high}){_marks(ours)}"
                share = f"{ours['sol']:.0%}"
                if peer is not None:
                    ratio = f"{peer['median_us'] / ours['median_us']:.2f}"
            times = [
                figure(group[name]["median_us"]) + _marks(group[name]) if name in group else "–"
                for name in names
            ]
            table.add(shape, figure(some["floor_us"]), some["bound"], mine, share, *times, ratio)
        methods = ", ".join(sorted({row["method"] for _, g in found for row in g.values()}))
        lines += [f"## {op}, {pass_}", "", f"Timed by: {methods}.", "", str(table), ""]
        lines += _rates(found) + _notes(found)
    return [*lines, "\\* the device waited for the host within the call.", ""]


def _rates(found: list[tuple[str, dict[str, Row]]]) -> list[str]:
    """Tokens per second, for whole models."""
    names = sorted({n for _, g in found for n, row in g.items() if "tokens_per_s" in row})
    if not names:
        return []
    table = Table("shape, tokens/s", *names)
    for shape, group in found:
        table.add(shape, *(figure(group.get(name, {}).get("tokens_per_s")) for name in names))
    return [str(table), ""]


def _notes(found: list[tuple[str, dict[str, Row]]]) -> list[str]:
    rows = [row for _, group in found for row in group.values() if row.get("note")]
    return [*sorted({f"- {row['backend']} {row['note']}." for row in rows}), ""] if rows else []


def _marks(row: Row) -> str:
    return "\\*" if row["starved"] else ""


def _per_backend(rows: list[Row], field: str, title: str, note: str) -> list[str]:
    names = sorted({row["backend"] for row in rows if row["status"] == "ok"})
    table = Table("op", "pass", "shape", *names)
    for (op, pass_, shape), group in groups(rows).items():
        cells = [figure(group[name][field]) if name in group else "–" for name in names]
        table.add(op, pass_, shape, *cells)
    return [f"## {title}", "", note, "", str(table), ""]


def _skipped(rows: list[Row]) -> list[str]:
    counted: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row["status"] == "skip":
            counted[row["backend"], row["reason"]] += 1
    if not counted:
        return []
    table = Table("backend", "why", "rows")
    for (backend, reason), count in sorted(counted.items()):
        table.add(backend, reason.replace("|", "/"), count)
    return ["## Not timed", "", str(table), ""]


def build(content: dict[str, Any], plots: Iterable[str] = ()) -> str:
    """The page of a result file's content, showing those plots."""
    rows = content["rows"]
    shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    return "\n".join(
        [
            *_header(content, rows),
            *_losses(rows),
            *_failures(rows),
            *_summary(rows),
            *((["## Plots", "", *shown, ""]) if shown else []),
            *_tables(rows),
            *_per_backend(
                rows, "host_us", "Host time", "µs per call that the host spends on launching it."
            ),
            *_per_backend(
                rows,
                "peak_mem_mib",
                "Memory",
                "MiB at the peak of one call, inputs apart.",
            ),
            *_skipped(rows),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file of --bench-json")
    parser.add_argument("--out", type=Path, help="folder; default: the file's own")
    options = parser.parse_args(arguments)
    content = read(options.results)
    out = options.out or options.results.parent
    out.mkdir(parents=True, exist_ok=True)
    plots: list[str] = []
    try:
        import plots as plotting
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    else:
        plots = plotting.draw(content, out)
    page = out / "report.md"
    page.write_text(build(content, plots), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
