"""Counters at zero, for kernels whose programs find out which of them is the last.

Such a kernel leaves its counters at zero again. Clearing them for every launch would be a launch of
its own, as long as what the counters save, so they are cleared once and kept; the question is only
who may share them. No two launches that can run at the same time may:

- Launches of one stream run one after another and share the buffer of that stream.
- A captured launch runs whenever its graph is replayed, on any stream, beside any other. It gets
  counters that nobody else is ever given: a part of a reserve that was cleared, outside a capture,
  before. Replays of one graph run one after another.
- Where a capture finds the reserve used up, or never made, its counters are cleared in the graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MIN_COUNT = 1 << 12
_RESERVE = 1 << 20  # 4 MB: 70B's 80 layers in 25 graphs of 64 sequences


class _Reserve(NamedTuple):
    counters: Tensor
    num_used: int


_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, _Reserve] = {}
_in_graphs: list[Tensor] = []  # graphs hold addresses, not tensors


def zeroed(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 counters at zero for one launch on the current stream of `device`,
    the current device."""
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
    """A new reserve where there is none or most of it is used. Whoever captures a graph waits for
    the device first, hence for the zeros."""
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
