"""Checks of `runtime/launch.py` with Triton's own launcher and a GPU that does nothing.

    PYTHONPATH=bench python tests/support/launching.py [--all]

Needs a separate process without TRITON_INTERPRET, which applies to a whole process. Runs every
function `check_…` of this module and prints {name: null or its error} as JSON; prints null without
a C compiler. `--all` uses every op of the table, which compiles for a minute; the default is the
ops that compile fast.
"""

import json
import sys
import threading
import traceback
from contextlib import contextmanager

import capture
import compiled
import idle_gpu
import torch
import triton
import triton.language as tl
from launch_keys import check_keys, check_that_a_poorer_key_is_noticed, probe_kernel  # noqa: F401
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from gqa_kernels import fused
from gqa_kernels.runtime import launch, layout

SLOW = {"flash_attention_varlen", "decode_attention", "prefill_attention"}
SLOW |= {"linear_cross_entropy", "token_log_probs"}


@contextmanager
def recorded():
    """Records the launches: (Triton's launcher of the binary, grid, stream, arguments)."""
    launches, original = [], CudaLauncher.__call__

    def call(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        launches.append((self, (x, y, z), stream, arguments))
        given = (x, y, z, stream, function, packed, metadata, enter, leave)
        return original(self, *given, *arguments)

    CudaLauncher.__call__ = call
    try:
        yield launches
    finally:
        CudaLauncher.__call__ = original


@contextmanager
def counted():
    """Records the kernels whose launches went through Triton."""
    kernels, original = [], launch._Launcher._by_triton

    def by_triton(self, *given):
        kernels.append(self._kernel)
        return original(self, *given)

    launch._Launcher._by_triton = by_triton
    try:
        yield kernels
    finally:
        launch._Launcher._by_triton = original


@contextmanager
def compared():
    """Asserts for each launch that Triton would choose the same binary and pass the same arguments.
    Yields counters of direct launches and of all launches."""
    numbers, original = {"direct": 0, "all": 0}, launch._Launcher.launch

    def checked(self, grid, arguments, options):
        with recorded() as launches, counted() as by_triton:
            original(self, grid, arguments, options)
        ((launcher, launched_grid, stream, given),) = launches
        numbers["all"] += 1
        numbers["direct"] += not by_triton
        named = dict(zip(self._kernel.arg_names, arguments, strict=True))
        named |= {name: value for name, value in options._asdict().items() if value is not None}
        chosen = self._kernel.run(grid=grid, warmup=True, **named, enable_fp_fusion=True)
        assert chosen.run is launcher, f"{self._kernel}: another binary than Triton's"
        assert launched_grid == (*grid, 1, 1)[:3]
        assert stream == 0
        assert len(given) == len(arguments)
        assert all(mine is theirs for mine, theirs in zip(given, arguments, strict=True))

    launch._Launcher.launch = checked
    # Existing functions are bound to the original.
    bound = [
        (function.__globals__, function.__globals__["launch"]) for function in launch_functions()
    ]
    for namespace, method in bound:
        namespace["launch"] = checked.__get__(method.__self__)
    try:
        yield numbers
    finally:
        launch._Launcher.launch = original
        for namespace, method in bound:
            namespace["launch"] = method


def launch_functions():
    """The launchers that modules of the package have created with `launch.launcher`."""
    modules = [m for name, m in sys.modules.items() if name.startswith("gqa_kernels.ops")]
    found = {
        id(value): value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("_launch") and "launch" in getattr(value, "__globals__", {})
        if isinstance(getattr(value.__globals__["launch"], "__self__", None), launch._Launcher)
    }
    return list(found.values())


def check_binaries_of_the_table(everything):
    """20 calls of different sizes of every op, as in the test that counts binaries."""
    specs = [spec for spec in compiled.SPECS if everything or spec.name not in SLOW]
    with compared() as numbers:
        for spec in specs:
            for _, call in compiled.calls_of_many_sizes(spec):
                call()
    assert numbers["all"] > 20 * len(specs)
    assert numbers["direct"] > 0.8 * numbers["all"], numbers
    # Triton checks at every launch whether globals of a kernel have changed. These do not change.
    for function in launch_functions():
        kernel = function.__globals__["launch"].__self__._kernel
        for (name, _), (value, _) in kernel.used_global_vals.items():
            assert isinstance(value, tl.constexpr | type), (kernel, name)


def check_views(everything):
    """Rows and addresses that are not multiples of 16 have separate binaries."""
    x = torch.zeros(4, 256, dtype=torch.bfloat16)
    weight = torch.ones(256, dtype=torch.bfloat16)
    odd = torch.zeros(4 * 257 + 1, dtype=torch.bfloat16)
    views = (x, odd[1:1025].view(4, 256), odd[:1024].view(4, 256), odd[:1028].view(4, 257)[:, :256])
    with compared(), recorded() as launches, torch.no_grad():
        for _ in range(2):
            for view in views:
                fused.rms_norm(view, weight)
    used = [launcher for launcher, *_ in launches]
    assert used[:4] == used[4:]
    # The second view is at an odd address; the fourth has odd rows.
    assert len(set(used)) == 3 and used[0] is used[2]


def launch_probe(function, x, **options):
    function((1,), x_ptr=x, value=3, any_value=3, strides=(1, 2), CONSTANT=1, **options)


def check_options(everything):
    function, x = launch.launcher(probe_kernel), torch.zeros(16)
    with recorded() as launches, counted() as by_triton:
        for _ in range(2):
            for options in (
                {"num_warps": 1},
                {"num_warps": 4},
                {"num_warps": 4, "num_stages": 1},
                {"num_warps": 4, "maxnreg": 64},
            ):
                launch_probe(function, x, **options)
    assert len({launcher for launcher, *_ in launches}) == 4 and len(by_triton) == 4
    for wrong in ({}, {"num_warps": 1, "other": 2}):
        try:
            launch_probe(function, x, **wrong)
        except TypeError as error:
            assert "num_warps" in str(error) or "other" in str(error)
        else:
            raise AssertionError("expected a TypeError")


def check_hooks(everything):
    """Hooks observe every launch; after their removal, launches are direct again."""
    function, x = launch.launcher(probe_kernel), torch.zeros(16)
    launch_probe(function, x, num_warps=4)
    seen, runtime = [], knobs.runtime

    def enter(metadata):
        seen.append(("enter", metadata.get()["name"]))

    def leave(metadata):
        seen.append(("leave", metadata.get()["name"]))

    runtime.launch_enter_hook.add(enter)
    runtime.launch_exit_hook.add(leave)
    launch_probe(function, x, num_warps=4)
    runtime.launch_enter_hook.remove(enter)
    launch_probe(function, x, num_warps=4)
    runtime.launch_exit_hook.remove(leave)
    launch_probe(function, x, num_warps=4)
    names = [(when, "probe_kernel") for when in ("enter", "leave", "leave")]
    assert seen == names, seen

    probe_kernel.add_pre_run_hook(lambda *_, **named: seen.append(named["value"]))
    launch_probe(function, x, num_warps=4)
    probe_kernel.pre_run_hooks.clear()
    launch_probe(function, x, num_warps=4)
    assert seen[3:] == [3]

    original = JITFunction.run

    def run(self, *given, **named):
        seen.append("run")
        return original(self, *given, **named)

    JITFunction.run = run
    launch_probe(function, x, num_warps=4)
    JITFunction.run = original
    launch_probe(function, x, num_warps=4)
    assert seen[4:] == ["run"]


def check_settings(everything):
    """Under settings that change how Triton compiles, Triton makes every launch."""
    runtime, compilation = knobs.runtime, knobs.compilation
    assert not launch._is_watched()
    for owner, name, value in (
        (runtime, "debug", True),
        (runtime, "launch_enter_hook", print),
        (compilation, "instrumentation_mode", "some"),
        (runtime, "add_stages_inspection_hook", print),
    ):
        before = getattr(owner, name, None)
        setattr(owner, name, value)
        assert launch._is_watched(), name
        setattr(owner, name, before)
        assert not launch._is_watched(), name


def check_devices_and_streams(everything):
    """Each device has its own binary, and a launch goes to the device's current stream."""
    active, x = driver.active, torch.zeros(16)
    place = {"device": 0, "stream": 0}
    active.get_current_device = lambda: place["device"]
    active.get_current_stream = lambda device: 10 * device + place["stream"]
    function = launch.launcher(probe_kernel)
    with recorded() as launches, counted() as by_triton:
        for device, stream in ((0, 0), (1, 1), (0, 2), (1, 3), (0, 4)):
            place.update(device=device, stream=stream)
            launch_probe(function, x, num_warps=2)
    del active.get_current_device, active.get_current_stream
    assert [stream for _, _, stream, _ in launches] == [0, 11, 2, 13, 4]
    binaries = [launcher for launcher, *_ in launches]
    assert binaries[0] is binaries[2] is binaries[4] and binaries[1] is binaries[3]
    assert binaries[0] is not binaries[1] and len(by_triton) == 2


def check_what_is_left_to_triton(everything):
    """Triton launches for types that are not in the table, and for unknown drivers and versions."""
    x = torch.zeros(16)

    def launches(function, strides=(1, 2), constant=1):
        with counted() as by_triton:
            for _ in range(3):
                given = {"x_ptr": x, "value": 3, "any_value": 3, "strides": strides}
                function((1,), **given, CONSTANT=constant, num_warps=1)
        return len(by_triton)

    function = launch.launcher(probe_kernel)
    assert launches(function) <= 1
    assert launches(function, strides=(1, 0.5)) == 3
    assert launches(function, constant=tl.float32) == 3

    idle = driver.active
    driver.set_active(capture.CaptureDriver("sm_90"))
    try:
        assert launches(function) == 3
        assert len(driver.active.launches) == 3
    finally:
        driver.set_active(idle)
    version = triton.__version__
    for other, expected in (("3.10.0", 3), ("4.0.0", 3), (version, 0)):
        launch._launches_directly.cache_clear()
        triton.__version__ = other
        assert launches(function) == expected, other
    assert launches(function) == 0


def check_threads(everything):
    function, x = launch.launcher(probe_kernel), torch.zeros(16)
    before, failed = idle_gpu.launches(), []
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        try:
            for value in range(200):
                given = {"value": value, "any_value": value, "strides": (value,)}
                function((1,), x_ptr=x, **given, CONSTANT=2, num_warps=1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert idle_gpu.launches() - before == 8 * 200


def check_descriptors(everything):
    """Descriptors made without the constructor equal those made by the constructor."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(2, 5, 3, 64, dtype=dtype)
        found = layout.descriptor(x, 32, 64)
        made = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 32, 1, 64])
        assert type(found) is type(made) and list(vars(found)) == list(vars(made))
        assert found.base is x
        assert {**vars(found), "base": None} == {**vars(made), "base": None}


def main():
    if idle_gpu.compiler() is None:
        print(json.dumps(None))
        return
    idle_gpu.activate()
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check("--all" in sys.argv)
                outcomes[name.removeprefix("check_")] = None
            except Exception:
                outcomes[name.removeprefix("check_")] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
