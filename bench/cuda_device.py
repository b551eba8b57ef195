"""The GPU as a `timing.Device`."""

import time
from typing import Any

import torch
from timing import Call

from llama2.decoding.graphs import captured

_FALLBACK_L2_BYTES = 64 * 2**20


class CudaDevice:
    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("CudaDevice: expected a GPU that PyTorch can drive; found none")
        properties = torch.cuda.get_device_properties()
        self.name = properties.name
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or _FALLBACK_L2_BYTES
        # The flush writes, because dirty lines of another buffer reliably evict ours.
        self._flush = torch.empty(4 * self.l2_bytes, dtype=torch.uint8, device="cuda")

    def host_seconds(self) -> float:
        return time.perf_counter()

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def seconds_between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def delay(self, seconds: float) -> None:
        # 2 GHz is above all boost clocks, so the delay is at least `seconds`.
        torch.cuda._sleep(int(seconds * 2e9))

    def flush(self) -> None:
        self._flush.zero_()

    def capture(self, call: Call) -> Call:
        return captured(call, num_warm_up_calls=1)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def rest(self, seconds: float) -> None:
        torch.cuda.synchronize()
        time.sleep(seconds)


def kernel_names(call: Call) -> list[str]:
    """Returns the kernels that one call runs on the GPU, in order, from the profiler's trace."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return [event.name for event in trace.events() if event.device_type == DeviceType.CUDA]
