"""What `hopper.py` found, as Markdown: tables, a verdict per variant, rows for the tables.

A variant may become a row of `HOPPER_FORWARD` or `HOPPER_BACKWARD` with measured=True if its random
calls were right in `CHECK_RUNS` processes and had the same bits twice, and if it is at least
`LEAST_GAIN` × as fast as the portable kernels at every shape of the race, in alternating rounds of
one process.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import hopper_variants as variants
import record
from hopper_variants import CHECK_RUNS, OURS, PORTABLE, TABLES, Variant, check_job

LEAST_GAIN = 1.10
LEAST_CASES = 100  # of all runs
PORTABLE_BACKEND = record.OURS

Content = dict[str, Any]


def _table_of(content: Content) -> dict[str, Variant]:
    return variants.VARIANTS if content["kind"] == record.MEASUREMENT else variants.TINY_VARIANTS


def _shapes(content: Content, variant: Variant) -> list[str]:
    simulated = content["kind"] != record.MEASUREMENT
    return variants.shape_names(variant.pass_, variant.head_dim, simulated)


def end_of(content: Content, job: str) -> Content | None:
    """The row that says how a job ended."""
    return next((row for row in content["rows"] if row["op"] == job), None)


def times(content: Content, variant: Variant, shape: str) -> dict[str, Content]:
    """The rows of a shape of a variant's race by contender, those that were timed."""
    return {
        row["backend"]: row
        for row in content["rows"]
        if row.get("job") == f"race {variant.name}"
        and row["shape"] == shape
        and row["status"] == "ok"
    }


def ours(rows: dict[str, Content]) -> Content | None:
    return next((rows[name] for name in OURS if name in rows), None)


def gain(rows: dict[str, Content]) -> float | None:
    """The portable kernel's time divided by the variant's."""
    mine, portable = ours(rows), rows.get(PORTABLE_BACKEND)
    return portable["median_us"] / mine["median_us"] if mine and portable else None


def objections(content: Content, variant: Variant) -> list[str]:
    """Why a variant may not become a row of the table; empty if it may."""
    found = []
    if content["kind"] != record.MEASUREMENT:
        found.append("simulated times")
    for job in [row for row in content["rows"] if row["op"].startswith("consan ")]:
        if variants.pass_of(job["what"]) == variant.pass_:
            found += [f"{job['op']}: {complaint}" for complaint in job.get("complaints", ())]
    runs = [check_job(variant.name, run).name for run in range(1, CHECK_RUNS + 1)]
    ends = {name: end_of(content, name) for name in (check_job(PORTABLE).name, *runs)}
    for name, check in ends.items():
        if check is None:
            found.append(f"{name}: not run")
        elif check["status"] != "ok":
            found.append(f"{name}: {check['reason']}")
    cases = sum(ends[name].get("cases", 0) for name in runs if ends[name])
    if cases < LEAST_CASES:
        found.append(f"{runs[0]}: {cases} cases, fewer than {LEAST_CASES}")
    for shape in _shapes(content, variant):
        ratio = gain(times(content, variant, shape))
        if ratio is None:
            found.append(f"{shape}: not timed")
        elif ratio < LEAST_GAIN:
            found.append(f"{shape}: {ratio:.3f} × the portable kernel")
    return found


def mean_gain(content: Content, variant: Variant) -> float:
    """The geometric mean over the shapes that were timed; 0 if none was."""
    ratios = [gain(times(content, variant, shape)) for shape in _shapes(content, variant)]
    known = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(known) / len(known)) if known else 0.0


def best(content: Content, pass_: str, head_dim: int) -> Variant | None:
    """The fastest variant that a row can ask for and that has no objections."""
    found = [
        variant
        for variant in _of(content, pass_, head_dim)
        if variant.fits_table and not objections(content, variant)
    ]
    return max(found, key=lambda variant: mean_gain(content, variant), default=None)


def _of(content: Content, pass_: str, head_dim: int) -> list[Variant]:
    table = _table_of(content).values()
    return [variant for variant in table if (variant.pass_, variant.head_dim) == (pass_, head_dim)]


# --- Rows for hopper_configs.py --------------------------------------------------------------


def row_text(config: Any) -> str:
    """A row of a table as source: head_dim, and what differs from the defaults by name."""
    defaults = config._field_defaults
    named = [
        f"{name}={value!r}"
        for name, value in config._asdict().items()
        if name != "head_dim" and (name not in defaults or value != defaults[name])
    ]
    return f"    {type(config).__name__}({', '.join([str(config.head_dim), *named])}),"


def rows_to_paste(content: Content) -> str:
    """Both tables, with the rows that were measured and the others as they are."""
    where = content["environment"]
    lines = []
    for name, pass_ in (("HOPPER_FORWARD", "fwd"), ("HOPPER_BACKWARD", "bwd")):
        lines.append(f"{name} = (")
        for row in TABLES[pass_]:
            variant = best(content, pass_, row.head_dim)
            if variant is not None:
                shapes = _shapes(content, variant)
                ratios = [gain(times(content, variant, shape)) for shape in shapes]
                lines.append(
                    f"    # {where['gpu']}, Triton {where['triton']}, commit {where['commit']}: "
                    f"{min(ratios):.2f} to {max(ratios):.2f} × the portable kernel"
                )
                row = variant.config._replace(measured=True)
            lines.append(row_text(row))
        lines.append(")")
    return "\n".join(lines)


# --- The page --------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _figure(row: Content | None, ratio: float | None) -> str:
    if row is None:
        return "–"
    return f"{row['tflops']:.0f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _race(content: Content, pass_: str, head_dim: int) -> str:
    """TFLOP/s, and in brackets the ratio to the portable kernel of the same process."""
    raced = _of(content, pass_, head_dim)
    shapes = _shapes(content, raced[0])
    lines = []
    for variant in raced:
        by_shape = [times(content, variant, shape) for shape in shapes]
        cells = [_figure(ours(rows), gain(rows)) for rows in by_shape]
        verdict = "; ".join(objections(content, variant)) or "may become a row"
        if not variant.fits_table:
            verdict = f"no row can ask for it; {verdict}"
        lines.append([variant.name, *cells, verdict])
    table = raced[0]
    by_shape = [times(content, table, shape) for shape in shapes]
    for name in dict.fromkeys(name for rows in by_shape for name in rows if name not in OURS):
        cells = []
        for rows in by_shape:
            row, portable = rows.get(name), rows.get(PORTABLE_BACKEND)
            ratio = portable["median_us"] / row["median_us"] if row and portable else None
            cells.append(_figure(row, None if name == PORTABLE_BACKEND else ratio))
        lines.append([name, *cells, f"in the race of {table.name}"])
    return _table(["", *shapes, "verdict"], lines)


def _number(row: Content, name: str, digits: int = 0) -> str:
    value = row.get(name)
    return "–" if value is None else f"{value:.{digits}f}"


def _all_rows(content: Content) -> str:
    lines = []
    for row in content["rows"]:
        if "job" in row:
            start = [row["job"].removeprefix("race "), row["shape"], row["backend"]]
            lines.append(
                [
                    *start,
                    *(_number(row, name, 1) for name in ("median_us", "p20_us", "p80_us")),
                    _number(row, "tflops"),
                    _number(row, "sm_mhz"),
                    _number(row, "power_w"),
                    _number(row, "temperature_c"),
                    row["reason"] or ("the GPU waited for the host" if row["starved"] else ""),
                ]
            )
    head = ["race", "shape", "contender", "µs", "p20", "p80", "TFLOP/s", "MHz", "W", "°C", "note"]
    return _table(head, lines)


def _jobs(content: Content) -> str:
    lines = [
        [
            row["op"],
            row["status"],
            str(row.get("cases", "")),
            _number(row, "worst_share", 2),
            _number(row, "seconds"),
            row["reason"],
        ]
        for row in content["rows"]
        if row["pass"] == "end"
    ]
    return _table(["job", "", "calls", "share of the budget", "seconds", "complaints"], lines)


def markdown(content: Content) -> str:
    where = content["environment"]
    simulated = content["kind"] != record.MEASUREMENT
    blocks = [
        "# The attention kernels for Hopper",
        *(["**SIMULATED TIMES, NOT A MEASUREMENT.**"] if simulated else []),
        f"{where['gpu']}, driver {where['driver']}, PyTorch {where['torch']}, cuDNN "
        f"{where['cudnn']}, Triton {where['triton']}, commit {where['commit']}; begun "
        f"{content['started']}.",
        "Races: TFLOP/s and, in brackets, how many times as fast as the portable kernel "
        f"(`{PORTABLE_BACKEND}`) in alternating rounds of the same process.",
    ]
    for pass_, title in (("fwd", "Forward"), ("bwd", "Backward")):
        of_pass = [v for v in _table_of(content).values() if v.pass_ == pass_]
        for head_dim in dict.fromkeys(v.head_dim for v in of_pass):
            blocks += [f"## {title}, head_dim {head_dim}", _race(content, pass_, head_dim)]
    blocks += [
        "## Rows for `kernels/gqa_kernels/runtime/hopper_configs.py`",
        f"A row says `measured=True` if a variant was right in at least {LEAST_CASES} random calls "
        f"of {CHECK_RUNS} processes, with the same bits twice, and at least {LEAST_GAIN:.2f} × as "
        "fast as the portable kernels at every shape. Such a row is what `flash_attention` runs "
        "from then on.",
        f"```python\n{rows_to_paste(content)}\n```",
        "## Jobs",
        _jobs(content),
        "## Every row",
        _all_rows(content),
    ]
    return "\n\n".join(blocks) + "\n"
