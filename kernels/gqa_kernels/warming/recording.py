"""The launches of a call, written down in place of being made.

Triton asks `knobs.runtime.jit_cache_hook` before it compiles, and neither compiles nor launches
where that says so. What it hands over, `specialization_data`, is all that `JITFunction.preload`
needs to compile the same binary in another process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import driver

from gqa_kernels.warming.absent_gpu import AbsentGpu, active, target_named

_PACKAGE = "gqa_kernels."

# No kernel is compiled differently for another number of SMs, or for more shared memory.
_PROPERTIES = {"multiprocessor_count": 132, "max_shared_mem": 2**20, "max_num_regs": 65536}


class Kernel(NamedTuple):
    """A kernel, and what is to be compiled of it."""

    module: str
    name: str
    specialization: str  # JSON: Triton's signature, constants, options and target

    def __str__(self) -> str:
        return f"{self.module.removeprefix(_PACKAGE)}.{self.name}"


class _AbsentGpu(AbsentGpu):
    def get_current_device(self) -> object:
        """One of its own, for which nothing has been compiled in this process."""
        return self


def record(call: Callable[[], object], arch: str | None) -> list[Kernel]:
    """The different kernels of this package that `call()` launches, in order, none launched.

    Args:
        arch: of a GPU that need not be there, tensors being on the CPU; None: the active GPU, whose
            launches of what this process has compiled before are made, as ever.
    Raises:
        ValueError: arch is no known one, or None where Triton drives no GPU.
    """
    if arch is not None:
        gpu = _AbsentGpu(target_named(arch), _PROPERTIES)
        with active(gpu), _recorded() as kernels:
            call()
        return list(kernels)
    try:
        driver.active.get_current_target()
    except RuntimeError as error:
        raise ValueError(
            "arch: expected the name of one, such as sm_90, where Triton drives no GPU "
            f"({error}); got None"
        ) from error
    with _recorded() as kernels:
        call()
    return list(kernels)


@contextmanager
def _recorded() -> Iterator[dict[Kernel, None]]:
    kernels: dict[Kernel, None] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if not fn.module.startswith(_PACKAGE):
            return False
        kernels[Kernel(fn.module, fn.name, compile["specialization_data"])] = None
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        yield kernels
    finally:
        knobs.runtime.jit_cache_hook = before
