"""Warp-specialised kernels, whose warp groups execute different code.

The CTA is divided into units of four warps (as wgmma needs), each with separate registers. A unit
whose warps diverge at a brx.idx (Triton's dispatcher) is divided into its warps. One unit at a time
runs one basic block; a unit runs until its threads wait at a barrier, at an mbarrier or for
registers (setmaxnreg.inc).
"""

import numpy as np

from ptx_emulator.machine import _BARRIER, _RUN, _WAIT, Cta, EmulationError
from ptx_emulator.races import RacesOfUnit

_REGISTERS = 3
MAX_BLOCKS = 2_000_000  # per program; beyond that, it counts as an endless loop


class Unit(Cta):
    """Some warps of a CTA with separate registers."""

    def __init__(self, cta, first: int, count: int, registers: list, pc) -> None:
        self.cta, self.first = cta, first
        for name in (
            "launch", "position", "program", "options", "linear", "shared_end", "static_base",
            "shared", "shared_views", "acquired", "random",
        ):  # fmt: skip
            setattr(self, name, getattr(cta, name))
        self.num_threads, self.num_warps = count, -(-count // 32)
        self.threads = np.arange(count, dtype=np.int64)
        self.lane, self.warp = self.threads & 31, self.threads >> 5
        self.warps = (first >> 5) + np.arange(self.num_warps)
        self.races = RacesOfUnit(cta.races, first) if cta.races else None
        self.registers = registers
        self.constants, self.lane_tables, self.fragments = {}, {}, {}
        self.copies, self.committed = [], np.zeros(self.num_warps, np.int64)
        self.barrier_arguments, self.wait_arguments = (0, 0, 0, True), None
        self.init_hopper()
        self.mbarriers, self.total_warps = cta.mbarriers, cta.num_warps
        self.pc, self.state = pc, np.zeros(count, np.int8)
        self.at_barrier = np.full(count, -1)
        self.waiting: dict[tuple, np.ndarray] = {}  # (address, parity, register, line) → threads

    @property
    def epoch(self):
        return self.cta.epoch

    @epoch.setter
    def epoch(self, value):
        self.cta.epoch = value

    def special(self, name):
        base, _, axis = name[1:].partition(".")
        if base == "tid" and axis in ("", "x"):
            return (self.threads + self.first).astype(np.uint32)
        if base == "tid":
            return np.zeros(self.num_threads, np.uint32)
        if base == "warpid":
            return (self.warp + (self.first >> 5)).astype(np.uint32)
        if base == "ntid":
            size = self.cta.num_threads if axis in ("", "x") else 1
            return np.full(self.num_threads, size, np.uint32)
        return super().special(name)

    def _warps_of(self, threads, lanes):
        return super()._warps_of(threads, lanes) + (self.first >> 5)

    def _groups(self, m):
        if self.num_warps % 4:
            self.launch.report("wgmma without the whole warpgroup", 0, "")
        return super()._groups(m)

    def sync_warp(self, m) -> None:
        if self.races:
            self.races.sync_warp(
                np.arange(self.num_warps) if m is None else np.unique(self.warp[m])
            )

    # --- one step ---

    def alive(self) -> bool:
        return bool((self.pc >= 0).any() or (self.state != _RUN).any())

    def chosen(self):
        """Returns (threads that run next, their block), or None."""
        ready = (self.pc >= 0) & (self.state == _RUN)
        if not ready.any():
            return None
        at = int(self.pc[ready].min())
        return ready & (self.pc == at), at

    def step(self, mask, at) -> list | None:
        """Runs one block; returns the units into which this one splits, if it does."""
        block = self.program.blocks[at]
        partial = not mask.all()
        function = block.functions.get(partial) or self.program.function(block, partial)
        self.launch.num_blocks_run += 1
        self.program.visited.add(at)
        result = function(self, self.registers, mask if partial else None)
        self.pc[mask] = result if isinstance(result, int) else result[mask]
        if block.kind == "barrier":
            number, count, line, sync = self.barrier_arguments
            if sync:
                self.state[mask] = _BARRIER
                self.at_barrier[mask] = number
            self.cta.named.arrive(self, mask, number, count, line, sync)
        elif block.kind == "wait":
            addresses, parity, register, line = self.wait_arguments
            if self.options.schedule == "random" and self.random.random() < 0.5:
                done = np.zeros(self.num_threads, bool)  # as if polled too early
            else:
                done = self.test_mbarrier(line, addresses, parity, mask if partial else None)
            self.registers[register] = np.where(mask, done, self.registers[register])
            stay = mask & ~done
            if stay.any():
                self.state[stay] = _WAIT
                keys = np.stack([addresses[stay].astype(np.int64), parity[stay].astype(np.int64)])
                for address, wanted in np.unique(keys, axis=1).T.tolist():
                    these = stay & (addresses == address) & (parity == wanted)
                    self.waiting[address, wanted, register, line] = these
        elif block.kind == "registers":
            wanted, more, line = self.registers_wanted
            warps = self.warps[np.unique(self.warp[mask])]
            if not more or not self.cta.pool.grow(warps, wanted):
                if more:
                    self.state[mask] = _REGISTERS
                    self.growing = warps, wanted, line
                else:
                    self.cta.pool.shrink(warps, wanted, line)
        if not isinstance(result, int) and self.num_warps > 1 and self.may_fall(block):
            return self.fall()
        return None

    def may_fall(self, block) -> bool:
        if not block.instructions[-1].op.startswith("brx"):
            return False
        by_warp = self.pc.reshape(self.num_warps, 32)
        uniform = (by_warp == by_warp[:, :1]).all()
        return bool(uniform and (self.state == _RUN).all()) and not (
            self.wgmma_values or self.copies or self.stores_open or any(self.stores.values())
        )

    def fall(self) -> list:
        return [
            Unit(
                self.cta, self.first + 32 * w, 32,
                [r[32 * w : 32 * w + 32] for r in self.registers],
                self.pc[32 * w : 32 * w + 32].copy(),
            )
            for w in range(self.num_warps)
        ]  # fmt: skip

    def poll(self, lazy: bool) -> None:
        """Ends waits that are over. If `lazy`, it often does nothing, so that waits end and copies
        land later."""
        if lazy and self.random.random() < 0.7:
            return
        if (self.state == _REGISTERS).any() and self.cta.pool.grow(*self.growing[:2]):
            self.state[self.state == _REGISTERS] = _RUN
        for key, threads in list(self.waiting.items()):
            address, wanted, register, line = key
            barrier = self.mbarriers.get(address)
            if barrier is not None and barrier.phase == (wanted & 1) and not barrier.copies:
                continue
            addresses = np.full(self.num_threads, address, np.uint32)
            parity = np.full(self.num_threads, wanted, np.uint32)
            if self.test_mbarrier(line, addresses, parity, threads)[threads].all():
                self.registers[register] = np.where(threads, True, self.registers[register])
                self.state[threads] = _RUN
                del self.waiting[key]

    def release(self, number) -> None:
        freed = (self.state == _BARRIER) & (self.at_barrier == number)
        self.state[freed] = _RUN

    def where(self) -> str:
        name = (
            f"warps {self.warps[0]}-{self.warps[-1]}"
            if self.num_warps > 1
            else f"warp {self.warps[0]}"
        )
        says = []
        for number in np.unique(self.at_barrier[self.state == _BARRIER]).tolist():
            says.append(f"at barrier {number}")
        for address, wanted, _, line in self.waiting:
            says.append(f"at the mbarrier at {address - 1024}, parity {wanted}, line {line}")
        if (self.state == _REGISTERS).any():
            says.append(f"for {self.growing[1]} registers")
        return f"{name} {' and '.join(says) or 'run'}"


class Pool:
    """The registers of a CTA, in registers per lane of each warp; setmaxnreg moves them."""

    def __init__(self, cta) -> None:
        self.report = cta.launch.report
        each = cta.program.kernel.max_registers
        self.each = None if each is None else np.full(cta.num_warps, each)
        self.free = 0

    def grow(self, warps, wanted) -> bool:
        if self.each is None:
            return True
        need = int((wanted - self.each[warps]).sum())
        if need > self.free:
            return False
        self.free -= need
        self.each[warps] = wanted
        return True

    def shrink(self, warps, wanted, line) -> None:
        if self.each is None:
            return
        if (self.each[warps] < wanted).any():
            self.report("setmaxnreg.dec to more registers than a warp has", line, f"{wanted}")
        self.free += int((self.each[warps] - wanted).sum())
        self.each[warps] = wanted


class Named:
    """The CTA's barriers 0 … 15."""

    def __init__(self, cta) -> None:
        self.cta, self.barriers, self.units = cta, {}, []

    def arrive(self, unit, mask, number, count, line, sync) -> None:
        cta, report = self.cta, self.cta.launch.report
        entry = self.barriers.get(number)
        if entry is None:
            zeros = np.zeros(cta.num_warps, np.int64)
            entry = self.barriers[number] = {
                "arrived": np.zeros(cta.num_threads, bool), "sync": np.zeros(cta.num_threads, bool),
                "total": 0, "count": count, "published": zeros, "line": line,
            }  # fmt: skip
        if entry["count"] != count:
            report(
                "different counts at one barrier",
                line,
                f"barrier {number}: {count}, {entry['count']}",
            )
        ids = unit.first + np.flatnonzero(mask)
        if entry["arrived"][ids].any():
            report(
                "a warp comes twice to one round of a barrier",
                line,
                f"barrier {number}, thread {int(ids[0])}",
            )
        entry["arrived"][ids] = True
        entry["total"] += len(ids)
        if sync:
            entry["sync"][ids] = True
        if cta.races:
            for warp in np.unique(ids >> 5).tolist():
                entry["published"] = np.maximum(entry["published"], cta.races.release(warp))
        self.complete(number, line)

    def complete(self, number, line) -> None:
        cta, entry = self.cta, self.barriers[number]
        exited = sum(int((u.pc < 0).sum()) for u in self.units if u.state.max() == _RUN)
        needed = entry["count"] or cta.num_threads - exited
        if entry["total"] < needed:
            return
        if entry["total"] > needed:
            cta.launch.report(
                "more threads than a barrier counts", line, f"barrier {number}: {entry['total']}"
            )
        del self.barriers[number]
        warps = np.unique(np.flatnonzero(entry["sync"]) >> 5)
        if entry["sync"].all():
            cta.full_barrier()
        elif cta.races and len(warps):
            cta.races.acquire(warps, entry["published"])
            cta.races.sync_warp(warps)
        for unit in self.units:
            unit.release(number)


def run(cta):
    """A generator that yields before each atomic."""
    count = cta.num_threads
    named = cta.named = Named(cta)
    cta.pool = Pool(cta)
    units = named.units = []
    for first in range(0, count, 128):
        size = min(128, count - first)
        registers = [r[first : first + size] for r in cta.registers]
        units.append(Unit(cta, first, size, registers, np.zeros(size, np.int64)))
    rng, random = cta.random, cta.options.schedule == "random"
    # A warp whose unit runs only when no other can, and the probability that a unit continues.
    held = rng.choice((None, *range(cta.num_warps))) if random else None
    patience = rng.choice((0.0, 0.5, 0.9)) if random else 0.0
    last, blocks = None, 0
    while True:
        live = [u for u in units if u.alive()]
        if not live:
            break
        for lazy in (True, False) if random else (False,):
            for unit in live:
                unit.poll(lazy)
            ready = [(u, c) for u in live if (c := u.chosen()) is not None]
            if ready:
                break
        if not ready:
            if not progress(cta, live):
                raise EmulationError(
                    f"{cta.program.kernel.name}: deadlock: {'; '.join(u.where() for u in live)}"
                )
            continue
        if random:
            some = [r for r in ready if held not in r[0].warps] or ready
            same = [r for r in some if r[0] is last]
            unit, (mask, at) = same[0] if same and rng.random() < patience else rng.choice(some)
        else:  # in turn
            later = [r for r in ready if last is not None and r[0].first > last.first]
            unit, (mask, at) = (later or ready)[0]
        last = unit
        if cta.program.blocks[at].kind == "atomic":
            yield
        blocks += 1
        if blocks > MAX_BLOCKS:
            raise EmulationError(f"{cta.program.kernel.name}: no end after {blocks} blocks")
        pieces = unit.step(mask, at)
        if pieces:
            k = units.index(unit)
            units[k : k + 1] = pieces
    finish(cta, units)


def progress(cta, live) -> bool:
    """Whether a barrier of all threads is complete because some threads have exited."""
    before = [u.state.copy() for u in live]
    for number, entry in list(cta.named.barriers.items()):
        cta.named.complete(number, entry["line"])
    return any((b != u.state).any() for b, u in zip(before, live, strict=True))


def finish(cta, units) -> None:
    report = cta.launch.report
    for number, entry in cta.named.barriers.items():
        report(
            "a barrier is left half full",
            entry["line"],
            f"barrier {number}: {entry['total']} threads",
        )
    for address, barrier in cta.mbarriers.items():
        if barrier.copies:
            report(
                "bulk copies that nobody waited for",
                barrier.copies[0][0],
                f"mbarrier at {address - 1024}",
            )
        if barrier.bytes and not barrier.copies:
            report(
                "an mbarrier is left expecting bytes",
                0,
                f"mbarrier at {address - 1024}: {barrier.bytes}",
            )
    for unit in units:
        if unit.wgmma_values:
            report("wgmma that nobody waited for", 0, "")
        unit.finish_stores()
