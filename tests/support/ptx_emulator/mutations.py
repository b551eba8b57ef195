"""Breaks kernels on purpose, one instruction at a time, to test that the emulator notices.

    python -m ptx_emulator.mutations --arch sm_80 [--op flash_attention --case 0]

A mutant is seen if there is a finding, an error beyond its budget or an exception. A surviving
mutant need not be a gap: its line may have no effect, or another line may have the same effect.
"""

import argparse
import dataclasses
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from poison import poison_allocations

from ptx_emulator.cases import extra_cases
from ptx_emulator.check import DTYPES, SPECS, Call
from ptx_emulator.driver import ARCHITECTURES

# By kind: a pattern of the lines to which it applies, and the replacement of such a line.
KINDS = {
    "drop bar.sync": (r"^\s*bar\.(warp\.)?sync\s", lambda s: ""),
    "drop every bar.sync": (r"^\s*bar\.(warp\.)?sync\s", lambda s: ""),
    "drop every bar.sync of a loop": (r"^\$L__BB\w+:", lambda s: s),
    "drop two bar.sync in a row": (r"^\s*bar\.(warp\.)?sync\s", lambda s: ""),
    "drop cp.async.wait_group": (r"^\s*cp\.async\.wait_group", lambda s: ""),
    "wait for one group less": (
        r"^\s*cp\.async\.wait_group",
        lambda s: re.sub(r"(\d+);", lambda m: f"{int(m.group(1)) + 1};", s),
    ),
    "drop fence.proxy.async": (r"^\s*fence\.proxy\.async", lambda s: ""),
    "drop wgmma.fence": (r"^\s*wgmma\.fence", lambda s: ""),
    "drop wgmma.wait_group": (r"^\s*wgmma\.wait_group", lambda s: ""),
    "drop mbarrier wait": (r"^\s*(mbarrier\.try_wait|@!complete)", lambda s: ""),
    "drop the mask of a load": (r"^\s*@!?%p\d+ ld\.global", lambda s: re.sub(r"@!?%p\d+ ", "", s)),
    "drop the mask of a store": (
        r"^\s*@!?%p\d+ st\.global", lambda s: re.sub(r"@!?%p\d+ ", "", s),
    ),
    "drop the mask of an async copy": (
        r"^\s*(@!?%p\d+ )?cp\.async\.c[ag].*, 0x\w+, %r\d+;",
        lambda s: re.sub(r"(, 0x\w+), %r\d+;", r"\1;", s),
    ),
    "other swizzle": (
        r"^\s*xor\.b32\s+%r\d+, %r\d+, (16|32|48|64|96);",
        lambda s: re.sub(r"(\d+);", lambda m: f"{int(m.group(1)) ^ 16};", s),
    ),
    "transpose a matrix load": (
        r"^\s*ldmatrix",
        lambda s: (
            s.replace(".trans", "") if ".trans" in s else s.replace(".shared", ".trans.shared")
        ),
    ),
    "other lane of a shuffle": (
        r"^\s*shfl\.sync\.bfly",
        lambda s: re.sub(
            r", (16|8|4|2|1), 31", lambda m: f", {32 // int(m.group(1)) % 31 or 1}, 31", s,
        ),
    ),
    "arrive before the barrier": (r"^\s*(@!?%p\d+ )?(atom|red)\.", lambda s: s),
    "swap two registers of a store": (
        r"^\s*(@!?%p\d+ )?st\.(shared|global)\.v[24].*\{ ?(%\w+), (%\w+)",
        lambda s: re.sub(r"\{ ?(%\w+), (%\w+)", r"{ \2, \1", s),
    ),
}  # fmt: skip


def sites(text: str, kind: str) -> list[int]:
    """The lines of PTX, from 0, to which a kind of mutation applies."""
    pattern = re.compile(KINDS[kind][0])
    found = [n for n, line in enumerate(text.split("\n")) if pattern.search(line)]
    if kind == "drop every bar.sync":
        return found[:1]
    if kind == "drop every bar.sync of a loop":
        return [n for n in found if set(_loop(text, n)) & set(sites(text, "drop bar.sync"))]
    if kind == "drop two bar.sync in a row":
        return found[:-1]
    if kind == "arrive before the barrier":
        return [n for n in found if _barrier_before(text, n) is not None]
    if kind == "drop mbarrier wait":
        return [n for n in found if "try_wait" in text.split("\n")[n]]
    return found


def _barrier_before(text: str, site: int) -> int | None:
    """The last barrier of all threads above a line."""
    lines = text.split("\n")
    return next((n for n in range(site, 0, -1) if re.match(r"\s*bar\.sync\s", lines[n])), None)


def _loop(text: str, label: int) -> range:
    """The lines from a label to the last branch back to it."""
    lines = text.split("\n")
    name = lines[label].split(":")[0]
    back = [
        n
        for n in range(label, len(lines))
        if re.search(rf"bra(\.uni)?\s+{re.escape(name)};", lines[n])
    ]
    return range(label, max(back, default=label))


def apply(text: str, kind: str, site: int) -> str:
    """PTX with one mutation; `site` is one of `sites`."""
    lines = text.split("\n")
    change = KINDS[kind][1]
    lines[site] = change(lines[site])
    if kind == "arrive before the barrier":
        barrier = _barrier_before(text, site)
        lines.insert(site, lines.pop(barrier))  # after the pop, the arrival is at site − 1
    if kind == "drop mbarrier wait":
        lines[site + 1] = ""
    if kind == "drop two bar.sync in a row":
        lines[next(n for n in sites(text, "drop bar.sync") if n > site)] = ""
    if kind == "drop every bar.sync of a loop":
        for n in set(_loop(text, site)) & set(sites(text, "drop bar.sync")):
            lines[n] = ""
    if kind == "drop every bar.sync":
        for n in sites(text, "drop bar.sync"):
            lines[n] = ""
    return "\n".join(lines)


class Mutant(NamedTuple):
    """The result of one mutation."""

    kernel: str
    kind: str
    line: int  # of the PTX, from 1
    text: str
    seen: str  # "finding", "budget", "error"; "bits" or "nothing" for a survivor
    detail: str

    @property
    def survived(self) -> bool:
        return self.seen in ("bits", "nothing")


def mutants(
    arch: str, call: Call, kinds: Iterable[str] = tuple(KINDS), *, each: int = 6, kernel: str = ""
) -> Iterator[Mutant]:
    """Runs a call with mutations, one at a time.

    Args:
        each: the largest number of places per kind and kernel, drawn with a fixed seed.
        kernel: mutates only kernels whose name contains this.
    Raises:
        AssertionError: the call fails without a mutation.
    """
    texts: dict[str, str] = {}
    whole = call.run(arch, mutate=lambda name, text: texts.setdefault(name, text))
    assert not whole.complaints, whole.complaints[:3]
    drawn = random.Random(0)
    for name, text in texts.items():
        for kind in kinds if kernel in name else ():
            places = sites(text, kind)
            for site in sorted(drawn.sample(places, min(each, len(places)))):
                broken = apply(text, kind, site)
                if broken == text:
                    continue
                seen, detail = _run(arch, call, name, broken, whole.results)
                line = text.split("\n")[site].strip()
                yield Mutant(name, kind, site + 1, line, seen, detail)


def _run(arch: str, call: Call, kernel: str, broken: str, results: Any) -> tuple[str, str]:
    def mutate(name: str, text: str) -> str:
        return broken if name == kernel else text

    try:
        outcome = call.run(arch, mutate=mutate)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"
    if outcome.findings:
        return "finding", outcome.findings[0]
    if outcome.complaints:
        return "budget", outcome.complaints[0]
    same = all(
        torch.equal(x.float().nan_to_num(7.0), results[name].float().nan_to_num(7.0))
        for name, x in outcome.results.items()
    )
    return ("nothing" if same else "bits"), ""


# The default calls: (op, longer cases, case, sizes to change, backward pass too).
CALLS = (
    ("flash_attention", True, 0, {"num_q_heads": 1, "seq_len_q": 70, "seq_len_kv": 330}, False),
    ("flash_attention", True, 0, {"num_q_heads": 1, "seq_len_q": 130, "seq_len_kv": 130}, True),
    ("decode_attention", False, 1, {}, False),
    ("rms_norm", False, 4, {}, True),
)


def call_of(
    op: str, extra: bool, number: int, sizes: dict[str, Any], backward: bool, dtype: str
) -> Call:
    spec = next(s for s in SPECS if s.name == op)
    case = (extra_cases(spec) if extra else spec.test_cases())[number]
    case = dataclasses.replace(case, sizes=case.sizes | sizes)
    spec = spec if backward else dataclasses.replace(spec, wrt=())
    return Call(spec, case, getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="sm_80", choices=ARCHITECTURES)
    parser.add_argument("--op", choices=[s.name for s in SPECS], help="default: several calls")
    parser.add_argument("--case", type=int, default=0, help="index of a case of --op")
    parser.add_argument("--extra", action="store_true", help="use the longer cases")
    parser.add_argument("--sizes", default="{}", help="JSON: sizes of the case to change")
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--each", type=int, default=6, help="places per kind and kernel")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--results", metavar="FILE", help="append a line of JSON per mutant")
    options = parser.parse_args()
    poison_allocations()
    sizes = json.loads(options.sizes)
    named = (options.op, options.extra, options.case, sizes, not options.forward)
    totals: dict[str, list[int]] = {}
    for described in (named,) if options.op else CALLS:
        call = call_of(*described, options.dtype)
        kinds = options.kind or KINDS
        for mutant in mutants(options.arch, call, kinds, each=options.each, kernel=options.kernel):
            count = totals.setdefault(mutant.kind, [0, 0])
            count[0] += not mutant.survived
            count[1] += 1
            verdict = "SURVIVED" if mutant.survived else "seen"
            where = f"{mutant.kernel} {mutant.kind}, line {mutant.line}: {mutant.text[:110]}"
            print(f"{verdict} ({mutant.seen}) {where} {mutant.detail[:200]}", flush=True)
            if options.results:
                with open(options.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(mutant._asdict()) + "\n")
    print(f"Mutants that were seen, on {options.arch}:")
    for kind, (seen, total) in totals.items():
        print(f"  {kind}: {seen} of {total}")


if __name__ == "__main__":
    main()
