"""Compiles exactly what a public function launches, for a GPU that need not be present.

This module activates a Triton driver that launches nothing and calls the function on CPU tensors.
The function's launcher, specialisation, compiler and shared-memory check run as on the GPU, and
each launch is recorded. Triton's mode is fixed when a kernel is defined: use a separate process in
which the interpreter is off.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from gqa_kernels.warming.absent_gpu import AbsentGpu


class Architecture(NamedTuple):
    """A target and its limits as documented by its vendor."""

    target: GPUTarget
    num_sms: int
    shared_per_program: int  # bytes
    shared_per_sm: int
    warps_per_sm: int
    programs_per_sm: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 108, 166912, 167936, 64, 32),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 132, 232448, 233472, 64, 32),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 148, 232448, 233472, 64, 32),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 170, 101376, 102400, 48, 24),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 304, 65536, 65536, 32, 16),
}


class Launch(NamedTuple):
    """One launch of a compiled kernel."""

    kernel: str  # "norm.forward"
    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    shared: int  # bytes per program
    hash: str  # of the binary, in Triton's cache

    def files(self) -> dict[str, str]:
        """The paths of all stages of compilation, by suffix: ttir, ttgir, ptx, cubin, …"""
        group = get_cache_manager(self.hash).get_group(f"{self.name}.json")
        return {file.rpartition(".")[2]: path for file, path in group.items()}


class _Launcher:
    """Stands in for Triton's launcher and records the launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        module = source.fn.module.removeprefix("gqa_kernels.ops.").removesuffix("_kernel")
        kernel = metadata.name.removeprefix("_").removesuffix("_kernel")
        # A file with one kernel has the kernel's name.
        self.kernel = module if module.endswith(f".{kernel}") else f"{module}.{kernel}"
        self.metadata = metadata

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
        launch = Launch(
            kernel=self.kernel,
            name=self.metadata.name,
            grid=(grid_x, grid_y, grid_z),
            num_warps=self.metadata.num_warps,
            num_stages=self.metadata.num_stages,
            shared=self.metadata.shared,
            hash=self.metadata.hash,
        )
        driver.active.launches.append(launch)


class CaptureDriver(AbsentGpu):
    """Compiles for `arch` and records launches; tensors are on the CPU."""

    launcher_cls = _Launcher

    def __init__(self, arch: str) -> None:
        architecture = ARCHITECTURES[arch]
        properties = {
            "max_shared_mem": architecture.shared_per_program,
            "multiprocessor_count": architecture.num_sms,
            "max_num_regs": 65536,
            "warpSize": architecture.target.warp_size,
        }
        super().__init__(architecture.target, properties)
        self.launches: list[Launch] = []


# One driver per architecture, because a compiled kernel keeps the launcher of its first driver.
_driver = cache(CaptureDriver)


def capture(arch: str, call: Callable[[], object]) -> list[Launch]:
    """Returns the launches of call() on `arch`, in order.

    Raises:
        ValueError: an architecture that is not in ARCHITECTURES.
        Any error of the compiler, including `OutOfResources` for shared memory.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    active = _driver(arch)
    driver.set_active(active)
    active.launches.clear()
    call()
    return list(active.launches)
