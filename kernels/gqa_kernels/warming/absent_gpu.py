"""A Triton driver for a GPU that need not be present: it compiles and launches nothing."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class _Launcher:
    """Stands in for Triton's launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Utilities:
    """The part of a driver that Triton queries for devices and binaries."""

    def __init__(self, properties: Mapping[str, int]) -> None:
        self.properties = dict(properties)

    def get_device_properties(self, device: object) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        """(module, function, registers, spills, maximum threads per program); all unused."""
        return None, 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class AbsentGpu(DriverBase):
    """Compiles for `target`; tensors are on the CPU.

    Args:
        properties: the device properties that Triton and launch planning read, by Triton's names.
    """

    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget, properties: Mapping[str, int]) -> None:
        super().__init__()
        self.target, self.utils = target, _Utilities(properties)

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton must not choose this driver automatically

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        """Triton keys its caches of kernels by the device, so each target has another one."""
        return self.target

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        raise RuntimeError("benchmarker: expected a GPU; got a driver without one")


def target_named(arch: str) -> GPUTarget:
    """Returns the target of "sm_80", "sm_90", …

    Raises:
        ValueError: another name, including AMD's: for AMD, Triton also specialises kernels on the
            sizes of tensors on the GPU.
    """
    found = re.fullmatch(r"sm_([1-9][0-9]+)", arch)
    if found is None or int(found[1]) < 80:
        raise ValueError(f"arch: expected sm_80 or a later one, such as sm_90; got {arch!r}")
    return GPUTarget("cuda", int(found[1]), 32)


@contextmanager
def active(gpu: DriverBase) -> Iterator[None]:
    """A context in which `gpu` is Triton's active driver; no other GPU is queried."""
    before = driver._active
    driver.set_active(gpu)
    try:
        yield
    finally:
        driver._active = before
