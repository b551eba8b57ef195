"""What the attention kernels for Hopper compile to, and predictions from it, per Triton version.

    python bench/hopper_compiled.py [--write bench/results/hopper_compiled.md]

Compiles every row and form of `runtime/hopper_configs.py` for sm_90 with the installed Triton;
--write replaces the section of this version in the file and leaves the others. Needs no GPU, and
nothing here was measured on one. The model of a rate, in TFLOP/s:

    tensor = cycles of the products of a step of all consumers, at 4096 flops per cycle and SM
    step   = max(simulated cycles of the loop without a mask, bytes of the step's tiles / 30)
    rate   = 790 · tensor / step · useful share of the schedule

The simulation is `simulation.simulate_consumers`, the shares are those of `hopper_schedule.py` and,
for the backward kernels, `balance.py`; 790 and 30 are assumptions of `prediction.py`. A backward
pass counts as five products, for which the two kernels execute seven. `fused` executes five and
adds to the gradient of queries in memory, which the model leaves out. Published kernels of this
structure reach 0.80 to 0.93 of such figures forward and 0.75 to 0.87 backward.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import importable

importable.extend_path()
sys.path.append(str(importable.ROOT / "tests" / "support"))

import balance
import hopper_binaries
import hopper_schedule
import triton
from balance import Kernel, Shape
from binary import ProductLoop, count
from prediction import L2_BYTES_PER_CYCLE, MATMUL_TFLOPS
from simulation import Simulated, simulate_consumers

from gqa_kernels import interpreter
from llama2.storage import write_text

Entry = dict[str, Any]  # of `hopper_binaries`
LENGTHS = (2048, 4096, 8192, 16384)
TITLE = "# What the attention kernels for Hopper compile to"
INTRODUCTION = """\
Written by `python bench/hopper_compiled.py --write`, a section per version of Triton. **Nothing
here was measured on a GPU.** Read from the binaries for sm_90 in bfloat16: registers, up to the
highest that a loop with products names; accesses to local memory in these loops, of both consumers
together, + elsewhere; shared memory; instructions per warp of the loops over tiles, with a mask /
without one (a single number where a branch in the loop applies the mask), and of the last loop the
matrix products (HGMMA), exponentials (EX2) and shuffles (SHFL). **Columns with * are predictions**
of a cycle model that the docstring of `bench/hopper_compiled.py` states: the cycles of a step, of
its products / simulated / for its bytes from L2; TFLOP/s, of the loop alone and, in the second
table, with the useful share of the schedule. Published kernels of this structure reach 0.80 to 0.93
of such figures forward and 0.75 to 0.87 backward: multiply by that. The model leaves out that
`fused` adds to the gradient of queries in memory: its figures are too high. All figures rank
variants; they are not measurements."""
_HEAD = ("kernel", "row", "form", "registers", "local", "shared KB", "instructions", "HGMMA", "EX2",
         "SHFL", "cycles *", "TFLOP/s *")  # fmt: skip


def loops_of_consumers(entry: Entry) -> list[list[ProductLoop]]:
    """The loops of each consumer, the shortest last: that one applies no mask."""
    loops = [ProductLoop(**loop) for loop in entry["loops"]]
    consumers = entry["row"].get("num_consumers", 2)
    each = len(loops) // consumers
    parts = [loops[i * each : (i + 1) * each] for i in range(consumers)]
    return [sorted(part, key=lambda loop: -sum(loop.mix.values())) for part in parts]


def tile_of(row: dict[str, Any]) -> int:
    return row.get("block_n") or row["block"]


def step_of(entry: Entry) -> tuple[Simulated, float]:
    """(the simulated step, the cycles that its tiles of keys and values, or of queries and dO, take
    from the L2 cache)."""
    simulated = simulate_consumers([part[-1].schedule for part in loops_of_consumers(entry)])
    num_bytes = 2 * tile_of(entry["row"]) * entry["row"]["head_dim"] * 2
    return simulated, num_bytes / L2_BYTES_PER_CYCLE


def rate(entry: Entry) -> float:
    """The predicted TFLOP/s of the loop without a mask, in executed products."""
    simulated, traffic = step_of(entry)
    return MATMUL_TFLOPS * simulated.tensor_cycles / max(simulated.cycles, traffic)


def form_of(entry: Entry) -> dict[str, Any]:
    names = ("causal", "training")
    return entry.get("form") or {name: entry[name] for name in names if name in entry}


def _form_text(entry: Entry) -> str:
    form = form_of(entry)
    named = [
        name if value is True else f"{name} {value}"
        for name, value in form.items()
        if name != "causal" and value
    ]
    return ", ".join(["causal" if form["causal"] else "full", *named])


def _row(entry: Entry) -> Sequence[str]:
    row, parts = entry["row"], loops_of_consumers(entry)
    long, (simulated, traffic) = parts[0][-1].mix, step_of(entry)
    inside = sum(count(loop.mix, r"(LDL|STL)\b") for part in parts for loop in part)
    tiles = f"{64 * row.get('num_consumers', 2)} × {tile_of(row)}, {row['num_stages']} stages"
    return (
        entry["kernel"].removeprefix("attention.hopper."),
        f"{row['head_dim']}: {tiles}",
        _form_text(entry),
        str(max(loop.registers for part in parts for loop in part)),
        f"{inside} + {entry['local'] - inside}",
        f"{entry['shared'] / 1024:.0f}",
        " / ".join(str(sum(loop.mix.values())) for loop in parts[0]),
        *(str(count(long, name)) for name in ("HGMMA", r"MUFU\.EX2", "SHFL")),
        f"{simulated.tensor_cycles:.0f} / {simulated.cycles:.0f} / {traffic:.0f}",
        f"{rate(entry):.0f}",
    )


# --- Rates of calls --------------------------------------------------------------------------


def _shape(head_dim: int, seq_len: int) -> Shape:
    return Shape(batch=1, num_q_heads=64, num_kv_heads=8, seq_len=seq_len, head_dim=head_dim)


def _is_plain(entry: Entry, causal: bool) -> bool:
    form = form_of(entry)
    return form["causal"] == causal and not any(form[name] for name in form if name != "causal")


def forward_rates(entry: Entry) -> list[float]:
    """Of LENGTHS, in visible products."""
    row, (simulated, traffic) = entry["row"], step_of(entry)
    step = max(simulated.cycles, traffic)
    rows, causal = 64 * row["num_consumers"], form_of(entry)["causal"]
    return [
        rate(entry)
        * hopper_schedule.useful_share(
            _shape(row["head_dim"], seq_len), rows, tile_of(row), step, causal=causal
        )
        for seq_len in LENGTHS
    ]


def backward_rates(kernels: Sequence[tuple[Entry, int]]) -> list[float]:
    """Of LENGTHS, causal, in five visible products, of kernels and the products that each executes;
    dq's programs own queries, the others keys."""
    found = []
    for seq_len in LENGTHS:
        time = 0.0
        for entry, products in kernels:
            shape = _shape(entry["row"]["head_dim"], seq_len)
            owns_keys = _name(entry) != "dq"
            kernel = Kernel(128, tile_of(entry["row"]), products, owns_keys)
            section = balance.section_of(kernel, shape)
            if owns_keys:  # the programs of all heads with the same keys follow each other
                section = shape.batch * shape.num_kv_heads
            time += products / (rate(entry) * balance.useful_share(kernel, shape, section))
        found.append(5 / time)
    return found


def _name(entry: Entry) -> str:
    return entry["kernel"].rpartition(".")[2]


def _rate_rows(forward: Iterable[Entry], backward: Sequence[Entry]) -> Iterator[Sequence[str]]:
    for entry in forward:
        if any(_is_plain(entry, causal) for causal in (True, False)):
            yield (
                "forward",
                str(entry["row"]["head_dim"]),
                _form_text(entry),
                *(f"{x:.0f}" for x in forward_rates(entry)),
            )
    # Causal or not, dq has a loop without a mask; that of the others applies it in a branch, so the
    # steps of the full form are those of most tiles.
    plain = {
        (entry["row"]["head_dim"], _name(entry)): entry
        for entry in backward
        if _is_plain(entry, causal=_name(entry) == "dq")
    }
    for head_dim in dict.fromkeys(head_dim for head_dim, _ in plain):
        for products in ({"dkdv": 4, "dq": 3}, {"fused": 5}):  # fused: only where Triton can
            if all((head_dim, name) in plain for name in products):
                kernels = [(plain[head_dim, name], count) for name, count in products.items()]
                rates = (f"{x:.0f}" for x in backward_rates(kernels))
                yield " + ".join(products), str(head_dim), "causal", *rates


# --- The page --------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(forward: Sequence[Entry], backward: Sequence[Entry]) -> str:
    """The section of the installed Triton."""
    head = ("pass", "head_dim", "form", *(f"{seq_len // 1024}k tokens *" for seq_len in LENGTHS))
    return "\n\n".join(
        [
            f"## Triton {triton.__version__}",
            _table(_HEAD, map(_row, (*forward, *backward))),
            "Predicted TFLOP/s of calls with 64 query and 8 key/value heads on 132 SMs:",
            _table(head, _rate_rows(forward, backward)),
        ]
    )


def page(before: str, new: str) -> str:
    """The page with a section in place of that of its version, in order of the versions."""
    sections = {part.split("\n")[0]: part.strip() for part in before.split("\n## ")[1:]}
    new = new.removeprefix("## ")
    sections[new.split("\n")[0]] = new
    versions = sorted(sections, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    ordered = [f"## {sections[name]}" for name in versions]
    return "\n\n".join([TITLE, INTRODUCTION, *ordered]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PATH", help="replace this version's section")
    options = parser.parse_args(arguments)
    if interpreter.is_enabled():
        parser.error("TRITON_INTERPRET: expected it to be unset; the interpreter compiles nothing")
    before = ""
    if options.write is not None:  # read first, as compiling takes minutes
        try:
            before = options.write.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not options.write.parent.is_dir():
                parser.error(
                    f"--write: expected a file in a folder that exists; got {options.write}"
                )
        except (OSError, ValueError) as error:
            parser.error(f"--write: {options.write}: {error}")
        if before and not before.startswith(TITLE):
            parser.error(f"--write: expected a page of this command; got {options.write}")
    new = section(
        list(hopper_binaries.entries(fewer=False)),
        list(hopper_binaries.backward_entries(fewer=False)),
    )
    if options.write is None:
        print(new)
        return
    write_text(options.write, page(before, new))


if __name__ == "__main__":
    main()
