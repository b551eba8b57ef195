"""The clock: measures the device time of a call, separately from the host time.

One sample is [delay][flush L2][event][call][event]. The delay keeps the device busy until the host
has enqueued the whole call. If the device reaches the first event before that, it has waited for
the host: the sample is discarded and the delay is increased. A call that makes the device wait with
every delay (because it synchronises, or enqueues more than fits the queue) is measured
nevertheless, and its result is marked `starved`.

Everything here works on a `Device`; tests use one with simulated time (`stub.py`).
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[], Any]

ROUNDS = 3
ROUND_SECONDS = 0.03  # of device time per contender and round
MIN_SAMPLES, MAX_SAMPLES = 5, 50
HOST_CALLS, HOST_SECONDS = 20, 0.05  # few enough not to fill the queue, which would stall the host
GRAPH_CALLS = 20
FIRST_DELAY, MAX_DELAY = 50e-6, 20e-3
REST_SECONDS = 0.1  # before a matrix-bound contender, to end throttling by the previous one


class Event(Protocol):
    """A point in the device's queue."""

    def record(self) -> None: ...
    def query(self) -> bool:
        """Whether the device has passed this point."""
        ...


class Device(Protocol):
    name: str
    l2_bytes: int

    def host_seconds(self) -> float:
        """The host's clock."""
        ...

    def event(self) -> Event: ...
    def seconds_between(self, start: Event, end: Event) -> float: ...
    def synchronize(self) -> None: ...
    def delay(self, seconds: float) -> None:
        """Enqueues work of this duration that accesses no memory."""
        ...

    def flush(self) -> None:
        """Enqueues work that evicts the L2 cache."""
        ...

    def capture(self, call: Call) -> Call:
        """Captures what the call enqueues; returns its replay, a single launch."""
        ...

    def peak_bytes(self, call: Call) -> int:
        """The peak of memory allocated during the call, beyond what was allocated before."""
        ...

    def rest(self, seconds: float) -> None: ...


@dataclass
class Timed:
    """The times of one contender, in seconds."""

    method: str  # "events", "graph" or "end to end"
    rounds: list[list[float]] = field(default_factory=list)
    host_seconds: float = 0.0  # per call: launches only, without synchronisation
    peak_bytes: int = 0
    starved: bool = False  # whether the device waited for the host within a call

    @property
    def samples(self) -> list[float]:
        return [sample for one_round in self.rounds for sample in one_round]

    @property
    def median(self) -> float:
        """The median of the rounds' medians, so that a disturbed round counts only once."""
        return statistics.median(statistics.median(one_round) for one_round in self.rounds)

    def quantile(self, share: float) -> float:
        """The quantile of the samples: `share` of them are below it."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def spread(self) -> float:
        """(largest − smallest median of a round) / median."""
        medians = [statistics.median(one_round) for one_round in self.rounds]
        return (max(medians) - min(medians)) / self.median


class Rotation:
    """One call that uses several copies of its inputs in turn."""

    def __init__(self, calls: Sequence[Call]) -> None:
        if not calls:
            raise ValueError("calls: expected at least one; got none")
        self.calls = list(calls)
        self.next = 0

    def __call__(self) -> Any:
        call = self.calls[self.next]
        self.next = (self.next + 1) % len(self.calls)
        return call()


def copies_needed(input_bytes: int, l2_bytes: int, method: str) -> int:
    """How many copies of the inputs a rotation needs.

    A graph cannot flush between its calls, so it needs enough copies to exceed three times the L2
    cache, at most 64. Other methods flush and use two copies, so that consecutive calls do not use
    the same addresses; inputs that exceed the cache need one copy.
    """
    if method == "graph":
        return max(1, min(64, -(-3 * l2_bytes // max(input_bytes, 1))))
    return 1 if input_bytes > 4 * l2_bytes else 2


class Clock:
    """Times contenders on a device, in rounds that alternate between them."""

    def __init__(
        self, device: Device, rounds: int = ROUNDS, round_seconds: float = ROUND_SECONDS
    ) -> None:
        self.device = device
        self.rounds = rounds
        self.round_seconds = round_seconds

    def measure(
        self, contenders: dict[str, Call], method: str, *, rest: bool = False
    ) -> dict[str, Timed | Exception]:
        """Times every contender; the result of one that raises is its exception.

        Args:
            contenders: calls by name, already compiled, tuned and checked.
            method: "events": single calls, cold L2; "graph": calls unrolled in one graph, over
                rotated inputs; "end to end": single calls as a user makes them, including waits.
            rest: leave the device idle for a moment before each contender.
        """
        results: dict[str, Timed | Exception] = {}
        for name, call in contenders.items():
            try:
                results[name] = Timed(
                    method,
                    host_seconds=self._host_seconds(call),
                    peak_bytes=self.device.peak_bytes(call),
                )
            except Exception as error:
                results[name] = error
        sample = {"events": self._events, "graph": self._graph, "end to end": self._end_to_end}
        prepared: dict[str, Any] = {}
        for _ in range(self.rounds):
            for name, call in contenders.items():
                timed = results[name]
                if isinstance(timed, Exception):
                    continue
                if rest:
                    self.device.rest(REST_SECONDS)
                try:
                    timed.rounds.append(sample[method](name, call, timed, prepared))
                except Exception as error:
                    results[name] = error
        return results

    def _count(self, estimate: float) -> int:
        wanted = int(self.round_seconds / max(estimate, 1e-9))
        return max(MIN_SAMPLES, min(MAX_SAMPLES, wanted))

    def _host_seconds(self, call: Call) -> float:
        """Host seconds per call: the median of five batches, each enqueued into an empty queue."""
        self.device.synchronize()
        start = self.device.host_seconds()
        call()
        self.device.synchronize()
        whole = self.device.host_seconds() - start
        count = max(1, min(HOST_CALLS, int(HOST_SECONDS / max(whole, 1e-9))))
        batches = []
        for _ in range(5):
            self.device.synchronize()
            start = self.device.host_seconds()
            for _ in range(count):
                call()
            batches.append((self.device.host_seconds() - start) / count)
        self.device.synchronize()
        return statistics.median(batches)

    def _one(self, call: Call, delay: float) -> tuple[float, bool]:
        """(seconds, whether the device waited for the host) of one cold call."""
        start, end = self.device.event(), self.device.event()
        self.device.delay(delay)
        self.device.flush()
        start.record()
        call()
        end.record()
        waited = start.query()
        self.device.synchronize()
        return self.device.seconds_between(start, end), waited

    def _events(self, name: str, call: Call, timed: Timed, prepared: dict[str, Any]) -> list[float]:
        delay = prepared.setdefault(name, max(FIRST_DELAY, 2 * timed.host_seconds))
        estimate, waited = self._one(call, delay)
        while waited and delay < MAX_DELAY:
            delay *= 2
            estimate, waited = self._one(call, delay)
        samples = []
        for _ in range(self._count(estimate)):
            seconds, waited = self._one(call, delay)
            if waited and delay < MAX_DELAY:  # the host was slow: repeat with a longer delay
                delay *= 2
                seconds, waited = self._one(call, delay)
            timed.starved |= waited
            samples.append(seconds)
        prepared[name] = delay
        return samples

    def _graph(self, name: str, call: Call, timed: Timed, prepared: dict[str, Any]) -> list[float]:
        if name not in prepared:
            count = max(GRAPH_CALLS, len(call.calls) if isinstance(call, Rotation) else 1)
            prepared[name] = count, self.device.capture(lambda: [call() for _ in range(count)])
        count, replay = prepared[name]
        estimate, _ = self._one(replay, FIRST_DELAY)
        return [self._one(replay, FIRST_DELAY)[0] / count for _ in range(self._count(estimate))]

    def _end_to_end(
        self, name: str, call: Call, timed: Timed, prepared: dict[str, Any]
    ) -> list[float]:
        """Times calls back to back, from the end of one to the end of the next."""
        self.device.synchronize()
        before = self.device.event()
        before.record()
        call()
        after = self.device.event()
        after.record()
        self.device.synchronize()
        count = self._count(self.device.seconds_between(before, after))
        marks = [self.device.event() for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        self.device.synchronize()
        return [self.device.seconds_between(a, b) for a, b in itertools.pairwise(marks)]
