"""The scheduler: partitions of a program are threads of which one runs at a time.

Every operation of a kernel is a point at which another partition, or a pending event (a copy that
lands, a product that finishes), may come first. The choice is random but the same for a seed; where
nothing can go on, that is a deadlock, noticed at once.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Fault(Exception):
    """A kernel does what it must not do, or cannot go on."""


@dataclass(eq=False)
class Event:
    """Something that the hardware does later, at any time from when it is ready."""

    kind: str  # "load", "store" or "product"
    happen: Callable[[], None]
    is_ready: Callable[[], bool] = lambda: True


@dataclass(eq=False)
class Partition:
    """Warps that run one function."""

    number: int
    num_warps: int
    is_ready: Callable[[], bool] = lambda: True
    is_done: bool = False
    resumes: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: list[Any] = field(default_factory=list)  # started and not waited for, in order
    stores: list[list[bool]] = field(default_factory=list)  # whether each has read its tile
    unfenced: set[Any] = field(default_factory=set)  # tiles and barriers written since a fence


class Program:
    """One program (CTA) of a launch."""

    running: "Program"  # the one that runs now

    def __init__(self, seed: int, program_id: int, num_programs: int, num_warps: int) -> None:
        self.id, self.num_programs = program_id, num_programs
        self.random = random.Random(seed)
        self.partitions: list[Partition] = []
        self.whole = Partition(-1, num_warps)  # before the partitions part
        self.events: list[Event] = []
        self.barriers: list[Any] = []
        self.named: dict[int, list[Any]] = {}  # [threads that arrived, rounds, their partitions]
        self.uses: dict[Any, list[str]] = {}  # what is still reading or writing a tile
        self.num_bytes = 0  # of shared memory
        self.error: BaseException | None = None
        self._suspended = threading.Semaphore(0)
        self._here = threading.local()

    def me(self) -> Partition:
        return getattr(self._here, "partition", self.whole)

    def pause(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others run; returns when this partition is chosen and `is_ready`."""
        me = self.me()
        if me is self.whole:
            if not is_ready():
                raise Fault("deadlock: a wait before the partitions part")
            return
        me.is_ready = is_ready
        self._suspended.release()
        me.resumes.acquire()
        if self.error:
            raise Fault("stopped")

    def spawn(self, function: Callable, arguments: tuple, num_warps: int) -> None:
        me = Partition(len(self.partitions), num_warps)
        self.partitions.append(me)

        def body() -> None:
            me.resumes.acquire()
            self._here.partition = me
            try:
                if self.error is None:
                    function(*arguments)
                    if not all(done for (done,) in me.stores):
                        raise Fault("a partition ends while a store still reads its tile")
            except BaseException as error:
                self.error = self.error or error
            me.is_done = True
            self._suspended.release()

        threading.Thread(target=body, daemon=True).start()

    def run(self) -> None:
        """Runs the partitions to their ends.

        Raises:
            Fault, or what a partition raised.
        """
        # Slow, fair or prompt hardware; in some runs one kind of event, or one partition, has to
        # wait until nothing else can happen.
        eagerness = self.random.choice((0.003, 0.1, 1.0, 10.0))
        late = self.random.choice((None, "load", "store", "product"))
        starved = self.random.choice((None, *self.partitions))
        while live := [p for p in self.partitions if not p.is_done]:
            if self.error:
                for partition in live:  # each ends with an exception
                    self._resume(partition)
                continue
            ready = [p for p in live if p.is_ready()]
            events = [e for e in self.events if e.is_ready()]
            favoured = [p for p in ready if p is not starved]
            prompt = [e for e in events if e.kind != late]
            if favoured or prompt:
                ready, events = favoured, prompt
            if not ready and not events:
                self.error = Fault("deadlock")
            elif events and (not ready or self.random.random() < eagerness / (1 + eagerness)):
                self._happen(self.random.choice(events))
            else:
                self._resume(self.random.choice(ready))
        if self.error:
            raise self.error
        while events := [e for e in self.events if e.is_ready()]:
            self._happen(self.random.choice(events))
        if self.error:
            raise self.error
        self._check_end()

    def _resume(self, partition: Partition) -> None:
        partition.resumes.release()
        self._suspended.acquire()

    def _happen(self, event: Event) -> None:
        self.events.remove(event)
        try:
            event.happen()
        except BaseException as error:
            self.error = self.error or error

    def _check_end(self) -> None:
        if any(barrier.expected_bytes for barrier in self.barriers):
            raise Fault("a barrier still expects bytes at the end")
        if any(threads for threads, _, _ in self.named.values()):
            raise Fault("a named barrier ends half full")
        if any(partition.products for partition in self.partitions):
            raise Fault("a product was never waited for")


def meet(number: int, num_threads: int, waits: bool) -> None:
    """A named barrier: `bar.sync` or, unless it waits, `bar.arrive`."""
    program = Program.running
    program.pause()
    barrier = program.named.setdefault(number, [0, 0, set()])
    me = program.me()
    if me.number in barrier[2]:
        raise Fault(f"partition {me.number} is twice in a round of named barrier {number}")
    barrier[0] += 32 * me.num_warps
    barrier[2].add(me.number)
    round_ = barrier[1]
    if barrier[0] > num_threads:
        raise Fault(f"named barrier {number} gets more than {num_threads} threads")
    if barrier[0] == num_threads:
        barrier[:] = [0, round_ + 1, set()]
    if waits:
        program.pause(lambda: barrier[1] > round_)
