"""Runs a translated kernel: its programs in some order, and their threads."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.approximation import erring
from ptx_emulator.global_accesses import GlobalAccesses
from ptx_emulator.hopper import Hopper
from ptx_emulator.memory import GlobalMemory
from ptx_emulator.races import SharedRaces
from ptx_emulator.shared_accesses import SHARED_BASE, SharedAccesses
from ptx_emulator.warps import Warps

_RUN, _BARRIER, _WAIT = 0, 1, 2
U4 = np.uint32


class EmulationError(RuntimeError):
    """The kernel has an error, or uses something that the emulator does not support."""


@dataclass
class Options:
    """How launches run, and what is reported."""

    races: bool = True
    schedule: str = "lockstep"  # or "random": the warps one at a time, in random order
    ctas: str = "forward"  # or "backward", "random", "interleaved" (switch at atomics)
    noise: bool = False  # add the largest allowed errors to approximate instructions
    seed: int = 0
    # Requires a proxy fence between mbarrier.init and bulk copies on it, and between mbarrier.inval
    # and a bulk copy over it. Triton's own pipelines have neither.
    mbarrier_fence: bool = False
    strict: bool = True  # raise at the first finding


@dataclass
class Launch:
    """One launch: the state that all CTAs share."""

    program: object
    memory: GlobalMemory
    params: dict
    grid: tuple
    shared: int
    options: Options
    run_specialised: Callable  # `specialised.run`, for a CTA with specialised warps
    findings: list = field(default_factory=list)
    descriptors: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)  # address of an atomic → {cta: epoch}
    num_blocks_run: int = 0
    duplicates: int = 0  # global elements that two warps of a program wrote in one epoch

    def report(self, kind: str, line: int, detail: str) -> None:
        text = ""
        for instruction in self.program.kernel.instructions:
            if instruction.line == line:
                text = instruction.text
                break
        finding = f"{self.program.kernel.name}: {kind}: {detail} [PTX line {line}: {text[:140]}]"
        if self.options.strict:
            raise EmulationError(finding)
        if len(self.findings) < 200:
            self.findings.append(finding)

    def run(self) -> None:
        gx, gy, gz = self.grid
        order = [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        rng = random.Random(self.options.seed)
        if self.options.ctas == "backward":
            order.reverse()
        elif self.options.ctas in ("random", "interleaved"):
            rng.shuffle(order)
        with np.errstate(all="ignore"):
            if self.options.ctas != "interleaved":
                for position in order:
                    for _ in Cta(self, position).run():
                        pass
                return
            waiting = [Cta(self, position).run() for position in order]
            while waiting:
                turn = rng.randrange(len(waiting))
                try:
                    next(waiting[turn])
                except StopIteration:
                    waiting.pop(turn)


class Cta(SharedAccesses, GlobalAccesses, Warps, Hopper):
    """One program of a launch (a cooperative thread array)."""

    def __init__(self, launch: Launch, position: tuple) -> None:
        self.launch, self.position = launch, position
        self.program, self.options = launch.program, launch.options
        kernel = self.program.kernel
        self.num_threads = kernel.num_threads
        self.num_warps = -(-self.num_threads // 32)
        gx, gy, _ = launch.grid
        self.linear = position[0] + gx * (position[1] + gy * position[2])
        self.threads = np.arange(self.num_threads, dtype=np.int64)
        self.lane = self.threads & 31
        self.warp = self.threads >> 5
        self.tid = self.threads.astype(U4)
        size = SHARED_BASE + launch.shared + kernel.static_shared
        size = -(-size // 16) * 16
        self.shared_end = SHARED_BASE + launch.shared + kernel.static_shared
        self.static_base = SHARED_BASE + launch.shared
        self.shared = np.full(size, 0xFF, np.uint8)
        self.shared_views = {n: self.shared.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.races = None
        if self.options.races and (launch.shared or kernel.static_shared):
            self.races = SharedRaces(
                size, self.program.shared_unit, self.num_threads, launch.report,
                self.program.async_proxy,
            )  # fmt: skip
        poison = {
            "?": np.zeros(self.num_threads, bool),
            "u2": np.full(self.num_threads, 0xFFFF, np.uint16),
            "u4": np.full(self.num_threads, 0xFFFFFFFF, np.uint32),
            "u8": np.full(self.num_threads, 0xFFFFFFFFFFFFFFFF, np.uint64),
            "u1": np.full(self.num_threads, 0xFF, np.uint8),
        }
        self.registers = [poison[dtype] for dtype in kernel.registers]
        self.constants: dict = {}
        self.lane_tables: dict = {}
        self.fragments: dict = {}
        self.copies: list = []  # cp.async in flight: (group by warp, …)
        self.committed = np.zeros(self.num_warps, np.int64)
        self.epoch = 0  # barriers of the whole CTA so far
        self.acquired: dict[int, int] = {}
        self.barrier_arguments = (0, 0, 0, True)
        self.wait_arguments = None
        self.random = random.Random(f"{self.options.seed} {self.linear}")
        self.init_hopper()
        # Runs one warp at a time, except with wgmma, which four warps issue together.
        self.apart = (
            self.options.schedule == "random"
            and self.num_warps > 1
            and not any(i.op.startswith("wgmma") for i in kernel.instructions)
        )

    # --- scheduling ---

    def run(self):
        """A generator that yields before each atomic."""
        if self.program.specialised:
            yield from self.launch.run_specialised(self)
            return
        blocks, program, R = self.program.blocks, self.program, self.registers
        T = self.num_threads
        at, uniform = 0, True
        pc = state = where_to = None
        while True:
            if uniform:
                if at == -1:
                    self.finish_stores()
                    break
                block = blocks[at]
                if block.kind == "atomic":
                    yield
                function = block.functions.get(False) or program.function(block, False)
                self.launch.num_blocks_run += 1
                program.visited.add(at)
                result = function(self, R, None)
                if block.kind == "barrier":
                    self.full_barrier()
                elif block.kind == "wait":
                    addresses, parity, register, line = self.wait_arguments
                    done = self.test_mbarrier(line, addresses, parity, None)
                    if not done.all():
                        self.launch.report(
                            "deadlock at an mbarrier", line, f"{int((~done).sum())} threads"
                        )
                    R[register] = np.ones(T, bool)
                if isinstance(result, int):
                    at = result
                    if not self.apart:
                        continue
                    pc = np.full(T, at)
                else:
                    pc = result
                uniform = False
                state = np.zeros(T, np.int8)
                where_to = {}
                continue
            # Threads are at different blocks, or warps run one at a time.
            live = pc >= 0
            if not live.any():
                self.finish_stores()
                break
            ready = live & (state == _RUN)
            if not ready.any():
                self.stuck(pc, state, where_to)
                continue
            if self.apart:
                warps = np.unique(self.warp[ready])
                chosen = warps[self.random.randrange(len(warps))]
                ready = ready & (self.warp == chosen)
            at_now = int(pc[ready].min())
            mask = ready & (pc == at_now)
            block = blocks[at_now]
            if block.kind == "atomic":
                yield
            if mask.all():
                function, m = block.functions.get(False) or program.function(block, False), None
            else:
                function, m = block.functions.get(True) or program.function(block, True), mask
            self.launch.num_blocks_run += 1
            program.visited.add(at_now)
            result = function(self, R, m)
            pc = pc.copy()
            pc[mask] = result if isinstance(result, int) else result[mask]
            if block.kind == "barrier":
                number, count, line, _ = self.barrier_arguments
                state[mask] = _BARRIER
                for thread in np.flatnonzero(mask):
                    where_to[int(thread)] = (number, count, line)
                self.try_release(number, pc, state, where_to)
            elif block.kind == "wait":
                addresses, parity, register, line = self.wait_arguments
                done = self.test_mbarrier(line, addresses, parity, mask)
                R[register] = R[register] | (mask & done)
                stay = mask & ~done
                if stay.any():
                    state[stay] = _WAIT
                    for thread in np.flatnonzero(stay):
                        where_to[int(thread)] = (addresses, parity, register, line)
            if (state == _WAIT).any():
                self.poll(pc, state, where_to)
            live = pc >= 0
            together = live.all() and (state == _RUN).all() and (pc == pc[0]).all()
            if together and not self.apart:
                at, uniform = int(pc[0]), True

    def try_release(self, number, pc, state, where_to) -> None:
        live = np.flatnonzero(pc >= -1)
        arrived = [t for t in live.tolist() if state[t] == _BARRIER and where_to[t][0] == number]
        exited = int((pc < 0).sum()) - sum(1 for t in arrived if pc[t] < 0)
        count = where_to[arrived[0]][1] or self.num_threads - exited
        if len(arrived) >= count:
            threads = np.array(arrived)
            state[threads] = _RUN
            for t in arrived:
                del where_to[t]
            warps = np.unique(self.warp[threads])
            if len(warps) == self.num_warps:
                self.full_barrier()
            elif self.races:
                self.races.barrier(warps)

    def poll(self, pc, state, where_to) -> None:
        for thread in np.flatnonzero(state == _WAIT).tolist():
            addresses, parity, register, line = where_to[thread]
            mask = np.zeros(self.num_threads, bool)
            mask[thread] = True
            if self.test_mbarrier(line, addresses, parity, mask)[thread]:
                state[thread] = _RUN
                value = self.registers[register].copy()
                value[thread] = True
                self.registers[register] = value
                del where_to[thread]

    def stuck(self, pc, state, where_to) -> None:
        before = state.copy()
        self.poll(pc, state, where_to)
        for number in {v[0] for t, v in where_to.items() if state[t] == _BARRIER}:
            self.try_release(number, pc, state, where_to)
        if (before == state).all():
            line = next(iter(where_to.values()))[-1]
            raise EmulationError(
                f"{self.program.kernel.name}: deadlock: {int((state == _BARRIER).sum())} threads "
                f"at barriers, {int((state == _WAIT).sum())} at mbarriers [PTX line {line}]"
            )

    def full_barrier(self) -> None:
        self.epoch += 1
        if self.races:
            self.races.barrier(np.arange(self.num_warps))

    def sync_warp(self, m) -> None:
        if self.num_warps == 1:
            self.epoch += 1
        if self.races:
            warps = np.arange(self.num_warps) if m is None else np.unique(self.warp[m])
            self.races.sync_warp(warps)

    def branch(self, p, m, target, otherwise):
        if m is None:
            if p.all():
                return target
            if not p.any():
                return otherwise
        return np.where(p, target, otherwise)

    def branch_table(self, line, index, targets, m):
        index = index.astype(np.int64)
        used = index if m is None else index[m]
        if (used >= len(targets)).any():
            self.launch.report(
                "branch beyond its table", line, f"{int(used.max())} of {len(targets)}"
            )
        blocks = targets[np.minimum(index, len(targets) - 1)]
        first = int(blocks[0])
        return first if m is None and (blocks == first).all() else blocks

    # --- values ---

    def full(self, value, dtype):
        if isinstance(value, np.ndarray) and value.ndim:
            return value
        key = (dtype, np.asarray(value).tobytes())
        found = self.constants.get(key)
        if found is None:
            found = self.constants[key] = np.full(self.num_threads, value, dtype)
        return found

    def param(self, name, offset, dtype):
        value = self.launch.params[name]
        if offset:
            raise NotImplementedError("offset in a parameter")
        return np.array(value).view(dtype)[()] if value.dtype != dtype else value

    def symbol(self, name, dtype):
        if name in self.launch.params:
            return dtype(self.launch.params[name])
        shared = self.program.kernel.shared
        if name in shared:
            offset, size = shared[name]
            return dtype(SHARED_BASE if size == 0 else self.static_base + offset)
        raise NotImplementedError(f"symbol {name}")

    def barrier_number(self, line, numbers, m) -> int:
        """The number of a barrier that is in a register, the same for all threads that come."""
        found = np.unique(numbers if m is None else numbers[m])
        if len(found) > 1:
            raise NotImplementedError(f"line {line}: threads at barriers {found.tolist()}")
        return int(found[0])

    def special(self, name):
        base, _, axis = name[1:].partition(".")
        k = "xyz".index(axis) if axis else 0
        if base == "tid":
            return self.tid if k == 0 else np.zeros_like(self.tid)
        if base == "laneid":
            return self.lane.astype(U4)
        if base == "warpid":
            return self.warp.astype(U4)
        value = {
            "ntid": (self.num_threads, 1, 1)[k],
            "ctaid": self.position[k],
            "nctaid": self.launch.grid[k],
            "cluster_ctarank": 0,
            "cluster_ctaid": 0,
            "cluster_nctaid": 1,
            "cluster_nctarank": 1,
        }.get(base)
        if value is None:
            raise NotImplementedError(name)
        return np.full(self.num_threads, value, U4)

    def approximate(self, value, bound):
        """The result of an instruction with a relative error of up to `bound`."""
        return erring(value, bound, self.options.seed) if self.options.noise and bound else value

    def trap(self, line, mask) -> None:
        if mask is None or mask.any():
            self.launch.report("trap", line, "")
