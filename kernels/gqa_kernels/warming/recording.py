"""Records the launches of a call instead of executing them.

Triton calls `knobs.runtime.jit_cache_hook` before it compiles, and neither compiles nor launches if
the hook returns True. The hook's argument `specialization_data` is all that `JITFunction.preload`
needs to compile the same binary in another process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import driver

from gqa_kernels.warming.absent_gpu import AbsentGpu, active, target_named

_PACKAGE = "gqa_kernels."

# The number of SMs and the size of shared memory do not affect compilation.
_PROPERTIES = {"multiprocessor_count": 132, "max_shared_mem": 2**20, "max_num_regs": 65536}


class Kernel(NamedTuple):
    """A kernel and the specialisation to compile."""

    module: str
    name: str
    specialization: str  # JSON: Triton's signature, constants, options and target

    def __str__(self) -> str:
        return f"{self.module.removeprefix(_PACKAGE)}.{self.name}"


class _AbsentGpu(AbsentGpu):
    def get_current_device(self) -> object:
        """Returns a new device, for which nothing has been compiled in this process."""
        return self


def record(call: Callable[[], object], arch: str | None) -> list[Kernel]:
    """Returns the distinct kernels of this package that `call()` launches, in order, without
    executing them.

    Args:
        arch: that of a GPU that need not be present, with tensors on the CPU; None: the active GPU,
            on which kernels that this process has already compiled are launched as usual.
    Raises:
        ValueError: arch is unknown, or None without a GPU.
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
            "arch: expected a name such as sm_90, as there is no GPU that Triton can drive "
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
