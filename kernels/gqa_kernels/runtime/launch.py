"""Launches of compiled kernels without the work that Triton repeats at every launch.

    _launch_forward = launch.launcher(_forward_kernel)
    _launch_forward((num_rows,), x_ptr=x, y_ptr=y, …, num_warps=4)

launches the same binary as `_forward_kernel[(num_rows,)](x_ptr=x, y_ptr=y, …, num_warps=4,
enable_fp_fusion=True)`, on the same device and stream, in less host time. The first launch with a
new key goes through Triton, which compiles. The binary is stored under that key, and later launches
with the key use it directly. The key contains everything on which Triton specialises a binary:

- the active driver and its current device;
- the kernel (each has its own launcher), num_warps, num_stages and maxnreg;
- the type of every argument, and

  | | |
  |---|---|
  | tensor | dtype; whether its address is a multiple of 16 |
  | int | whether it is 1; whether it is a multiple of 16; whether it is an i32, an i64 or a u64 |
  | int, `do_not_specialize` | whether it is an i32, an i64 or a u64 |
  | tuple of ints | for each int as above: Triton ignores `do_not_specialize` in tuples |
  | `TensorDescriptor` | dtype; shape of the block |
  | `tl.constexpr` | the value |
  | float, bool, None | nothing else |

Launches go through Triton itself

- in its interpreter, and with a driver whose launcher is not Triton's own for NVIDIA. Another
  launcher may specialise on more (AMD's does, on the size of a tensor) or do more than launch;
- in versions other than 3.6 to 3.9, whose specialisation rules were not checked;
- while hooks observe launches or change how kernels are compiled: `launch_enter_hook`,
  `launch_exit_hook`, a kernel's pre-run hooks, `debug`, `instrumentation_mode`,
  `add_stages_inspection_hook`, or a replaced `JITFunction.run`, as some profilers install;
- with an argument of a type that is not in the table.

A direct launch omits one of Triton's checks: that the globals used by a kernel have not changed
since it was compiled. The globals of this package's kernels are constants and types.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, KernelInterface, driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_LAUNCHERS = {"triton.backends.nvidia.driver.CudaLauncher"}
_TRITONS_GLOBALS = vars(jit)  # identifies Triton's own JITFunction.run, as opposed to a replacement


class _UnknownKind(TypeError):
    """The type of an argument is not in the table."""


# --- The key of an argument, as an expression in its name ----------------------------------------

_TENSOR, _TENSOR_AT_ANY_ADDRESS = "{0}.dtype, {0}.data_ptr() & 15 == 0", "{0}.dtype"
_INT = (
    "(1 if {0} == 1 else 2 if {0} & 15 else 16)"
    " if -0x80000000 <= {0} <= 0x7FFFFFFF else (_wide({0}), {0} & 15 == 0)"
)
_INT_OF_ANY_VALUE = "0 if -0x80000000 <= {0} <= 0x7FFFFFFF else _wide({0})"
_TUPLE = "_ints({0})"
_DESCRIPTOR = "{0}.base.dtype, *{0}.block_shape"


def _wide(value: int) -> str:
    """The type of an int that does not fit an i32."""
    return "i64" if -(2**63) <= value < 2**63 else "u64"


_key_of_int = eval(f"lambda value: {_INT.format('value')}", {"_wide": _wide})


# The tuples are strides: few different ones, which recur at every call.
@lru_cache(maxsize=4096)
def _ints(values: tuple) -> tuple:
    if {*map(type, values)} - {int}:
        raise _UnknownKind
    return tuple(map(_key_of_int, values))


def _expression(parameter: Any, kind: type) -> str:
    """The part of the key for an argument of this type, in addition to the type, as an expression
    in the argument's name, written {0}."""
    if parameter.is_constexpr:
        if kind not in (int, bool, type(None)):
            raise _UnknownKind
        return "{0}"
    anything = parameter.do_not_specialize
    if parameter.annotation or parameter.do_not_specialize_on_alignment:
        raise _UnknownKind
    if kind in (Tensor, torch.nn.Parameter):
        return _TENSOR_AT_ANY_ADDRESS if anything else _TENSOR
    if kind is int:
        return _INT_OF_ANY_VALUE if anything else _INT
    if kind is tuple:
        return _TUPLE
    if kind is TensorDescriptor:
        return _DESCRIPTOR
    if kind in (float, bool, type(None)):
        return ""
    raise _UnknownKind


def _describer(kernel: JITFunction, types: tuple[type, ...]) -> Callable[..., tuple] | None:
    """Returns a function from arguments of these types to their key; None if the table lacks a
    type."""
    names = kernel.arg_names
    try:
        parts = [
            _expression(parameter, kind).format(name)
            for name, parameter, kind in zip(names, kernel.params, types, strict=True)
        ]
    except _UnknownKind:
        return None
    key = "".join(f"{part}, " for part in parts if part)
    return eval(f"lambda {', '.join(names)}: ({key})", {"_wide": _wide, "_ints": _ints})


# --- Launches ------------------------------------------------------------------------------------


@cache
def _launches_directly(active: Any) -> bool:
    """Whether this driver's launcher and this version of Triton are known to this module."""
    cls = getattr(active, "launcher_cls", None)
    name = f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', '')}"
    return name in _LAUNCHERS and triton.__version__.startswith(_VERSIONS)


def _is_watched() -> bool:
    """Whether a hook or profiler that would miss direct launches observes or changes launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(JITFunction.run, "__globals__", None) is not _TRITONS_GLOBALS
    )


class Options(NamedTuple):
    """Options of a launch; None means Triton's default."""

    num_warps: int
    num_stages: int | None
    maxnreg: int | None


class _Launcher:
    """The binaries of one kernel.

    Threads may launch at the same time. If two of them lack the same binary, both compile it, as in
    Triton, and one of the two equal entries remains.
    """

    def __init__(self, kernel: KernelInterface) -> None:
        self._kernel = kernel
        self._is_interpreted = not isinstance(kernel, JITFunction)
        # For each tuple of argument types: the function that computes the key, and binaries by key.
        self._binaries: dict[tuple, tuple[Callable | None, dict[tuple, CompiledKernel]]] = {}

    def launch(self, grid: tuple[int, ...], arguments: tuple, options: Options) -> None:
        if self._is_interpreted or self._kernel.pre_run_hooks or _is_watched():
            self._by_triton(grid, arguments, options)
            return
        types = tuple(map(type, arguments))
        try:
            describe, binaries = self._binaries[types]
        except KeyError:
            describe, binaries = self._binaries[types] = _describer(self._kernel, types), {}
        active = driver.active
        if describe is None or not _launches_directly(active):
            self._by_triton(grid, arguments, options)
            return
        device = active.get_current_device()
        try:
            key = (active, device, options, describe(*arguments))
        except _UnknownKind:
            self._by_triton(grid, arguments, options)
            return
        binary = binaries.get(key)
        if binary is None:
            binary = self._by_triton(grid, arguments, options)
            if type(binary) is CompiledKernel:  # Triton's cache hook may prevent compilation
                binaries[key] = binary
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        binary.run(
            x, y, z, active.get_current_stream(device), binary.function, binary.packed_metadata,
            None, None, None,  # launch metadata and the two hooks that would read it
            *arguments,
        )  # fmt: skip

    def _by_triton(
        self, grid: tuple[int, ...], arguments: tuple, options: Options
    ) -> CompiledKernel | None:
        named = dict(zip(self._kernel.arg_names, arguments, strict=True))
        given = {k: value for k, value in options._asdict().items() if value is not None}
        return self._kernel[grid](**named, **given, enable_fp_fusion=True)


def launcher(kernel: KernelInterface) -> Callable[..., None]:
    """Returns a function that launches a kernel.

    Args:
        kernel: a function decorated with `triton.jit`, whose parameters are annotated with
            `tl.constexpr` or not at all.
    Returns:
        A function that takes the grid, a tuple of one to three ints, and as keywords all
        parameters of the kernel, num_warps and, optionally, num_stages and maxnreg, which are
        Triton's defaults otherwise. enable_fp_fusion is True.
    """
    names = ", ".join(kernel.arg_names)
    return eval(
        f"lambda grid, *, {names}, num_warps, num_stages=None, maxnreg=None:"
        f" launch(grid, ({names},), Options(num_warps, num_stages, maxnreg))",
        {"launch": _Launcher(kernel).launch, "Options": Options},
    )
