"""One job of `hopper.py`, in a process of its own, because a kernel with a wrong barrier hangs.

    python bench/hopper_child.py KIND [WHAT] [--skip SHAPE,SHAPE] [--dry-run]

Prints a line "@" + JSON per result, as soon as it has it; other lines say what it is doing. Without
a GPU, in a dry run, the kernel runs in the emulator of Gluon and times are simulated.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import importable

importable.make_importable()  # without a GPU, in Triton's interpreter
sys.path.append(str(importable.ROOT / "tests" / "support"))

import ceilings
import hopper_forward
import hopper_variants as variants
import peers
import poison
import torch
from adapters import Adapter
from floors import Ceilings
from grid import Workload
from hopper_sensors import Sensors, WatchedClock
from hopper_variants import OURS, Variant
from runner import OpContest, Runner
from stub import StubDevice
from timing import Call, Clock, Device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gqa_kernels import fused
from gqa_kernels.runtime import hopper_configs
from gqa_kernels.spec import OPS, Case

PR_SET_PDEATHSIG = 1  # prctl(2)
COMPLAINTS = 3  # after that many, a check ends: a GPU that has trapped fails every further call
LONG = (1000, 1024, 1537)
# Values of (causal, float16, groups of four, lse, residue) in which all pairs are met: each is
# compiled once.
FORMS = [(a, b, c, a ^ b ^ c, a ^ b) for b in (0, 1) for c in (0, 1) for a in (1, 0)]
# The other variants are raced beside the first two only, which leaves time for more of them.
PEERS = ("triton", "sdpa_cudnn", "sdpa_flash", "fa3")

Attend = Callable[..., Any]


def _device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def emit(result: dict[str, Any]) -> None:
    print("@" + json.dumps(result), flush=True)


# --- Variants --------------------------------------------------------------------------------


def _unpinned(name: str, text: str) -> str:
    """The source of a module of the kernel, in which `pin` does nothing."""
    if name.endswith(".pipeline"):
        return text + "\n\n@gluon.jit\ndef pin(x):\n    return x\n"
    return text


def install(variant: Variant | None) -> None:
    """Makes the kernel for Hopper this variant, for the rest of the process; the public functions
    run the portable kernel."""
    from triton.experimental import gluon

    from gqa_kernels.ops.attention.hopper import consumer, forward

    hopper_configs.HOPPER_FORWARD = tuple(row._replace(measured=False) for row in _rows(variant))
    if variant is not None and not variant.pinned:

        @gluon.jit
        def pin(x):
            return x

        consumer.pin = pin
    if variant is not None and not variant.persistent:
        launch = forward.launch_forward

        def launch_forward(call: Any, config: Any, num_programs: int, **needs: bool) -> Any:
            return launch(call, config, 2**30, **needs)  # at most one per block

        forward.launch_forward = launch_forward


def _rows(variant: Variant | None) -> tuple[hopper_configs.HopperConfig, ...]:
    return hopper_configs.HOPPER_FORWARD if variant is None else (variant.config,)


def _emulated(variant: Variant, case: hopper_forward.Case, seed: int) -> Attend:
    change = hopper_forward.unchanged if variant.pinned else _unpinned
    return hopper_forward.as_written(case, seed, change)


# --- Correctness -----------------------------------------------------------------------------


def _twice(first: Attend, second: Attend) -> Attend:
    """A call that is made twice and must have the same bits."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        results = [tree_leaves(run(*args, **kwargs)) for run in (first, second)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "other bits"
        return results[0][0] if len(results[0]) == 1 else tuple(results[0])

    return attend


def _portable(q: Tensor, k: Tensor, v: Tensor, causal: bool, return_lse: bool) -> Any:
    return fused.flash_attention(q, k, v, causal=causal, return_lse=return_lse)


def _cases(variant: Variant | None, dry: bool) -> Iterator[hopper_forward.Case]:
    """Random calls, without end, over the forms and, for the portable kernel (variant None), the
    sizes of heads in turn."""
    numbers = random.Random(0)
    turns = itertools.product(_rows(variant), FORMS)
    for config, (causal, half, grouped, lse, residue) in itertools.cycle(turns):
        case = hopper_forward.draw_case(numbers)
        lengths = case.seq_len_q, case.seq_len_kv
        if dry:
            lengths = [min(length, 130) for length in lengths]
        elif numbers.random() < 0.3:
            lengths = numbers.choice(LONG), numbers.choice(LONG)
        yield case._replace(
            config=config,
            seq_len_q=lengths[0],
            seq_len_kv=lengths[1],
            num_q_heads=case.num_kv_heads * (4 if grouped else 1),
            dtype=torch.float16 if half else torch.bfloat16,
            causal=bool(causal),
            return_lse=bool(lse),
            need_residue=bool(residue),
            num_programs=2**30 if variant and not variant.persistent else case.num_programs,
        )


def _attend(variant: Variant | None, case: hopper_forward.Case, seed: int, dry: bool) -> Attend:
    if variant is None:
        return _twice(_portable, _portable)
    if dry:
        return _twice(*(_emulated(variant, case, 2 * seed + other) for other in (0, 1)))
    return hopper_forward.on_gpu(case, seed)


def check(variant: Variant | None, seconds: float, most: int, dry: bool) -> dict[str, Any]:
    """Holds random calls to the error budget, with NaN in what they allocate, each made twice."""
    poison.poison_allocations()
    if not dry:
        install(variant)
        _compile_forms(variant)
    end = time.monotonic() + seconds
    count, worst, complaints = 0, 0.0, []
    for seed, case in enumerate(_cases(variant, dry)):
        if seed == most or time.monotonic() > end or len(complaints) >= COMPLAINTS:
            break
        print(f"case {seed}: {case}", flush=True)  # of a deadlock, this line stays
        attend = _attend(variant, case, seed, dry)
        try:
            measured = hopper_forward.measure(case, seed, attend, _device(dry))
        except Exception as error:
            complaints.append(f"{case}: {type(error).__name__}: {error}"[:600])
        else:
            worst = max(worst, *(m.share for m in measured))
            complaints += [f"{case}: {m}" for m in measured if not m.ok]
        count += 1
    share = worst if math.isfinite(worst) else None
    return {"cases": count, "worst_share": share, "complaints": complaints}


def _compile_forms(variant: Variant | None) -> None:
    """Compiles what the forms need, in threads."""
    from tune import compiling_only

    wanted = itertools.islice(_cases(variant, dry=False), len(_rows(variant)) * len(FORMS))
    with ThreadPoolExecutor() as executor, compiling_only(executor):
        for case in wanted:
            inputs = {n: x.to(_device(False)) for n, x in hopper_forward.inputs_of(case, 0).items()}
            attend = _attend(variant, case, 0, dry=False)
            with contextlib.suppress(Exception):  # nothing is computed; the check raises again
                attend(**inputs, causal=case.causal, return_lse=case.return_lse)


def consan(variant: Variant, dry: bool) -> dict[str, Any]:
    """One small call under Triton's concurrency sanitizer (TRITON_INSTRUMENTATION_MODE=consan),
    which traps at a race; in a dry run, in the emulator."""
    if not dry:
        import triton

        from gqa_kernels.ops.attention.hopper import forward

        install(variant)
        # The instrumented kernel asks for scratch memory.
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=_device(dry))
        )
    case = hopper_forward.Case(variant.config)
    found = hopper_forward.complaints(case, 0, _attend(variant, case, 0, dry), _device(dry))
    if not (dry or found or assertions_of(forward._forward_kernel)):
        found = ["expected a kernel with the sanitizer's assertions; got none"]
    return {"cases": 1, "complaints": found}


def assertions_of(kernel: Any) -> int:
    """The number of assertions in the PTX of a kernel that was launched in this process."""
    compiled = [binary for entry in kernel.device_caches.values() for binary in entry[0].values()]
    return sum(binary.asm["ptx"].count("__assertfail") for binary in compiled)


# --- The race --------------------------------------------------------------------------------


def _workloads(head_dim: int, dry: bool) -> list[Workload]:
    spec = next(spec for spec in OPS if spec.name == "flash_attention")
    found = []
    for seq_len, causal in (variants.TINY_SHAPES if dry else variants.SHAPES)[head_dim]:
        heads = (4, 2) if dry else variants.HEADS
        sizes = {"batch": 1, "seq_len_q": seq_len, "seq_len_kv": seq_len}
        sizes |= {"num_q_heads": heads[0], "num_kv_heads": heads[1]}
        sizes |= {"head_dim": head_dim, "causal": causal}
        case = Case(sizes, "70B" if head_dim == 128 else f"D{head_dim}")
        name = variants.shape_name(head_dim, seq_len, causal)
        found.append(Workload(spec, "fwd", name, case, "full"))
    return found


def _repeated(adapter: Adapter) -> Adapter:
    """An adapter whose call is made twice first and must have the same bits."""

    def adapt(inputs: dict[str, Any]) -> Call:
        call = adapter(inputs)
        assert torch.equal(call(), call()), "other bits"
        return call

    return adapt


def _contenders(variant: Variant, dry: bool) -> list[str]:
    """The names of the contenders, the variant's first."""
    hopper, op = peers.BY_NAME[OURS[0]], "flash_attention"
    if not dry:
        install(variant)
        adapters = {op: _repeated(hopper.adapters[op])}
        peers.BY_NAME[OURS[0]] = replace(hopper, adapters=adapters)
        return [OURS[0], *(PEERS if variant in variants.TABLE else PEERS[:2])]
    emulated = _emulated(variant, hopper_forward.Case(variant.config), 0)

    def adapt(inputs: dict[str, Any]) -> Call:
        given = {name: inputs[name] for name in ("q", "k", "v", "causal")}
        return lambda: emulated(**given, return_lse=False)

    adapters = {op: _repeated(adapt)}
    peers.BY_NAME[OURS[1]] = replace(hopper, name=OURS[1], adapters=adapters, import_check=None)
    return [OURS[1], *PEERS]


def race(variant: Variant, device: Device, ceiling: Ceilings, skip: list[str], dry: bool) -> None:
    """Times the variant, the portable kernel and the peers in alternating rounds, shape by shape;
    the order is reversed at every other shape."""
    with Sensors() as sensors:
        clock = WatchedClock(device)
        runner = Runner(clock, ceiling)
        names = _contenders(variant, dry)
        for index, workload in enumerate(_workloads(variant.head_dim, dry)):
            if workload.shape in skip:
                continue
            print(f"race {workload.shape}", flush=True)
            clock.spans.clear()
            contest = OpContest(workload, torch.device(_device(dry)), device.l2_bytes)
            rows = runner.run(contest, names[:: -1 if index % 2 else 1])
            found = []
            for name in names:
                info = rows[name].info | sensors.over(clock.spans[name])
                found.append(replace(rows[name], info=info).to_json())
            emit({"rows": found})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("describe", "consan", "check", "race"))
    parser.add_argument("what", nargs="?", default="")
    parser.add_argument("--skip", default="", help="shapes that were raced before")
    parser.add_argument("--ceilings", default="{}", help="as JSON")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    table = variants.TINY_VARIANTS if dry else variants.VARIANTS
    variant = table.get(options.what)
    if dry:
        torch.set_num_threads(1)
        device: Device = StubDevice()
    else:
        from cuda_device import CudaDevice

        device = CudaDevice()
    match options.kind:
        case "describe":
            measure = ceilings.simulated if dry else ceilings.measure_ceilings
            found = measure(Clock(device))
            environment = ceilings.environment() | ({"gpu": StubDevice.name} if dry else {})
            emit({"environment": environment, "ceilings": found._asdict()})
        case "consan":
            emit(consan(variant, dry))
        case "check":
            seconds = variants.check_seconds(options.what)
            emit(check(variant, seconds, 2 if dry else variants.MOST_CASES, dry))
        case "race":
            ceiling = Ceilings(**json.loads(options.ceilings))
            race(variant, device, ceiling, options.skip.split(","), dry)


if __name__ == "__main__":
    # Linux ends this process with the one that started it, which may be killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    main()
