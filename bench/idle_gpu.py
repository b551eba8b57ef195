"""A stand-in for a GPU that does nothing, to measure the host time of a launch.

Triton's own driver.c and CudaLauncher run unchanged. They call a stand-in for libcuda
(`idle_cuda.c`, compiled at the first use), whose cuLaunchKernelEx returns immediately. Kernels are
compiled for sm_90 and never run; tensors are on the CPU. The binding of arguments, the look-up of
the compiled kernel, tensor maps and the unpacking of arguments are real. Only the time of the real
driver is missing.

Triton loads one libcuda per process: use a separate process, without TRITON_INTERPRET.
"""

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("idle_cuda.c")


def compiler() -> str | None:
    """The C compiler that Triton would use, or None."""
    return (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    )


@cache
def _library() -> ctypes.CDLL:
    """Loads the stand-in under the name of the real libcuda, so that Triton opens it."""
    from triton.backends import nvidia

    if compiler() is None:
        raise RuntimeError("idle_gpu: expected a C compiler (gcc, clang or CC); found none")
    folder = Path(tempfile.mkdtemp(prefix="idle-cuda-"))
    atexit.register(shutil.rmtree, folder)  # Triton uses the file until the process ends
    path = folder / "libcuda.so.1"
    include = Path(nvidia.__path__[0]) / "include"
    try:
        subprocess.run(
            [compiler(), "-shared", "-fPIC", "-O2", f"-I{include}", "-Wl,-soname,libcuda.so.1",
             str(SOURCE), "-o", str(path)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"idle_gpu: {SOURCE.name} does not compile: {error.stderr}") from error
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.idle_launches.restype = ctypes.c_ulonglong
    return library


def launches() -> int:
    """How many kernels have been launched so far."""
    return _library().idle_launches()


def activate() -> None:
    """Makes the stand-in the GPU that Triton uses in this process.

    Raises:
        RuntimeError: there is no C compiler, or Triton runs in its interpreter.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected it to be unset; got it set")
    _library()
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils, ty_to_cpp
    from triton.runtime import driver

    class IdleDriver(DriverBase):
        launcher_cls = CudaLauncher

        def __init__(self) -> None:
            super().__init__()
            self.utils = CudaUtils()

        @classmethod
        def is_active(cls) -> bool:
            return False  # Triton must not choose this driver automatically

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty_to_cpp(ty)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
            return 9, 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self):
            raise RuntimeError("benchmarker: expected a GPU; got a stand-in that does nothing")

    driver.set_active(IdleDriver())
