"""A backend is a module that exports the ops: chosen by name, never by what happens to be there."""

import importlib
from types import ModuleType

_BACKENDS = {"eager": "reference", "torch": "native", "triton": "fused"}


def get_backend(name: str) -> ModuleType:
    """The ops as a module: "triton" are the kernels of this package, for a GPU; "torch" is made of
    PyTorch's own fused functions, for a CPU and for any other device; "eager" is plain PyTorch on
    any device, the specification, which nobody has tuned. All export the same functions; nothing
    falls back from one to another.

    Raises:
        ValueError: `name` is none of them.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}; got {name!r}")
    return importlib.import_module(f"{__package__}.{_BACKENDS[name]}")
