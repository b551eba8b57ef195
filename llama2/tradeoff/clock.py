"""A GPU's clock, and what the GPU does at best by it."""

import statistics
from dataclasses import dataclass
from typing import Protocol

import torch

from llama2.decoding.graphs import Call, captured

WARM_UP_CALLS = 3
SAMPLES = 30
READ_BYTES = 2**30  # far above any L2 cache
MATRIX_SIZE = 8192


class Clock(Protocol):
    """What measures: `CudaClock`, or a simulated one in tests."""

    name: str

    def capture(self, call: Call) -> Call:
        """What the call enqueues, as one launch."""
        ...

    def seconds(self, call: Call) -> list[float]:
        """Several samples of the time that the device spends in one call, with a cold L2 cache."""
        ...


class CudaClock:
    """A GPU's clock, by events.

    Each sample is [flush][event][call][event]. The flush writes four times the L2 cache, and is
    repeated until the host has enqueued the whole call before the device reaches the first event:
    the device never waits for the host within a sample.

    Raises:
        RuntimeError: there is no such GPU.
    """

    MOST_FLUSHES = 256

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(
                f"device: expected an NVIDIA GPU that PyTorch can drive, because speed is measured "
                f"there or nowhere; got {self.device}, CUDA available: {torch.cuda.is_available()}"
            )
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self._flushed = torch.empty(
            4 * properties.L2_cache_size, dtype=torch.uint8, device=self.device
        )
        self._flushes = 1

    def capture(self, call: Call) -> Call:
        with torch.cuda.device(self.device):
            return captured(call, WARM_UP_CALLS)

    def seconds(self, call: Call) -> list[float]:
        with torch.cuda.device(self.device):
            for _ in range(WARM_UP_CALLS):
                call()
            return [self._sample(call) for _ in range(SAMPLES)]

    def _sample(self, call: Call) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self._flushes):
                self._flushed.zero_()
            start.record()
            call()
            end.record()
            host_was_late = start.query()
            torch.cuda.synchronize()
            if not host_was_late:
                return start.elapsed_time(end) * 1e-3
            if self._flushes >= self.MOST_FLUSHES:
                raise RuntimeError("clock: expected a host that enqueues a call in time; got none")
            self._flushes *= 2


@dataclass(frozen=True)
class Ceilings:
    """What the device itself does at best, measured in the same run."""

    read_bytes_per_s: float
    flops_per_s: float


def measure_ceilings(
    clock: Clock,
    device: torch.device | str,
    read_bytes: int = READ_BYTES,
    matrix_size: int = MATRIX_SIZE,
) -> Ceilings:
    """The rate of reading (a sum) and of a square bfloat16 matrix product, on random data."""
    # int32: the widest loads, and an addition that nothing has to wait for.
    words = torch.randint(2**31 - 1, (read_bytes // 4,), dtype=torch.int32, device=device)
    a, b = (
        torch.randn(matrix_size, matrix_size, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    read = statistics.median(clock.seconds(lambda: torch.sum(words, dtype=torch.int32)))
    product = statistics.median(clock.seconds(lambda: a @ b))
    return Ceilings(words.nbytes / read, 2 * matrix_size**3 / product)
