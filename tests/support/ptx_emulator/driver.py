"""A Triton driver that runs each launch's PTX on CPU tensors.

    with emulating("sm_80") as emulator:
        function(tensors on the CPU)
    print(emulator.findings)

A process can use only one architecture: a compiled kernel keeps its first launcher.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from ptx_emulator import specialised
from ptx_emulator.machine import Launch, Options
from ptx_emulator.memory import GlobalMemory
from ptx_emulator.parse import parse
from ptx_emulator.tensor_map import TensorMap
from ptx_emulator.translation import Program


class Limits(NamedTuple):
    """The device properties for which launches are planned."""

    capability: int
    num_sms: int
    shared_per_program: int


# Launches are planned for num_sms; a small number keeps grids small.
ARCHITECTURES = {"sm_80": Limits(80, 108, 166912), "sm_90": Limits(90, 132, 232448)}
_SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}


class Record(NamedTuple):
    """One launch that ran."""

    kernel: str
    grid: tuple
    threads: int
    instructions: int
    blocks_run: int
    seconds: float


class Unsupported(NotImplementedError):
    """The driver does not support something that a launch needs."""


programs: dict[str, Program] = {}  # by PTX


def _program(text: str) -> Program:
    if text not in programs:
        programs[text] = Program(parse(text))
    return programs[text]


def _flatten(signature: Any, values: Any, path: str, output: list) -> None:
    if isinstance(signature, tuple):
        for k, (s, v) in enumerate(zip(signature, values, strict=True)):
            _flatten(s, v, f"{path}[{k}]", output)
    elif signature != "constexpr":
        output.append((path, signature, values))


class _Launcher:
    """A compiled kernel: finds its PTX, binds arguments to parameters, runs it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature
        self.metadata = metadata
        self.program = None

    def _load(self) -> Program:
        if self.program is None:
            group = get_cache_manager(self.metadata.hash).get_group(f"{self.metadata.name}.json")
            path = next(p for f, p in group.items() if f.endswith(".ptx"))
            text = Path(path).read_text(encoding="utf-8")
            active = driver.active
            if active.mutate is not None:
                text = active.mutate(self.metadata.name, text)
            self.text = text
            self.program = _program(text)
        return self.program

    def __call__(self, gx, gy, gz, stream, function, packed, launch_metadata, enter, leave, *args):
        active = driver.active
        if active.mutate is not None or getattr(self, "mutated", False):
            self.program = None
            self.mutated = active.mutate is not None
        program = self._load()
        launch = Launch(
            program, None, {}, (gx, gy, gz), self.metadata.shared, active.options, specialised.run
        )
        launch.findings = active.findings
        launch.memory = GlobalMemory(launch.report)
        self._bind(launch, args)
        started = time.perf_counter()
        launch.run()
        active.records.append(
            Record(
                self.metadata.name, (gx, gy, gz), program.kernel.num_threads,
                len(program.kernel.instructions), launch.num_blocks_run,
                time.perf_counter() - started,
            )
        )  # fmt: skip

    def _bind(self, launch: Launch, args: tuple) -> None:
        flat: list = []
        for (name, kind), value in zip(self.signature.items(), args, strict=True):
            _flatten(kind, value, name, flat)
        params = iter(self.program.kernel.params)
        known: dict = {}
        meta = iter(getattr(self.metadata, "tensordesc_meta", None) or [])

        def region_of(name, tensor):
            item = tensor.element_size()
            extent = (
                (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1)
                * item
                if tensor.numel()
                else 0
            )
            key = (tensor.data_ptr(), extent)
            if key not in known:
                known[key] = launch.memory.add(name, tensor.data_ptr(), extent, item)
            return known[key]

        def put(value, kind):
            name, ptx_kind, _ = next(params)
            if kind == "pointer":
                launch.params[name] = np.uint64(value)
            elif kind in ("fp32", "f32"):
                launch.params[name] = np.float32(value).view(np.uint32)
            elif kind in _SIZES:
                width = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s8": 1, "b8": 1}.get(
                    ptx_kind, _SIZES[kind]
                )
                bits = int(value) & ((1 << 8 * width) - 1)
                launch.params[name] = np.dtype(f"u{width}").type(bits)
            else:
                raise Unsupported(f"argument of type {kind}")

        for name, kind, value in flat:
            if kind.startswith("*"):
                put(0 if value is None else region_of(name, value).pointer, "pointer")
            elif kind.startswith("tensordesc"):
                region = region_of(name, value.base)
                described = next(meta, None)
                if described is None:
                    put(region.pointer, "pointer")
                    for number in (*value.shape, *value.strides):
                        put(number, "i64")
                    put(value.padding == "nan", "i1")
                    if hasattr(value, "round_f32_to_tf32"):  # since Triton 3.7
                        put(value.round_f32_to_tf32, "i1")
                else:
                    if described.get("fp4_padded"):
                        raise Unsupported("fp4")
                    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[described["swizzle"]]
                    tensor = TensorMap(
                        region, value.base.element_size(), value.shape, value.strides,
                        described["block_size"], swizzle, value.padding,
                    )  # fmt: skip
                    param, _, _ = next(params)
                    # Fits 32 bits, because some versions use 32-bit addresses of parameters.
                    handle = 0xDE5C0000 + 128 * len(launch.descriptors)
                    launch.params[param] = np.uint64(handle)
                    launch.descriptors[handle] = tensor
                for number in value.shape:
                    put(number, "i32")
                for number in value.strides:
                    put(number, "i64")
            else:
                put(value, kind)
        if self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
            raise Unsupported("scratch memory")
        for name, _, _ in params:
            launch.params[name] = np.uint64(0)


class _Utilities:
    """The part of a driver that Triton queries for devices and binaries."""

    def __init__(self, limits: Limits) -> None:
        self.properties = {
            "max_shared_mem": limits.shared_per_program,
            "multiprocessor_count": limits.num_sms,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def get_device_properties(self, device: object) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple:
        return None, 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class EmulatingDriver(DriverBase):
    """The active driver while `emulating`: a GPU whose memory is the CPU's."""

    launcher_cls = _Launcher

    def __init__(self, arch: str) -> None:
        super().__init__()
        limits = ARCHITECTURES[arch]
        self.target = GPUTarget("cuda", limits.capability, 32)
        self.utils = _Utilities(limits)
        self.options = Options()
        self.findings: list[str] = []
        self.records: list[Record] = []
        self.mutate = None  # (kernel name, PTX) → PTX, to test that faults are noticed

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("an emulated launch takes no time")


_driver = cache(EmulatingDriver)


@contextmanager
def emulating(arch: str, *, mutate=None, **options: Any) -> Iterator[EmulatingDriver]:
    """A context in which launches run in the emulator.

    Args:
        mutate: (kernel's name, PTX) → PTX that runs instead.
        options: those of `machine.Options`.
    Raises:
        RuntimeError: Triton's interpreter is on, so nothing is compiled.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected it to be unset; got it set")
    active = _driver(arch)
    driver.set_active(active)
    before = active.options, active.mutate, active.findings, active.records
    active.options, active.mutate = Options(**options), mutate
    active.findings, active.records = [], []
    try:
        yield active
    finally:
        active.options, active.mutate = before[0], before[1]
