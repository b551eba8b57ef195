"""The sweeps of `tune.py`: for each row of a table in `configs`, candidates and their source
text."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from grid import GRID, TINY, Workload

from gqa_kernels.runtime import configs

Candidate = dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """A sweep over one row of a table in `configs`.

    Attributes:
        workload: the shape that represents the row's class.
        candidates: launch configurations to try.
        patch: returns values of attributes of `configs` with which it chooses a candidate.
        row: returns the text to paste.
    """

    workload: Workload
    candidates: tuple[Candidate, ...]
    patch: Callable[[Candidate], dict[str, Any]]
    row: Callable[[Candidate], str]


def _product(**choices: tuple[int, ...]) -> tuple[Candidate, ...]:
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def arguments_of(candidate: Candidate) -> str:
    return ", ".join(f"{name}={value}" for name, value in candidate.items())


def _workload(op: str, pass_: str, **sizes: int | bool) -> Workload:
    """The workload of the grid with these sizes."""
    for work in GRID:
        if (work.op, work.pass_) == (op, pass_) and sizes.items() <= work.case.sizes.items():
            return work
    raise KeyError(f"no workload {op} {pass_} with {sizes} in the grid")


def _norm(pass_: str) -> list[Sweep]:
    table = {"fwd": "NORM_FORWARD", "bwd": "NORM_BACKWARD"}[pass_]
    choices = {"num_warps": (1, 2, 4, 8, 16, 32)}
    if pass_ == "bwd":
        choices["programs_per_sm"] = (1, 2, 4, 8)
    # The largest width of the grid in each class of the table.
    widths = {1280: (1024, 4096), 2560: (2048, 4096), 5120: (5120, 8192), 10240: (8192, 8192),
              16384: (16384, 4096)}  # fmt: skip
    sweeps = []
    for max_width, (width, tokens) in widths.items():

        def config(candidate: Candidate, max_width: int = max_width) -> configs.RowConfig:
            return configs.RowConfig(max_width=max_width, **candidate)

        sweeps.append(
            Sweep(
                _workload("rms_norm", pass_, hidden_size=width, num_tokens=tokens),
                _product(**choices),
                lambda candidate, config=config: {table: (config(candidate),)},
                lambda candidate, max_width=max_width: (
                    f"RowConfig(max_width={max_width}, {arguments_of(candidate)}),"
                ),
            )
        )
    return sweeps


def _swiglu(pass_: str) -> list[Sweep]:
    return [
        Sweep(
            _workload("swiglu", pass_, intermediate_size=width, num_tokens=8192),
            _product(SWIGLU_BLOCK=(512, 1024, 2048, 4096), SWIGLU_NUM_WARPS=(2, 4, 8)),
            dict,
            lambda candidate: "\n".join(f"{n} = {v}" for n, v in candidate.items()),
        )
        for width in (11008, 28672)
    ]


def _attention(pass_: str) -> list[Sweep]:
    """One sweep per table of the pass and head_dim."""
    tables = {"fwd": ("ATTENTION_FORWARD",), "bwd": ("ATTENTION_DKDV", "ATTENTION_DQ")}[pass_]
    block_m = {"fwd": (64, 128), "bwd": (32, 64, 128)}[pass_]
    orders = {"fwd": {"ahead": (True, False)}, "bwd": {}}[pass_]
    choices = _product(
        block_m=block_m, block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4), **orders
    )

    def sweep(table: str, head_dim: int, **sizes: int | bool) -> Sweep:
        def config(candidate: Candidate) -> configs.AttentionConfig:
            return configs.AttentionConfig("", 2, 256, **candidate)

        return Sweep(
            _workload("flash_attention", pass_, head_dim=head_dim, causal=True, **sizes),
            choices,
            lambda candidate: {table: (config(candidate),)},
            lambda candidate: (
                f'AttentionConfig("{_arch()}", 2, {head_dim}, {arguments_of(candidate)}),'
                f"  # {table}"
            ),
        )

    return [
        sweep(table, head_dim, seq_len_q=4096, **heads)
        for table in tables
        for head_dim, heads in ((128, {"num_kv_heads": 8}), (64, {}))
    ]


def _decode() -> list[Sweep]:
    """Sweeps of splits, by contexts at batch 1 and 16, and of tiles for every kind of cache."""

    def workload(batch: int, context: int, **cache: Any) -> Workload:
        shape = {"num_kv_heads": 8, "batch": batch, "max_seq_len": context, "ragged": False}
        return _workload("decode_attention", "fwd", **shape, **cache)

    def splits(batch: int, context: int) -> Sweep:
        return Sweep(
            workload(batch, context),
            _product(chunk=(128, 256, 512), max_splits=(16, 32, 64, 128)),
            lambda candidate: {
                "DECODE_CHUNK": candidate["chunk"],
                "DECODE_MAX_SPLITS": candidate["max_splits"],
            },
            lambda candidate: (
                f"DECODE_CHUNK, DECODE_MAX_SPLITS = {candidate['chunk']}, {candidate['max_splits']}"
            ),
        )

    def tiles(element_size: int, **cache: Any) -> Sweep:
        def config(candidate: Candidate) -> configs.DecodeConfig:
            tile = {name: x for name, x in candidate.items() if name != "num_warps"}
            return configs.DecodeConfig(element_size, 256, max_block_m=32, **tile)

        return Sweep(
            workload(64, 4096, **cache),
            _product(block_n=(32, 64, 128), num_stages=(2, 3, 4, 5), num_warps=(2, 4, 8)),
            lambda candidate: {
                "DECODE_TILES": (config(candidate),),
                "DECODE_NUM_WARPS": candidate["num_warps"],
            },
            lambda candidate: f"DecodeConfig({element_size}, 128, {arguments_of(candidate)}),",
        )

    def lone_row(batch: int, context: int) -> Sweep:
        shape = {"num_q_heads": 32, "num_kv_heads": 32, "batch": batch, "max_seq_len": context}
        return Sweep(
            _workload("decode_attention", "fwd", **shape, ragged=False),
            _product(rows=(1, 16)),
            lambda candidate: {"DECODE_LONE_ROW": candidate["rows"]},
            lambda candidate: f"DECODE_LONE_ROW = {candidate['rows']}",
        )

    float8 = {"cache_dtype": torch.float8_e4m3fn}
    return [
        splits(1, 32768),
        splits(1, 131072),
        tiles(1, **float8, scale_per_head=True),
        tiles(1, **float8, page_size=16),
        tiles(2, page_size=16),
        tiles(2),
        splits(16, 4096),
        lone_row(1, 4096),
        lone_row(64, 4096),
    ]


SWEEPS: dict[str, Callable[[], list[Sweep]]] = {
    "rms_norm-fwd": lambda: _norm("fwd"),
    "rms_norm-bwd": lambda: _norm("bwd"),
    "swiglu-fwd": lambda: _swiglu("fwd"),
    "swiglu-bwd": lambda: _swiglu("bwd"),
    "flash_attention-fwd": lambda: _attention("fwd"),
    "flash_attention-bwd": lambda: _attention("bwd"),
    "decode_attention-fwd": _decode,
}


def _arch() -> str:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return f"sm_{major}{minor}"


def tiny_sweeps() -> list[Sweep]:
    """The sweeps of the dry run: two candidates of each table on a tiny shape."""
    tiny = {(work.op, work.pass_): work for work in TINY}
    found = []
    for name, make in SWEEPS.items():
        op, pass_ = name.split("-")
        sweep = make()[-1]
        found.append(Sweep(tiny[op, pass_], sweep.candidates[:2], sweep.patch, sweep.row))
    return found
