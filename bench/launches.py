"""Records which of this package's kernels a call launches.

It sets a hook on every `triton.jit` function of `gqa_kernels`, which is called at each launch, on a
GPU and in Triton's interpreter, so that the check can be tested without a GPU. Kernels of other
packages, including inductor's, are other functions and are not counted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime import KernelInterface


def package_kernels() -> dict[str, Any]:
    """The jit functions of the package's modules, by qualified name."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith("gqa_kernels."):
            continue
        for name, value in vars(module).items():
            # Only functions defined in the module, so that each is counted once.
            if (
                isinstance(value, KernelInterface)
                and hasattr(value, "add_pre_run_hook")
                and value.fn.__module__ == module_name
            ):
                found[f"{module_name}.{name}"] = value
    return found


@contextmanager
def recorded() -> Iterator[list[str]]:
    """A context that records the names of the package's kernels launched inside it, in order."""
    launched: list[str] = []
    hooks = []
    for name, kernel in package_kernels().items():

        def hook(*_: Any, name: str = name, **__: Any) -> None:
            launched.append(name)

        kernel.add_pre_run_hook(hook)
        hooks.append((kernel, hook))
    try:
        yield launched
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


class NotWhatItSays(AssertionError):
    """A backend did not run the kernels that its name promises."""


# Backends that are this package's, and how the names of their kernels begin. All run the kernel
# that prepares delta.
_ATTENTION = "gqa_kernels.ops.attention."
OWN = {
    "triton": ("gqa_kernels.",),
    "hopper": (f"{_ATTENTION}hopper.", f"{_ATTENTION}backward._prepare_kernel"),
    "specialized": tuple(
        f"{_ATTENTION}{module}." for module in ("dkdv_specialized", "forward", "backward", "dq")
    ),
}


def check(backend: str, launched: list[str]) -> None:
    """Raises NotWhatItSays if a backend in OWN launched none of its kernels, or one of this
    package's that are not its own; or if another backend launched one of this package's."""
    if backend in OWN and not launched:
        raise NotWhatItSays(f"{backend}: expected a launch of this package's kernels; got none")
    own = OWN.get(backend)
    if own is None and launched:
        raise NotWhatItSays(f"{backend}: expected none of this package's kernels; got {launched}")
    if own and not all(name.startswith(own) for name in launched):
        raise NotWhatItSays(f"{backend}: expected kernels of {own[0]}*; got {launched}")
