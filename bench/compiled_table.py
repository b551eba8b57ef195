"""The table of `compiled.py` as markdown."""

from typing import Any

import prediction
import torch
import triton
from binary import count

# Sizes that vary between calls and must not affect the binary.
CALL_SIZES = ("num_tokens", "batch", "seq_len", "seq_len_q", "seq_len_kv", "max_seq_len", "total",
              "num_sequences", "cached")  # fmt: skip

_MIX = {  # patterns of instructions, by their name in the table
    "HGMMA": "HGMMA",
    "HMMA": "HMMA",
    "UTCMMA": r"UTC\w*MMA",
    "MFMA": "v_mfma",
    "MUFU": "MUFU",
    "FFMA": "FFMA",
    "FMUL": "FMUL",
    "SHFL": "SHFL",
    "BAR": "BAR",
}
_ACCESSES = ("UTMALDG", "LDGSTS", "LDG", "STG")
_HEAD = (
    "kernel",
    "shape",
    "warps",
    "regs",
    "spills",
    "shared KB",
    "programs/SM *",
    "main loop, or whole kernel: instructions per warp",
    "KB in flight/SM *",
    "TFLOP/s *",
)


def _mix(mix: dict[str, int]) -> str:
    """The important instructions, memory accesses with their widths."""
    parts = [f"{name} {n}" for name, pattern in _MIX.items() if (n := count(mix, pattern))]
    for name in _ACCESSES:
        parts += [f"{op} {n}" for op, n in sorted(mix.items()) if op.split(".")[0] == name]
    return ", ".join([*parts, f"all {sum(mix.values())}"])


def _programs(entry: Any) -> str:
    """How many programs fit on an SM, and how many the launch has per SM if that is fewer."""
    fits = prediction.programs_per_sm(entry.arch, entry.launch, entry.binary)
    launched = prediction.launched_per_sm(entry.arch, entry.launch, entry.binary)
    if fits is None or launched == fits:
        return "–" if fits is None else str(fits)
    return f"{launched:.2g} of {fits}"


def _row(entry: Any, shape: str) -> tuple[str, ...]:
    launch, binary = entry.launch, entry.binary
    in_flight = prediction.bytes_in_flight(entry.arch, launch, binary)
    rate = prediction.attention_rate(entry.arch, launch, binary)
    kernel = launch.kernel
    if entry.op == "add_rms_norm":
        kernel = kernel.replace("norm", "add_norm", 1)
    return (
        kernel,
        shape,
        str(launch.num_warps),
        str(binary.registers),
        str(binary.spills),
        f"{launch.shared / 1024:.0f}",
        _programs(entry),
        _mix(binary.loop or binary.mix),
        "–" if in_flight is None else f"{in_flight / 1024:.0f}",
        "–" if rate is None else f"{rate:.0f}",
    )


def _shape(entry: Any) -> str:
    """The sizes on which the binary depends."""
    sizes = dict(entry.case.sizes)
    new_tokens = {"seq_len_q": sizes["seq_len_q"]} if "max_seq_len" in sizes else {}
    for name in CALL_SIZES:
        sizes.pop(name, None)
    parts = [f"{name}={size}" for name, size in (new_tokens | sizes).items()]
    return ", ".join([*parts, entry.dtype, entry.mode])


def markdown(entries: list[Any]) -> str:
    """One section per architecture, one row per kernel and width; the first binary of each."""
    lines = [
        "# What the kernels compile to",
        "",
        "Written by `python bench/compiled.py --write` with Triton "
        f"{triton.__version__} and PyTorch {torch.__version__.partition('+')[0]}. "
        "Nothing here was measured on a GPU.",
        "",
        "Read from the binaries: registers per thread, spilled accesses, shared memory,",
        "instructions. Columns with * are predictions; `bench/prediction.py` states their model.",
        f"Little's law wants about {prediction.BYTES_IN_FLIGHT_NEEDED // 1024} KB in flight per SM "
        "of an H200 at 4.3 TB/s. Rates are simulated, of the main loop alone: they rank kernels.",
    ]
    arch, seen = "", set()
    for entry in entries:
        if entry.arch != arch:
            arch = entry.arch
            lines += ["", f"## {arch}", "", "| " + " | ".join(_HEAD) + " |"]
            lines += ["|" + "---|" * len(_HEAD)]
        shape = _shape(entry)
        if entry.error:
            lines.append(f"| {entry.op} | {shape} | {entry.error} |")
            continue
        row = _row(entry, shape)
        if row not in seen:
            seen.add(row)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
