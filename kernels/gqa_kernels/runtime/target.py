"""The processor that the kernels run on. Only this module queries Triton's active driver."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from gqa_kernels import interpreter

# Triton fixes the mode of a kernel when it is defined; the kernels are defined after this line.
_IS_INTERPRETED = interpreter.is_enabled()
if _IS_INTERPRETED:
    interpreter.enable()  # TRITON_INTERPRET=1 alone does not apply the corrections


class Target(NamedTuple):
    """The processor for which a launch is planned."""

    arch: str  # "sm_90", "gfx942", …
    num_sms: int
    has_tma: bool  # hardware loads through descriptors
    max_warps: int  # per program: 1024 threads


# The interpreter's target is small, so that tests cross tile borders with small inputs.
_INTERPRETED = Target(arch="interpreter", num_sms=4, has_tma=True, max_warps=32)


def current() -> Target:
    """Returns the active device's target.

    Raises:
        RuntimeError: there is no GPU that Triton can drive, and its interpreter is off.
    """
    if _IS_INTERPRETED:
        return _INTERPRETED
    active = driver.active
    return _describe(active, active.get_current_device())


@cache
def _describe(active: Any, device: object) -> Target:
    gpu = active.get_current_target()
    properties = active.utils.get_device_properties(device)
    num_sms = properties["multiprocessor_count"]
    max_warps = 1024 // gpu.warp_size
    if gpu.backend == "cuda":
        return Target(f"sm_{gpu.arch}", num_sms, gpu.arch in (90, 100, 103), max_warps)
    return Target(str(gpu.arch), num_sms, has_tma=False, max_warps=max_warps)


def has_float8() -> bool:
    """Whether kernels can convert float8_e4m3fn here: with compute capability 8.9 or newer."""
    vendor, _, number = current().arch.partition("_")
    return vendor != "sm" or int(number) >= 89


def check_device(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError unless kernels can run on the tensor's device."""
    if _IS_INTERPRETED:
        if tensor.device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name}: expected a tensor on the CPU; got {tensor.device}")
        return
    try:
        if _drives(driver.active, tensor.device):
            return
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: expected a GPU that Triton can drive; found none. "
            'Use get_backend("torch"), or set TRITON_INTERPRET=1 to check kernels on the CPU'
        ) from error
    expected = driver.active.get_active_torch_device().type
    raise RuntimeError(
        f"{name}: expected a tensor on {expected}; got one on {tensor.device}. "
        'Use get_backend("torch") there'
    )


@cache
def _drives(active: Any, device: torch.device) -> bool:
    return active.get_active_torch_device().type == device.type


_HERE = nullcontext()


def device_of(tensor: Tensor) -> AbstractContextManager:
    """A context in which the tensor's GPU is the current device, for a launch."""
    index = tensor.get_device()  # −1 on the CPU
    if index < 0 or index == driver.active.get_current_device():
        return _HERE
    return torch.accelerator.device_index(index)
