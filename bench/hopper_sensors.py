"""Clock, power and temperature of the GPU while a contender runs, from nvidia-smi."""

import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from typing import Any

import torch
from ceilings import ask
from timing import Call, Clock, Device, Timed

QUERIED = {
    "sm_mhz": "clocks.sm",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
EVERY_MS = 50

Span = tuple[float, float]  # of time.monotonic()


class Sensors:
    """Samples while its context is open; without nvidia-smi, there are no samples."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Sensors":
        program = shutil.which("nvidia-smi")
        if program is not None and torch.cuda.is_available():
            uuid = ask(lambda: torch.cuda.get_device_properties().uuid)
            self._process = subprocess.Popen(
                [
                    program,
                    f"--query-gpu={','.join(QUERIED.values())}",
                    "--format=csv,noheader,nounits",
                    f"--loop-ms={EVERY_MS}",
                    *([] if uuid is None else [f"--id=GPU-{uuid}"]),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.samples.append((time.monotonic(), parse(line)))

    def over(self, spans: list[Span]) -> dict[str, float]:
        """The medians of the samples in these spans, as far as there are any."""
        found = defaultdict(list)
        for when, sample in list(self.samples):
            if any(start <= when <= end for start, end in spans):
                for name, value in sample.items():
                    found[name].append(value)
        return {name: statistics.median(values) for name, values in found.items()}


def parse(line: str) -> dict[str, float]:
    """One line of nvidia-smi; what it does not know, such as "[N/A]", is left out."""
    cells = zip(QUERIED, line.split(","), strict=False)
    found = {name: ask(lambda cell=cell: float(cell)) for name, cell in cells}
    return {name: value for name, value in found.items() if value is not None}


class WatchedClock(Clock):
    """A clock that keeps when each contender was sampled."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.spans: defaultdict[str, list[Span]] = defaultdict(list)

    def _events(self, name: str, call: Call, timed: Timed, prepared: dict[str, Any]) -> list[float]:
        start = time.monotonic()
        samples = super()._events(name, call, timed, prepared)
        self.spans[name].append((start, time.monotonic()))
        return samples
