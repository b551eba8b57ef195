"""What one module has computed of a tensor for another one: a note of the tensor.

Layers hand the same angles to all attentions, and their sum to the next norm. A note belongs to one
tensor object and dies with it, is void once the tensor was written to, and is not made where that
cannot be seen: of inference tensors, which count no writes, and in compiled code, whose compiler
finds such sharing by itself. It lies beside the tensor, not on it: who pickles or copies a tensor
gets the tensor alone.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling


class _Note(NamedTuple):
    of: weakref.ref[Tensor]
    key: Any
    version: int
    value: Tensor


_notes: dict[int, _Note] = {}  # by the id of the tensor


def can_be_written(x: Tensor) -> bool:
    return type(x) is Tensor and not is_compiling() and not x.is_inference()


def write(x: Tensor, key: Any, value: Tensor) -> None:
    """Notes a value of x under a key, in place of what was noted before; nothing where a later
    write to x could not be seen, or where a gradient would go through the value.

    Args:
        value: no view of x, which would live as long as its note.
    """
    if can_be_written(x) and not (torch.is_grad_enabled() and x.requires_grad):
        number = id(x)
        of = weakref.ref(x, lambda _: _notes.pop(number, None))
        _notes[number] = _Note(of, key, x._version, value)


def read(x: Tensor, key: Any) -> Tensor | None:
    """What was noted of x under this key, if x is as it was."""
    note = _notes.get(id(x))
    if note is None or note.of() is not x or note.version != x._version or note.key != key:
        return None
    return note.value if can_be_written(x) else None


def take(x: Tensor, key: Any) -> Tensor | None:
    """`read` for the last time: the value is not kept any longer."""
    value = read(x, key)
    if value is not None:
        _notes.pop(id(x), None)
    return value
