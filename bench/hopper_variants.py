"""What `hopper.py` runs: variants of the attention kernels for Hopper, shapes, a plan of jobs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gqa_kernels.runtime.hopper_configs import (
    HOPPER_BACKWARD,
    HOPPER_FORWARD,
    HopperBackwardConfig,
    HopperConfig,
)


class Variant(NamedTuple):
    """A configuration of the kernels of a pass, with changes that a configuration does not
    express."""

    config: HopperConfig | HopperBackwardConfig
    pinned: bool = True  # forward: whether the softmax may not move behind the product over it
    persistent: bool = True  # forward: a program per SM; otherwise one per block of queries

    @property
    def pass_(self) -> str:
        return "fwd" if isinstance(self.config, HopperConfig) else "bwd"

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def name(self) -> str:
        row = self.config
        if self.pass_ == "bwd":
            return f"bwd-D{row.head_dim}-{row.block}x{row.num_stages}"  # rows of a tile
        return "-".join(
            [
                f"D{row.head_dim}",
                f"{row.num_consumers}x64",  # queries
                f"{row.block_n}x{row.num_stages}",  # keys
                *([] if row.turns else ["no_turns"]),
                *([] if self.pinned else ["not_pinned"]),
                *([] if self.persistent else ["not_persistent"]),
            ]
        )

    @property
    def fits_table(self) -> bool:
        """Whether a row of the table can ask for it."""
        return self.pinned and self.persistent


TABLES = {"fwd": HOPPER_FORWARD, "bwd": HOPPER_BACKWARD}
_THREE_CONSUMERS = {
    "num_consumers": 3,
    "block_n": 64,
    "consumer_registers": 160,
    "copy_registers": 32,
}
_ROWS = {row.head_dim: row for row in HOPPER_FORWARD}
_BACKWARD = {row.head_dim: row for row in HOPPER_BACKWARD}
# The rows of the tables that a run has time for, the most important first.
TABLE = (
    Variant(_ROWS[128]),
    Variant(_BACKWARD[128]),
    Variant(_ROWS[64]),
    Variant(_BACKWARD[64]),
    Variant(_ROWS[256]),
)
_OTHERS = (
    Variant(_ROWS[128]._replace(turns=False)),
    Variant(_ROWS[128]._replace(**_THREE_CONSUMERS, num_stages=3)),
    Variant(_ROWS[128], pinned=False),
    Variant(_ROWS[128], persistent=False),
    *(Variant(row) for rows in TABLES.values() for row in rows if Variant(row) not in TABLE),
    Variant(_ROWS[64]._replace(turns=False)),
    Variant(_BACKWARD[128]._replace(num_stages=2)),
    Variant(_ROWS[64]._replace(**_THREE_CONSUMERS, num_stages=4)),
    Variant(_BACKWARD[64]._replace(block=128, num_stages=2)),
    Variant(_ROWS[128]._replace(block_n=64, num_stages=4)),
    Variant(_ROWS[128]._replace(turns=False), pinned=False),
    Variant(_ROWS[256]._replace(turns=False)),
)
# By name; those of the tables first, then the most informative.
VARIANTS = {variant.name: variant for variant in (*TABLE, *_OTHERS)}
_TINY = (
    Variant(_ROWS[64], pinned=False, persistent=False),
    Variant(_BACKWARD[64]._replace(num_stages=2)),
)
TINY_VARIANTS = {variant.name: variant for variant in _TINY}


def pass_of(name: str) -> str:
    """Of a variant's name."""
    return (VARIANTS | TINY_VARIANTS)[name].pass_


HEADS = (64, 8)  # query, key/value
# (tokens, causal) by pass and head_dim, the most important first: a race that is short of time
# drops the last ones.
SHAPES = {
    ("fwd", 128): (
        (8192, True), (4096, True), (2048, True), (16384, True), (8192, False), (1024, True),
    ),
    ("fwd", 64): ((8192, True), (2048, True), (8192, False)),
    ("bwd", 128): (
        (8192, True), (4096, True), (2048, True), (8192, False), (16384, True), (2048, False),
    ),
    ("bwd", 64): ((8192, True), (2048, True), (8192, False), (16384, True)),
}  # fmt: skip
_FEW_SHAPES = ((8192, True), (2048, True))
_TINY_SHAPES = ((130, True), (70, False))

Shape = tuple[int, bool]


def shapes_of(pass_: str, head_dim: int, dry: bool) -> Sequence[Shape]:
    return _TINY_SHAPES if dry else SHAPES.get((pass_, head_dim), _FEW_SHAPES)


def shape_name(head_dim: int, seq_len: int, causal: bool) -> str:
    return f"D{head_dim}-S{seq_len}-{'causal' if causal else 'full'}"


def shape_names(pass_: str, head_dim: int, dry: bool) -> list[str]:
    return [shape_name(head_dim, *shape) for shape in shapes_of(pass_, head_dim, dry)]


class Job(NamedTuple):
    """What one process does."""

    kind: str  # "describe", "consan", "check" or "race"
    what: str  # a variant, "portable", or ""
    planned: float  # seconds that it gets: an estimate for an H200 with Triton 3.6
    limit: float  # it is killed after that many seconds: a deadlock
    run: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.what}".strip() + (f", run {self.run}" if self.run > 1 else "")


PORTABLE = "portable"
CHECK_RUNS = 2  # in processes of their own, on other calls
CHECK_SECONDS = 20.0  # of a run's calls; starting and compiling come before
MOST_CASES = 150  # of a run
_STARTING = 20.0  # seconds of a check or race until its first call
_SHAPE_SECONDS = {"fwd": 5.0, "bwd": 10.0}  # of a race
_SLACK = 45.0  # between what is planned and the limit
# Of the GPU, with its ceilings; before all others.
DESCRIPTION = Job("describe", "", 20, 120)
# The kernels' name among the contenders of a race; the second one in a dry run.
OURS = ("hopper", "emulator")


def check_job(what: str, run: int = 1) -> Job:
    start = _STARTING if run == 1 else _STARTING / 2  # the second run finds compiled kernels
    return Job("check", what, start + CHECK_SECONDS, start + CHECK_SECONDS + _SLACK, run)


def race_job(variant: Variant, dry: bool) -> Job:
    count = len(shapes_of(variant.pass_, variant.head_dim, dry))
    planned = _STARTING + count * _SHAPE_SECONDS[variant.pass_]
    return Job("race", variant.name, planned, planned + _SLACK)


def plan(dry: bool) -> list[list[Job]]:
    """Jobs in groups, the most important first: what decides about the rows of the tables, which
    takes 13 minutes, and, with the time that is left, other variants."""
    table, others = (_TINY, ()) if dry else (TABLE, list(VARIANTS.values())[len(TABLE) :])
    # Heads of 64 compile fastest. By the time of these jobs their kernels are compiled.
    traced = [Job("consan", v.name, 40, 300) for v in table if v.head_dim == 64]
    first = [check_job(PORTABLE)]
    for variant in table:
        first += [check_job(variant.name), race_job(variant, dry)]
    first += [*traced, *_second_runs(table)]
    rest = [job for v in others for job in (check_job(v.name), race_job(v, dry))]
    return [first, [*rest, *_second_runs(others)]]


def _second_runs(of: Sequence[Variant]) -> Iterator[Job]:
    for variant in of:
        for run in range(2, CHECK_RUNS + 1):
            yield check_job(variant.name, run)
