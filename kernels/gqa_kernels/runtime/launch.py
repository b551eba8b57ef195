"""Launches of kernels, without what Triton works out anew at every one of them.

    _launch_forward = launch.launcher(_forward_kernel)
    _launch_forward((num_rows,), x_ptr=x, y_ptr=y, …, num_warps=4)

is `_forward_kernel[(num_rows,)](x_ptr=x, y_ptr=y, …, num_warps=4, enable_fp_fusion=True)`: the
same binary, on the same device and stream, for less of the host's time. The first launch of its
kind goes through Triton, which compiles. Its binary is kept under a key of all that Triton chooses
one by, and launched directly from then on:

- of the device: the active driver and its current device;
- of the kernel: the launcher; of the launch: num_warps, num_stages, maxnreg;
- of every argument: its type, and

  | | |
  |---|---|
  | tensor | dtype; whether its address is a multiple of 16 |
  | int | whether it is 1; whether it is a multiple of 16; whether it is an i32, an i64 or a u64 |
  | int, `do_not_specialize` | whether it is an i32, an i64 or a u64 |
  | tuple of ints | that of each int, which Triton specialises whatever is asked for |
  | `TensorDescriptor` | dtype; shape of the block |
  | `tl.constexpr` | the value |
  | float, bool, None | nothing else |

Every launch is left to Triton

- in its interpreter, and under a driver whose launcher is not Triton's own for NVIDIA: another one
  may specialise by more (AMD's does, by the size of a tensor) or do more than launch;
- of a version whose rules have not been read: 3.6 to 3.9 have been;
- while somebody watches launches or changes how kernels are compiled: `launch_enter_hook`,
  `launch_exit_hook`, a kernel's pre-run hooks, `debug`, `instrumentation_mode`,
  `add_stages_inspection_hook`, a `JITFunction.run` that was replaced, as profilers do;
- with an argument of a type that is not in the table.

What Triton checks beside: that globals which a kernel uses have not changed since it was compiled.
Those of the kernels of this package are constants and types.
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
_TRITONS_GLOBALS = vars(jit)  # those of its JITFunction.run, and of no other


class _UnknownKind(TypeError):
    """An argument that the table says nothing of."""


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
    """The type of an int that is no i32."""
    return "i64" if -(2**63) <= value < 2**63 else "u64"


_key_of_int = eval(f"lambda value: {_INT.format('value')}", {"_wide": _wide})


# Strides: few, and most of them of every call.
@lru_cache(maxsize=4096)
def _ints(values: tuple) -> tuple:
    if {*map(type, values)} - {int}:
        raise _UnknownKind
    return tuple(map(_key_of_int, values))


def _expression(parameter: Any, kind: type) -> str:
    """What belongs to the key of a parameter's argument of this type, beside the type."""
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
    """A function of arguments of these types, which gives their key; None for unknown ones."""
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
    """Whether all is known of what a driver and this version of Triton do at a launch."""
    cls = getattr(active, "launcher_cls", None)
    name = f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', '')}"
    return name in _LAUNCHERS and triton.__version__.startswith(_VERSIONS)


def _is_watched() -> bool:
    """Whether somebody sees or changes what goes through Triton, and would miss the rest."""
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
    """Of a launch; None is Triton's default."""

    num_warps: int
    num_stages: int | None
    maxnreg: int | None


class _Launcher:
    """The binaries of one kernel.

    Threads may launch at the same time: what two of them find missing both compile, as in Triton,
    and one of two equal entries stays.
    """

    def __init__(self, kernel: KernelInterface) -> None:
        self._kernel = kernel
        self._is_interpreted = not isinstance(kernel, JITFunction)
        # By the types of the arguments: their describer, and by key the binary.
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
            if type(binary) is CompiledKernel:  # a hook of its cache may keep Triton from compiling
                binaries[key] = binary
            return
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        binary.run(
            x, y, z, active.get_current_stream(device), binary.function, binary.packed_metadata,
            None, None, None,  # metadata, and hooks that would read it
            *arguments,
        )  # fmt: skip

    def _by_triton(
        self, grid: tuple[int, ...], arguments: tuple, options: Options
    ) -> CompiledKernel | None:
        named = dict(zip(self._kernel.arg_names, arguments, strict=True))
        given = {k: value for k, value in options._asdict().items() if value is not None}
        return self._kernel[grid](**named, **given, enable_fp_fusion=True)


def launcher(kernel: KernelInterface) -> Callable[..., None]:
    """The function that launches a kernel.

    Args:
        kernel: what `triton.jit` makes of a function. Its parameters are annotated by
            `tl.constexpr` or not at all.
    Returns:
        A function of the grid, a tuple of one to three ints, and by name of all of the kernel's
        parameters and of num_warps. num_stages and maxnreg are Triton's defaults unless they are
        given; enable_fp_fusion is True.
    """
    names = ", ".join(kernel.arg_names)
    return eval(
        f"lambda grid, *, {names}, num_warps, num_stages=None, maxnreg=None:"
        f" launch(grid, ({names},), Options(num_warps, num_stages, maxnreg))",
        {"launch": _Launcher(kernel).launch, "Options": Options},
    )
