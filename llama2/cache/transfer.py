"""Asynchronous copies between the host and a device."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Returns the values as a tensor on `device`. The copy to a GPU is enqueued on the current
    stream, and the host does not wait for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def host_tokens(*shape: int, device: torch.device) -> Tensor:
    """Returns int64 zeros on the CPU into which `to_host` copies tokens from `device`."""
    pinned = device.type == "cuda"
    return torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=pinned)


def to_host(values: Tensor, host: Tensor) -> Callable[[], np.ndarray]:
    """Enqueues a copy of the values into `host`.

    Args:
        host: a CPU tensor of the values' shape and dtype, in pinned memory if they are on a GPU.
    Returns:
        A function that waits for the copy and returns `host` as an array.
    """
    host.copy_(values, non_blocking=True)
    if values.device.type != "cuda":
        return host.numpy
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> np.ndarray:
        arrived.synchronize()
        return host.numpy()

    return wait
