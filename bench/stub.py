"""A GPU with simulated time, to test the clock without a GPU.

Host and device have separate clocks that only launches, synchronisation and sleep advance, so every
number is exact. Its times are computed, not measured.
"""

from collections.abc import Callable

from timing import Call, Device

NAME = "simulated device, not a GPU"
LAUNCH_SECONDS = 6e-6
FLUSH_SECONDS = 60e-6


class _Event:
    def __init__(self, device: "StubDevice") -> None:
        self.device = device
        self.reached: float | None = None

    def record(self) -> None:
        self.reached = max(self.device.host, self.device.free)

    def query(self) -> bool:
        return self.reached is not None and self.reached <= self.device.host


class StubDevice:
    """A simulated device: `launch(seconds)` launches a kernel; `warm` is its time with a warm L2
    cache."""

    name = NAME
    l2_bytes = 2**10

    def __init__(self) -> None:
        self.host = 0.0  # the host's clock
        self.free = 0.0  # when the device will have finished all enqueued work
        self.cold = True
        self.allocated = 0
        self.peak = 0
        self.log: list[str] = []
        self._recording: list[tuple[float, float]] | None = None

    def kernel(
        self,
        seconds: float,
        *,
        warm: float | None = None,
        host: float = LAUNCH_SECONDS,
        name: str = "kernel",
        temporary_bytes: int = 0,
    ) -> Callable[[], None]:
        """Returns a call that launches one kernel and takes the host `host` seconds."""

        def call() -> None:
            self.log.append(name)
            self.peak = max(self.peak, self.allocated + temporary_bytes)
            self.launch(seconds, seconds if warm is None else warm, host)

        return call

    def launch(self, seconds: float, warm: float, host: float = LAUNCH_SECONDS) -> None:
        if self._recording is not None:
            self._recording.append((seconds, warm))
            return
        self.host += host
        self.free = max(self.host, self.free) + (seconds if self.cold else warm)
        self.cold = False

    def host_seconds(self) -> float:
        return self.host

    def event(self) -> _Event:
        return _Event(self)

    def seconds_between(self, start: _Event, end: _Event) -> float:
        return end.reached - start.reached

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def delay(self, seconds: float) -> None:
        self.launch(seconds, seconds)

    def flush(self) -> None:
        self.launch(FLUSH_SECONDS, FLUSH_SECONDS)
        self.cold = True

    def capture(self, call: Call) -> Call:
        self._recording = []
        call()
        kernels, self._recording = self._recording, None

        def replay() -> None:
            self.host += LAUNCH_SECONDS
            self.free = max(self.host, self.free) + sum(cold for cold, _ in kernels)
            self.cold = False

        return replay

    def peak_bytes(self, call: Call) -> int:
        self.peak = self.allocated
        call()
        return self.peak - self.allocated

    def rest(self, seconds: float) -> None:
        self.synchronize()
        self.host += seconds


def stand_ins(device: Device, calls: dict[str, Call]) -> dict[str, Call]:
    """On a simulated device, replaces each call by a kernel, each a little slower than the previous
    one; on other devices, returns the calls."""
    if not isinstance(device, StubDevice):
        return calls
    return {name: device.kernel(1e-4 + 1e-6 * i) for i, name in enumerate(calls)}
