"""Values on their way between the host and a device, which neither waits for."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on a device, which fetches them when it comes to it: nobody waits."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def to_host(values: Tensor, host: Tensor) -> Callable[[], np.ndarray]:
    """Enqueues a copy of what a device holds; what is returned waits for it.

    Args:
        host: where to, of the values' shape and dtype; of a GPU's values in pinned memory.
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
