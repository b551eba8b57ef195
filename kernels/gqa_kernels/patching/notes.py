"""What one module has computed of a tensor for another one: noted on the tensor itself.

Layers hand the same angles to all attentions, and their sum to the next norm. A note belongs to one
tensor object and dies with it, is void once the tensor was written to, and is not made where that
cannot be seen: of inference tensors, which count no writes, and in compiled code, whose compiler
finds such sharing by itself.
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
    return type(x) is Tensor and not is_compiling() and not x.is_inference()


def write(x: Tensor, key: Any, value: Tensor) -> None:
    """Notes a value of x under a key, in place of what was noted before; nothing where a later
    write to x could not be seen, or where a gradient would go through the value."""
    if can_be_written(x) and not (torch.is_grad_enabled() and x.requires_grad):
        setattr(x, _NOTE, _Note(key, x._version, value))


def read(x: Tensor, key: Any) -> Tensor | None:
    """What was noted of x under this key, if x is as it was."""
    note = getattr(x, _NOTE, None) if can_be_written(x) else None
    if note is None or note.version != x._version or note.key != key:
        return None
    return note.value


def take(x: Tensor, key: Any) -> Tensor | None:
    """`read` for the last time: the value is not kept any longer."""
    value = read(x, key)
    if value is not None:
        delattr(x, _NOTE)
    return value
