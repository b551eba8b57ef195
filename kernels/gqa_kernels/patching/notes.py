"""Notes: results that one module computes from a tensor for a later module, stored as an attribute
of that tensor.

All attention modules take the same angles, and a layer can compute the norm that comes after it. A
note belongs to one tensor object and is freed with it. It is invalid once the tensor has been
written to, which PyTorch's version counter shows. Two kinds of tensors get no note: inference
tensors, which have no version counter, and tensors in compiled code, where the compiler finds
common subexpressions itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

_NOTE = "_gqa_kernels_note"


class _Note(NamedTuple):
    key: Any
    version: int
    value: Tensor


def can_be_written(x: Tensor) -> bool:
    """Whether x can have a note."""
    return type(x) is Tensor and not is_compiling() and not x.is_inference()


def write(x: Tensor, key: Any, value: Tensor) -> None:
    """Stores a value under a key as x's only note. Does nothing if a later write to x could not be
    detected, or if a gradient would go through the value."""
    if can_be_written(x) and not (torch.is_grad_enabled() and x.requires_grad):
        setattr(x, _NOTE, _Note(key, x._version, value))


def read(x: Tensor, key: Any) -> Tensor | None:
    """The value noted under this key, or None if there is none or x was written to since."""
    note = getattr(x, _NOTE, None) if can_be_written(x) else None
    if note is None or note.version != x._version or note.key != key:
        return None
    return note.value


def take(x: Tensor, key: Any) -> Tensor | None:
    """`read`, and deletes the note."""
    value = read(x, key)
    if value is not None:
        delattr(x, _NOTE)
    return value
