"""Work that is enqueued again and again, as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]


def record(call: Call) -> Call:
    """Returns the replay of a CUDA graph of what `call` enqueues on the current device, which it
    does not run. Kernels that it launches have been launched before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def captured(call: Call, num_warm_up_calls: int) -> Call:
    """Returns the replay of a CUDA graph of one call, made after calls that warm it up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(num_warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return record(call)


class Step:
    """A call that is made again and again on the same tensors. Made once as it is, it is captured
    and replayed from then on, if `capture` asks for that.

    The call is handed over each time, so that whoever owns both is freed without a search for
    cycles, and a cache with it.
    """

    def __init__(self, *, capture: bool) -> None:
        self._capture, self._is_warm = capture, False
        self._replay: Call | None = None

    def __call__(self, call: Call) -> None:
        if self._capture and self._is_warm and self._replay is None:
            self._replay = record(call)
        (self._replay or call)()
        self._is_warm = True


def can_capture(model: nn.Module, asked: bool | None) -> bool:
    """Returns whether a model's steps are captured: `asked`, or if that is None, on a GPU, unless a
    module has forward hooks, which a replay would not call (tensor parallelism uses such hooks).

    Raises:
        ValueError: it is asked for without a GPU, or of a model with hooks.
    """
    hooked = [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    if not asked:
        return asked is None and on_gpu(model) and not hooked
    if not on_gpu(model):
        device = next(model.parameters()).device
        raise ValueError(f"capture: expected a model on a GPU; got one on {device}")
    if hooked:
        raise ValueError(f"capture: expected a model without forward hooks; got {hooked[0]!r}")
    return True


def on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda
