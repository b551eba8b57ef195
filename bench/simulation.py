"""Simulates a kernel's main loop on a quarter of a Hopper SM, cycle by cycle. A prediction.

The quarter has num_warps / 4 warps of each resident program. In each cycle it issues at most one
instruction, from the ready warp that has waited longest. A warp is not ready while

- the stall count of its last instruction runs, or a barrier on which its next instruction waits is
  set (Jia et al. 2018, arXiv:1804.06826). An instruction frees its barrier after the latency of its
  unit;
- the unit that it needs is busy: an instruction occupies the special function unit for 8 cycles,
  and the memory unit for 2 to 8;
- it waits at BAR for the other warps of its program, or for as many as the barrier counts;
- it waits at WARPGROUP.DEPBAR for matrix products. Products run in order, one at a time, at 1024
  flops per cycle.

The warps of a warp-specialised kernel run loops of their own (`simulate_consumers`).

Assumed: the latencies, and 4096 flops and 16 special functions per cycle and SM.
Not modelled: cache misses, the arrival of tiles, and a varying clock.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from binary import Scheduled

_STEPS, _WARM = 12, 4  # simulated steps of the loop, and initial steps left out of the mean
_MOST_CYCLES = 1_000_000

# Cycles for which an instruction occupies its unit, and cycles until its result is available.
_MEMORY = {"SHFL": (2, 24), "LDS": (2, 24), "LDSM": (4, 30), "STS": (4, 4), "STSM": (8, 8),
           "LDGSTS": (8, 4)}  # fmt: skip
_SLOW = {"R2UR": (2, 12), "S2R": (2, 20), "LDC": (2, 30)}  # on the integer unit
_HALF_RATE = {"FMNMX", "F2FP", "FSEL", "FSETP", "ISETP", "SEL", "LOP3", "IADD3", "SHF"}
_FULL_RATE = {"PRMT", "VOTE", "LEA", "PLOP3", "IMNMX", "VIADD", "MOV", "F2F", "I2F"}
_BARRIER_LATENCY, _PRODUCT_LATENCY, _OPERANDS_READ = 20, 32, 8
_OTHER_LATENCY = 20  # of other instructions that set a barrier


class Simulated(NamedTuple):
    """One step of the loop of all programs on the SM together."""

    cycles: float
    tensor_cycles: float  # cycles in which the tensor cores are busy


class _Warp:
    def __init__(self, loop: Sequence[Scheduled], program: int, ready: int) -> None:
        self.loop = loop
        self.units = [_unit(step.opcode.partition(".")[0]) for step in loop]
        self.products = [_product_cycles(step.opcode) for step in loop]
        self.program = program
        self.ready = ready  # the first cycle in which it may issue
        self.issued = -1
        self.next = 0  # index of its next instruction
        self.barriers = [0] * 6  # the cycle at which each is free
        self.groups: list[int] = []  # cycles at which groups of products end
        self.ends: list[int] = []  # cycles at which its steps end
        self.waits = False  # at BAR


def _unit(name: str) -> tuple[str, int, int]:
    """(unit, cycles for which it is occupied, latency)."""
    if name == "MUFU":
        return ("special", 8, 22)
    if name in _MEMORY:
        return ("memory", *_MEMORY[name])
    if name in _SLOW:
        return ("integer", *_SLOW[name])
    if name in _HALF_RATE:
        return ("integer", 2, _OTHER_LATENCY)
    if name in _FULL_RATE or name.startswith("U"):
        return ("integer", 1, _OTHER_LATENCY)
    if name in ("FFMA", "FADD", "FMUL", "IMAD"):
        return ("float", 1, _OTHER_LATENCY)
    return ("", 0, _OTHER_LATENCY)


def _product_cycles(opcode: str) -> int:
    """Cycles of one warp's HGMMA.64x{columns}x16 on its quarter; 0 for other instructions."""
    return int(opcode.split("x")[1]) * 16 // 32 if opcode.startswith("HGMMA") else 0


def simulate(loop: Sequence[Scheduled], num_warps: int, programs: int) -> Simulated:
    """Simulates the loop with `programs` programs of num_warps warps each; returns one step."""
    per_program = max(1, num_warps // 4)
    count = programs * per_program
    return _run([_Warp(loop, i // per_program, 3 * i) for i in range(count)], {})


def simulate_consumers(loops: Sequence[Sequence[Scheduled]]) -> Simulated:
    """Simulates a program of groups of four warps, each with a loop of its own; returns one step of
    all.

    Where they take turns at barriers that count several groups, the first group has its turn.
    """
    warps = [_Warp(_from_wait(loop), 0, 3 * index) for index, loop in enumerate(loops)]
    first = next((step.meets for step in warps[0].loop if _is_turn(step)), None)
    # The last group has passed the turn to the first one before its loop.
    return _run(warps, {(0, first[0]): 1} if first else {})


def _is_turn(step: Scheduled) -> bool:
    return step.meets is not None and step.meets[1] > 128


def _from_wait(loop: Sequence[Scheduled]) -> Sequence[Scheduled]:
    """The loop from where it waits for its turn."""
    start = next((i for i, step in enumerate(loop) if _is_turn(step) and step.meets[2]), 0)
    return [*loop[start:], *loop[:start]]


def _run(warps: list[_Warp], arrived: dict[tuple[int, str], int]) -> Simulated:
    """Runs the warps of a quarter.

    Args:
        arrived: warps that have arrived at a barrier, by program and the barrier's name.
    """
    arrived, waiting = defaultdict(int, arrived), defaultdict(list)
    free: dict[str, int] = {}
    tensor_free, now = 0, 0
    while running := [warp for warp in warps if len(warp.ends) < _STEPS]:
        if now > _MOST_CYCLES:
            raise RuntimeError(f"expected {_STEPS} steps of every warp; got a deadlock")
        for warp in sorted(running, key=lambda warp: warp.issued):
            step, (unit, occupied, latency) = warp.loop[warp.next], warp.units[warp.next]
            if warp.waits or warp.ready > now or free.get(unit, 0) > now:
                continue
            if any(warp.barriers[index] > now for index in step.waits):
                continue
            if step.groups_left is not None:
                awaited = warp.groups[: len(warp.groups) - step.groups_left]
                if awaited and awaited[-1] + _PRODUCT_LATENCY > now:
                    continue
            if unit:
                free[unit] = now + occupied
            if warp.products[warp.next]:
                tensor_free = max(tensor_free, now) + warp.products[warp.next]
                if step.closes_group:
                    warp.groups = [*warp.groups[-7:], tensor_free]
            if step.sets is not None:
                warp.barriers[step.sets] = now + latency
            if step.sets_when_read is not None:
                read = max(warp.barriers[step.sets_when_read], now + _OPERANDS_READ)
                warp.barriers[step.sets_when_read] = read
            warp.ready, warp.issued = max(warp.ready, now + max(1, step.stall)), now
            if step.opcode == "BAR":
                name, threads, waits = step.meets or ("0", 0, True)
                barrier = warp.program, name
                company = sum(other.program == warp.program for other in warps)
                arrived[barrier] += 1
                if waits:
                    warp.waits = True
                    waiting[barrier].append(warp)
                if arrived[barrier] == (threads // 128 or company):
                    arrived[barrier] = 0
                    for other in waiting.pop(barrier, ()):
                        other.waits, other.ready = False, max(other.ready, now + _BARRIER_LATENCY)
            warp.next += 1
            if warp.next == len(warp.loop):
                warp.next = 0
                warp.ends.append(now)
            break
        now += 1
    cycles = max((warp.ends[-1] - warp.ends[_WARM]) / (_STEPS - 1 - _WARM) for warp in warps)
    return Simulated(cycles, sum(sum(warp.products) for warp in warps))
