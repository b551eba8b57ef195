"""Integers as a kernel has them: 32 bits unless widened, division towards zero."""

from typing import Any

import torch

from gluon_emulator.schedule import Fault


class Integer(int):
    """An integer of a kernel; a result that does not fit is a fault."""

    bits = 32

    def to(self, dtype: torch.dtype) -> "Integer":
        if dtype == torch.uint32:
            return _of(int(self) & 0xFFFFFFFF, 64)
        return _of(int(self), 64 if dtype == torch.int64 else 32)


class _Wide(Integer):
    bits = 64


def _of(value: int, bits: int) -> Integer:
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise Fault(f"{value} does not fit {bits} bits")
    return (_Wide if bits == 64 else Integer)(value)


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _quotient,
    "mod": lambda a, b: a - b * _quotient(a, b),
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
}


def _operator(name: str, is_reversed: bool) -> Any:
    def operate(self: Integer, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if is_reversed else (int(self), int(other))
        bits = max(self.bits, getattr(other, "bits", 32))
        return _of(_OPERATIONS[name](a, b), bits)

    return operate


for _name in _OPERATIONS:
    setattr(Integer, f"__{_name}__", _operator(_name, False))
    setattr(Integer, f"__r{_name}__", _operator(_name, True))
