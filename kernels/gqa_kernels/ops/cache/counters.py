"""Zeroed counters, for kernels that determine which of their programs finishes last.

Such a kernel resets its counters to zero. Clearing them before every launch would need another
launch and take as long as the counters save, so they are cleared once and kept. Launches that can
run at the same time must not share counters:

- Launches on one stream run one after another and share the buffer of that stream.
- A captured launch runs whenever its graph is replayed, on any stream, concurrently with others. It
  gets counters that no other launch uses: a part of a reserve that was cleared earlier, outside a
  capture. Replays of one graph run one after another.
- If there is no reserve during a capture, or it is used up, the graph clears the counters itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MIN_COUNT = 1 << 12
_RESERVE = 1 << 20  # 4 MB: enough for the 80 layers of 70B in 25 graphs of 64 sequences


class _Reserve(NamedTuple):
    counters: Tensor
    num_used: int


_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, _Reserve] = {}
_in_graphs: list[Tensor] = []  # kept alive: graphs hold addresses, not tensors


def zeroed(count: int, device: torch.device) -> Tensor:
    """Returns at least `count` zeroed int32 counters for one launch on the current stream of
    `device`, which is the current device."""
    if device.type == "cpu":  # the interpreter runs one launch at a time
        return _for_stream(count, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _for_graph(count, device)
    _refill(device)
    return _for_stream(count, device, torch.cuda.current_stream().cuda_stream)


def _for_stream(count: int, device: torch.device, stream: int) -> Tensor:
    counters = _of_stream.get((device, stream))
    if counters is None or len(counters) < count:
        size = max(_MIN_COUNT, 1 << (count - 1).bit_length())
        counters = torch.zeros(size, dtype=torch.int32, device=device)
        _of_stream[device, stream] = counters
    return counters


def _refill(device: torch.device) -> None:
    """Makes a new reserve if there is none or most of it is used. A capture waits for the device
    before it starts, so the zeros are written by then."""
    reserve = _reserves.get(device)
    if reserve is None or reserve.num_used > len(reserve.counters) // 2:
        if reserve is not None:
            _in_graphs.append(reserve.counters)
        counters = torch.zeros(_RESERVE, dtype=torch.int32, device=device)
        _reserves[device] = _Reserve(counters, num_used=0)


def _for_graph(count: int, device: torch.device) -> Tensor:
    reserve = _reserves.get(device)
    if reserve is None or reserve.num_used + count > len(reserve.counters):
        return torch.zeros(count, dtype=torch.int32, device=device)
    end = reserve.num_used + count
    _reserves[device] = reserve._replace(num_used=end)
    return reserve.counters[reserve.num_used : end]
