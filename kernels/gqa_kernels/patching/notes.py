"""Notes of tensors: values that one module has computed from a tensor for another module.

Layers pass the same angles to all attention modules, and their sum to the next norm. A note belongs
to one tensor object: it is deleted with the tensor and is invalid once the tensor has been written
to. No note is made where a write would go unnoticed, for inference tensors, which count no writes,
or in compiled code, where the compiler shares such values itself. Notes are not attributes of the
tensor, so pickles and copies of the tensor do not include them.
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
    """Stores a value as x's only note, under a key. Stores nothing if a later write to x would go
    unnoticed or if a gradient would flow through the value.

    Args:
        value: must not be a view of x: a view would keep x alive.
    """
    if can_be_written(x) and not (torch.is_grad_enabled() and x.requires_grad):
        number = id(x)
        of = weakref.ref(x, lambda _: _notes.pop(number, None))
        _notes[number] = _Note(of, key, x._version, value)


def read(x: Tensor, key: Any) -> Tensor | None:
    """Returns x's note under this key, or None if there is none or x has changed."""
    note = _notes.get(id(x))
    if note is None or note.of() is not x or note.version != x._version or note.key != key:
        return None
    return note.value if can_be_written(x) else None


def take(x: Tensor, key: Any) -> Tensor | None:
    """Returns what `read` does and deletes the note."""
    value = read(x, key)
    if value is not None:
        _notes.pop(id(x), None)
    return value
