"""Work that is enqueued again and again, as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def record(call: Call) -> Call:
    """The replay of a CUDA graph of what `call` enqueues on the current device, which it does not
    run. Kernels that it launches have been launched before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def captured(call: Call, num_warm_up_calls: int) -> Call:
    """The replay of a CUDA graph of one call, made after calls that warm it up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(num_warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return record(call)


class Step:
    """A call that is made again and again on the same tensors. Made once as it is, it is captured
    and replayed from then on, if `capture` asks for that."""

    def __init__(self, call: Call, *, capture: bool) -> None:
        self._next, self._call, self._capture = call, call, capture
        self._is_warm = False

    def __call__(self) -> None:
        if self._capture and self._is_warm and self._next is self._call:
            self._next = record(self._call)
        self._next()
        self._is_warm = True
