"""Chooses the device and the backend of a command and prints the choice on stderr."""

import argparse
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from gqa_kernels import get_backend, interpreter

BACKENDS = ("auto", "eager", "torch", "triton")


def add_device_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", help="device to run on; default: cuda if there is one, otherwise cpu"
    )


def add_options(parser: argparse._ActionsContainer) -> None:
    """Adds `--backend` and `--device`, the arguments of `place`."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="auto: triton on a GPU that Triton supports, otherwise torch; torch: PyTorch's fused "
        "functions; triton: this package's kernels; eager: the reference implementation, slow, to "
        "check the others",
    )
    add_device_option(parser)


class Placement(NamedTuple):
    device: torch.device
    backend: str  # "eager", "torch" or "triton"
    reason: str
    interpreted: bool  # the kernels run in Triton's CPU interpreter

    @property
    def ops(self) -> ModuleType:
        return get_backend(self.backend)

    def announce(self) -> None:
        print(f"backend: {self.backend} on {self.device}: {self.reason}", file=sys.stderr)
        if self.interpreted:
            print(
                "The kernels run in Triton's interpreter on the CPU, which is slow: use it to "
                "check results, not speed.",
                file=sys.stderr,
            )


def place(backend: str, device: str | None = None) -> Placement:
    """Chooses the device and the backend; "triton" on the CPU switches Triton's interpreter on.

    Call it before anything imports Triton: Triton reads the interpreter's mode when it defines its
    first kernel.

    Args:
        backend: "auto" takes "triton" on a GPU that Triton supports, otherwise "torch".
        device: None means "cuda" if there is one, otherwise "cpu".
    Raises:
        ValueError: the backend is unknown, the device does not exist, or the backend is "triton"
            and Triton does not support the GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    where = _device(device)
    if backend == "auto":
        obstacle = _obstacle(where)
        if obstacle is not None:
            return Placement(where, "torch", obstacle, interpreted=False)
        name = torch.cuda.get_device_name(where)
        return Placement(where, "triton", f"Triton supports {name}", interpreted=False)
    if backend != "triton":
        return Placement(where, backend, "as asked for", interpreted=False)
    if where.type == "cpu":
        interpreter.enable()
    interpreted = interpreter.is_enabled()
    if not interpreted and (obstacle := _obstacle(where)) is not None:
        raise ValueError(
            f"backend: expected a GPU that Triton can drive for triton; {where}: {obstacle}"
        )
    return Placement(where, "triton", "as asked for", interpreted)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float32, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise ValueError(
            f"device: expected one that is there, such as cpu or cuda; got {name!r}"
        ) from error
    return device


def _obstacle(device: torch.device) -> str | None:
    """Returns why "auto" does not choose the kernels for this device; None if it does."""
    if device.type == "cpu":
        return "the device is the CPU" if torch.cuda.is_available() else "there is no GPU"
    if interpreter.is_enabled():
        return "Triton is set to its interpreter"
    from gqa_kernels.runtime import target

    try:
        target.check_device("device", torch.empty(0, dtype=torch.float32, device=device))
        target.current()
    except RuntimeError as error:
        return str(error)
    return None


def free_bytes(device: torch.device) -> int:
    """Returns the bytes of memory that a program can still allocate on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # MemAvailable, unlike MemFree, counts caches that the system can drop.
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text(encoding="utf-8") if meminfo.is_file() else ""
    if found := re.search(r"MemAvailable: +(\d+) kB", text):
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
