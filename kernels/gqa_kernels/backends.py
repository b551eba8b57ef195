"""A backend is a module that exports the ops: chosen by name, never by what happens to be there."""

import importlib
from types import ModuleType

_BACKENDS = {"eager": "reference", "triton": "fused"}


def get_backend(name: str) -> ModuleType:
    """The ops as a module: "eager" is plain PyTorch on any device, "triton" the kernels of this
    package on a GPU. Both export the same functions; nothing falls back from one to the other.

    Raises:
        ValueError: `name` is neither.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}; got {name!r}")
    return importlib.import_module(f"{__package__}.{_BACKENDS[name]}")
