"""Loads kernels' modules on stand-ins for Gluon and Triton."""

import importlib.util
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gluon_emulator import language

Emulated = types.ModuleType


def load(
    names: Sequence[str], seed: int = 0, change: Callable[[str, str], str] = lambda _, text: text
) -> Emulated:
    """The last of these modules, whose kernels run here when they are launched, on CPU tensors.

    Args:
        names: the modules with kernels, each after those that it imports. Their packages import
            whatever else they need.
        seed: determines the interleavings of all launches.
        change: (name of a module, source) → source that runs instead, to test that faults are
            noticed.
    """
    stand_ins = language.modules()
    seeds = random.Random(seed)
    # Before the stand-ins are in place: this imports the packages that hold the modules.
    paths = {name: Path(importlib.util.find_spec(name).origin) for name in names}
    with _in_place(stand_ins):
        for name, path in paths.items():
            module = types.ModuleType(name)
            module.__file__, module.__package__ = str(path), name.rpartition(".")[0]
            module.__dict__["__seeds__"] = seeds
            sys.modules[name] = stand_ins[name] = module
            text = change(name, path.read_text(encoding="utf-8"))
            exec(compile(text, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def _in_place(stand_ins: dict[str, types.ModuleType]) -> Iterator[None]:
    """Imports find the stand-ins, also those that are added, until the end of the context."""
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]
