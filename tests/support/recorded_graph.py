"""A stand-in for a CUDA graph on the CPU: replays the operations of a call on the same tensors.

Like a graph, it does not run the Python code again: numbers are those of the recording, and results
go to the same tensors. Like a capture, recording raises for operations that wait for a device, and
leaves every tensor unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that return values to the host, or whose sizes depend on values.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, dict[int, Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # tensors and their values before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema, name = func._schema, func.name().split("::")[1].split(".")[0]
        masks = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1])
        )
        if name in _WAITS or masks:
            raise RuntimeError(f"{name}: expected an operation that does not wait in a capture")
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                if given is not None:
                    self.before.append((given, given.clone()))
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        made = {
            place: x
            for place, x in enumerate(_tensors(out))
            if x.untyped_storage().data_ptr() not in given  # whatever the schema says of aliases
        }
        self.calls.append((func, args, kwargs, made))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def record(call: Callable[[], Any]) -> Callable[[], None]:
    """Has the interface of `llama2.decoding.graphs.record`."""
    with _Recording() as recording:
        call()
    for tensor, held in reversed(recording.before):
        tensor.copy_(held)

    def replay() -> None:
        for func, args, kwargs, made in recording.calls:
            out = _tensors(func(*args, **kwargs))
            for place, tensor in made.items():
                tensor.copy_(out[place])

    return replay
