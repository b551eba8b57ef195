"""Backends: modules that export the ops. The caller chooses one by name."""

import importlib
from types import ModuleType

_BACKENDS = {"eager": "reference", "torch": "native", "triton": "fused"}


def get_backend(name: str) -> ModuleType:
    """Returns the module that exports the ops of a backend. All backends export the same functions
    with the same signatures.

    Args:
        name: "triton": this package's kernels, for an NVIDIA GPU, or a CPU with TRITON_INTERPRET=1;
            "torch": PyTorch's own fused functions, for a CPU and any other device; "eager": the
            specification in plain PyTorch, for any device, not optimised.
    Raises:
        ValueError: another name.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}; got {name!r}")
    return importlib.import_module(f"{__package__}.{_BACKENDS[name]}")
