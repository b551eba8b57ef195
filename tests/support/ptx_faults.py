"""Faults in the PTX of warp-specialised kernels: one synchronisation less, or another one.

`hopper_forward.py` and `hopper_backward.py` run them with --ptx --faults. Which faults are none, is
listed there by the position in the PTX of Triton 3.7, the version of constraints.txt.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

# By kind: the lines to which it applies, and what becomes of such a line.
KINDS = {
    "no wait for an mbarrier": (r"^\s*mbarrier\.try_wait", lambda line: ""),
    "the other parity": (
        r"^\s*mbarrier\.try_wait",
        # Of a register or a number, in a register of its own.
        lambda line: re.sub(
            r"^(.*), (%r\d+|\d+);",
            r".reg .b32 flipped; xor.b32 flipped, \2, 1; \1, flipped;",
            line,
        ),
    ),
    "no arrival": (r"mbarrier\.arrive\.shared", lambda line: ""),
    "no wait for a turn": (r"^\s*bar\.sync \d+, (256|384);", lambda line: line.partition(";")[2]),
    "a turn is not passed": (r"^\s*bar\.arrive", lambda line: line.partition(";")[2]),
    "no proxy fence": (r"^\s*fence\.proxy\.async", lambda line: ""),
    "no wait for products": (r"^\s*wgmma\.wait_group", lambda line: ""),
    "a wait for one product less": (
        r"^\s*wgmma\.wait_group",
        lambda line: re.sub(r"(\d+);", lambda found: f"{int(found[1]) + 1};", line),
    ),
    "no wait for a copy out": (r"^\s*cp\.async\.bulk\.wait_group", lambda line: ""),
}


class PtxFault(NamedTuple):
    """A change of one line of a kernel's PTX, which is counted from 1."""

    kernel: str
    number: int
    line: str
    kind: str
    original: str
    cases: tuple[Any, ...]  # calls that run this PTX
    family: int  # their index

    def apply(self, kernel: str, ptx: str) -> str:
        if (kernel, ptx) != (self.kernel, self.original):
            return ptx
        lines = ptx.split("\n")
        lines[self.number - 1] = KINDS[self.kind][1](self.line)
        if self.kind == "no wait for an mbarrier":
            lines[self.number] = ""  # the branch that repeats it
        return "\n".join(lines)

    @property
    def key(self) -> str:
        """The kernel, the family, the kind and which of its lines, from 0."""
        found = re.compile(KINDS[self.kind][0])
        before = self.original.split("\n")[: self.number - 1]
        index = sum(bool(found.search(line)) for line in before)
        return f"{self.kernel} {self.family}: {self.kind} {index}"

    def __str__(self) -> str:
        return f"{self.key}, line {self.number}: {self.line.strip()[:60]}"


def ptx_of(run: Callable[[Callable[[str, str], str]], Any]) -> dict[str, str]:
    """The PTX by kernel of what run(mutate) launches."""
    found: dict[str, str] = {}
    run(lambda name, text: found.setdefault(name, text))
    return found


def faults(
    families: Iterable[tuple[Any, ...]],
    implied: Container[str],
    as_compiled: Callable[..., Any],
    complaints: Callable[..., list[str]],
    part: tuple[int, int] = (0, 1),
) -> Iterator[PtxFault]:
    """Every fault of every kernel.

    Args:
        families: calls that run the same PTX.
        implied: keys of faults that are none, as another synchronisation implies the changed one.
        part: (k, n) yields every n-th fault, from the k-th on.
        as_compiled: (case, seed, change) → what `complaints` judges.
    Raises:
        AssertionError: something is wrong without a fault.
    """
    for family, cases in enumerate(families):
        for case in cases:
            wrong: list[str] = []

            def run(change: Callable[[str, str], str], case: Any = case) -> None:
                wrong.extend(complaints(case, 0, as_compiled(case, 0, change)))  # noqa: B023

            texts = ptx_of(run)
            assert not wrong, wrong
        found = [
            PtxFault(kernel, number, line, kind, text, cases, family)
            for kernel, text in texts.items()
            for kind, (pattern, _) in KINDS.items()
            for number, line in enumerate(text.split("\n"), 1)
            if re.search(pattern, line)
        ]
        first, each = part
        yield from [fault for fault in found if fault.key not in implied][first::each]


def how_noticed(
    complaints: Callable[..., list[str]], as_compiled: Callable[..., Any], seeds: int, fault: Any
) -> str | None:
    """What the first call that notices a fault says; None if none does."""
    from ptx_emulator.driver import programs

    try:
        for seed in range(seeds):
            for case in fault.cases:
                if found := complaints(case, seed, as_compiled(case, seed, fault.apply)):
                    return found[0]
        return None
    finally:
        programs.pop(fault.apply(fault.kernel, fault.original), None)
