"""Repeated GPU work as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]


def record(call: Call) -> Call:
    """Captures `call` in a CUDA graph on the current device and returns the replay; capturing does
    not run it. Every kernel that `call` launches must have been launched before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def captured(call: Call, num_warm_up_calls: int) -> Call:
    """Makes `num_warm_up_calls` calls, captures one in a CUDA graph and returns the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(num_warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return record(call)


class Step:
    """A repeated call on the same tensors: with `capture` it runs once, is captured, and from then
    on replayed.

    The call is passed each time instead of stored: a reference cycle with its owner would keep the
    owner and its cache alive until garbage collection.
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
    """Returns whether to capture a model's steps: `asked`, or if that is None, whether the model is
    on a GPU and has no module with forward hooks, which a replay would not call (tensor parallelism
    uses such hooks).

    Raises:
        ValueError: `asked` is true without a GPU, or for a model with hooks.
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
