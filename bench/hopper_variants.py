"""What `hopper.py` runs: variants of the attention kernel for Hopper, shapes, and jobs."""

from typing import NamedTuple

from gqa_kernels.runtime.hopper_configs import HOPPER_FORWARD, HopperConfig


class Variant(NamedTuple):
    """A configuration of the kernel, with changes that a configuration does not express."""

    config: HopperConfig
    pinned: bool = True  # whether the softmax may not move behind the product that hides it
    persistent: bool = True  # a program per SM; otherwise one per block of queries

    @property
    def head_dim(self) -> int:
        return self.config.head_dim

    @property
    def name(self) -> str:
        row = self.config
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


_THREE_CONSUMERS = {
    "num_consumers": 3,
    "block_n": 64,
    "consumer_registers": 160,
    "copy_registers": 32,
}
_ROWS = {row.head_dim: row for row in HOPPER_FORWARD}
TABLE = tuple(Variant(_ROWS[head_dim]) for head_dim in (128, 64, 256))
_OTHERS = (
    Variant(_ROWS[128]._replace(turns=False)),
    Variant(_ROWS[128]._replace(**_THREE_CONSUMERS, num_stages=3)),
    Variant(_ROWS[128], pinned=False),
    Variant(_ROWS[128], persistent=False),
    Variant(_ROWS[64]._replace(turns=False)),
    Variant(_ROWS[64]._replace(**_THREE_CONSUMERS, num_stages=4)),
    Variant(_ROWS[128]._replace(block_n=64, num_stages=4)),
    Variant(_ROWS[128]._replace(turns=False), pinned=False),
    Variant(_ROWS[256]._replace(turns=False)),
)
# By name; those of the table first, then the most informative.
VARIANTS = {variant.name: variant for variant in (*TABLE, *_OTHERS)}
_TINY = Variant(_ROWS[64], pinned=False, persistent=False)
TINY_VARIANTS = {_TINY.name: _TINY}

HEADS = (64, 8)  # query, key/value
# (tokens, causal) by head_dim
SHAPES = {
    128: (
        (1024, True), (2048, True), (4096, True), (8192, True), (16384, True), (8192, False),
    ),
    64: ((2048, True), (8192, True), (8192, False)),
    256: ((2048, True), (8192, True)),
}  # fmt: skip
TINY_SHAPES = {64: ((130, True), (70, False))}


def shape_name(head_dim: int, seq_len: int, causal: bool) -> str:
    return f"D{head_dim}-S{seq_len}-{'causal' if causal else 'full'}"


def shape_names(head_dim: int, dry: bool) -> list[str]:
    return [shape_name(head_dim, *shape) for shape in (TINY_SHAPES if dry else SHAPES)[head_dim]]


class Job(NamedTuple):
    """What one process does."""

    kind: str  # "describe", "consan", "check" or "race"
    what: str  # a variant, "portable", or ""
    seconds: float  # it is killed after that long

    @property
    def name(self) -> str:
        return f"{self.kind} {self.what}".strip()


# Where a check stops drawing cases; compilation comes before, and the limit is for a deadlock.
CHECK_SECONDS = {True: 30.0, False: 15.0}  # by whether the variant is in the table
MOST_CASES = 300
PORTABLE = "portable"
DESCRIPTION = Job("describe", "", 120)  # of the GPU, with its ceilings; before all others
# The kernel's names among the contenders of a race; the second one in a dry run.
OURS = ("hopper", "emulator")


def jobs(dry: bool) -> list[Job]:
    """All jobs, the most important first."""
    variants = list((TINY_VARIANTS if dry else VARIANTS).values())
    consan = next(variant for variant in variants if variant.head_dim == 64)  # compiles fastest
    found = [Job("consan", consan.name, 150), Job("check", PORTABLE, 90)]
    for variant in variants:
        limit = check_seconds(variant.name) + 45
        found += [Job("check", variant.name, limit), Job("race", variant.name, 75)]
    return found


def check_seconds(what: str) -> float:
    return CHECK_SECONDS[what == PORTABLE or what in [variant.name for variant in TABLE]]
