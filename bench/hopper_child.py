"""One job of `hopper.py`, in a process of its own, because a kernel with a wrong barrier hangs.

    python bench/hopper_child.py KIND [WHAT] [--skip SHAPE,SHAPE] [--dry-run]

Prints a line "@" + JSON per result, as soon as it has it; other lines say what it is doing. Without
a GPU, in a dry run, the kernel runs in the emulator of Gluon and times are simulated.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)
if __name__ == "__main__":
    # Linux ends this process with the one that started it, which may be killed, also while the rest
    # is imported, which takes seconds.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

import argparse
import itertools
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import importable

importable.make_importable()  # without a GPU, in Triton's interpreter
sys.path.append(str(importable.ROOT / "tests" / "support"))

import ceilings
import hopper_variants as variants
import peers
import poison
import torch
from adapters import Adapter
from floors import Ceilings
from grid import Workload
from hopper_calls import Calls, calls_of
from hopper_sensors import Sensors, WatchedClock
from hopper_variants import OURS, Variant
from runner import OpContest, Runner
from stub import StubDevice
from timing import Call, Clock, Device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gqa_kernels.spec import OPS, Case

COMPLAINTS = 3  # after that many, a check ends: a GPU that has trapped fails every further call
# The other variants are raced beside the first two only, which leaves time for more of them.
PEERS = ("triton", "sdpa_cudnn", "sdpa_flash", "fa3", "fa3_source")


def emit(result: dict[str, Any]) -> None:
    print("@" + json.dumps(result), flush=True)


# --- Correctness -----------------------------------------------------------------------------


def check(
    variant: Variant | None, seconds: float, most: int, dry: bool, run: int = 1
) -> dict[str, Any]:
    """Holds random calls to the error budget, with NaN in what they allocate, each made twice.

    Args:
        seconds, most: it makes calls for that long, or that many; of the portable kernels (variant
            None) half of both with gradients.
        run: another one makes other calls.
    """
    poison.poison_allocations()
    passes = calls_of(variant, dry)
    if not dry:
        for calls in passes:
            calls.install()
            _compile_forms(calls)
    count, worst, complaints = 0, 0.0, []
    for calls in passes:
        end = time.monotonic() + seconds / len(passes)
        cases = itertools.islice(calls.cases(run - 1), -(-most // len(passes)))
        for seed, case in enumerate(cases, (run - 1) * 10**6):
            if time.monotonic() > end or len(complaints) >= COMPLAINTS:
                break
            print(f"case {seed}: {case}", flush=True)  # of a deadlock, this line stays
            try:
                measured = calls.measure(case, seed)
            except Exception as error:
                complaints.append(f"{case}: {type(error).__name__}: {error}"[:600])
            else:
                worst = max(worst, *(m.share for m in measured))
                complaints += [f"{case}: {m}" for m in measured if not m.ok]
            count += 1
    share = worst if math.isfinite(worst) else None
    return {"cases": count, "worst_share": share, "complaints": complaints}


def _compile_forms(calls: Calls) -> None:
    """Compiles what the forms need, in threads."""
    from tune import compiling_only

    with ThreadPoolExecutor() as executor, compiling_only(executor):
        for case in itertools.islice(calls.cases(0), calls.num_forms):
            calls.compile(case)


def _traced_case(calls: Calls) -> Any:
    """A small call. Without a mask and with two stages, instrumented kernels compile in half the
    time; the stages are filled again sooner."""
    config = calls.variant.config._replace(num_stages=2)
    return calls.support.Case(config, causal=False)


def compile_traced(variant: Variant) -> None:
    """Compiles what `consan` launches."""
    from tune import compiling_only

    (calls,) = calls_of(variant, dry=False)
    calls.install()
    with ThreadPoolExecutor() as executor, compiling_only(executor):
        calls.compile(_traced_case(calls))


def consan(variant: Variant, dry: bool) -> dict[str, Any]:
    """One small call under Triton's concurrency sanitizer (TRITON_INSTRUMENTATION_MODE=consan),
    which traps at a race; in a dry run, in the emulator."""
    (calls,) = calls_of(variant, dry)
    case = _traced_case(calls)
    if not dry:
        import triton

        # The instrumented kernels ask for scratch memory.
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
        )
        compile_traced(variant)
    found = calls.support.complaints(case, 0, calls.attend(case, 0), calls.device)
    if not (dry or found or all(map(assertions_of, calls.kernels()))):
        found = ["expected kernels with the sanitizer's assertions; got none"]
    return {"cases": 1, "complaints": found}


def assertions_of(kernel: Any) -> int:
    """The number of assertions in the PTX of a kernel that was launched in this process."""
    compiled = [binary for entry in kernel.device_caches.values() for binary in entry[0].values()]
    return sum(binary.asm["ptx"].count("__assertfail") for binary in compiled)


# --- The race --------------------------------------------------------------------------------


def _workloads(variant: Variant, dry: bool) -> list[Workload]:
    spec = next(spec for spec in OPS if spec.name == "flash_attention")
    found = []
    for seq_len, causal in variants.shapes_of(variant.pass_, variant.head_dim, dry):
        heads = (4, 2) if dry else variants.HEADS
        sizes = {"batch": 1, "seq_len_q": seq_len, "seq_len_kv": seq_len}
        sizes |= {"num_q_heads": heads[0], "num_kv_heads": heads[1]}
        sizes |= {"head_dim": variant.head_dim, "causal": causal}
        case = Case(sizes, "70B" if variant.head_dim == 128 else f"D{variant.head_dim}")
        name = variants.shape_name(variant.head_dim, seq_len, causal)
        found.append(Workload(spec, variant.pass_, name, case, "full"))
    return found


def _repeated(adapter: Adapter) -> Adapter:
    """An adapter whose call, or its gradients, are computed twice first and must have the same
    bits."""

    def adapt(inputs: dict[str, Any]) -> Call:
        call = adapter(inputs)
        wrt = [x for x in inputs.values() if torch.is_tensor(x) and x.requires_grad]
        out = call()
        once, again = (_gradients(out, wrt) for _ in range(2)) if wrt else ((out,), (call(),))
        for first, second in zip(once, again, strict=True):
            assert torch.equal(first, second), "other bits"
        return call

    return adapt


def _gradients(out: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, wrt, out.detach(), retain_graph=True)


def _contenders(variant: Variant, dry: bool) -> list[str]:
    """The names of the contenders, the variant's first."""
    hopper, op = peers.BY_NAME[OURS[0]], "flash_attention"
    (calls,) = calls_of(variant, dry)
    if not dry:
        calls.install()
        adapters = {op: _repeated(hopper.adapters[op])}
        peers.BY_NAME[OURS[0]] = replace(hopper, adapters=adapters)
        return [OURS[0], *(PEERS if variant in variants.TABLE else PEERS[:2])]

    def adapt(inputs: dict[str, Any]) -> Call:
        given = {name: inputs[name] for name in ("q", "k", "v", "causal")}
        case = calls.support.Case(variant.config, causal=inputs["causal"])
        emulated = calls.emulated(case, 0)
        return lambda: tree_leaves(emulated(**given, return_lse=False))[0]

    adapters = {op: _repeated(adapt)}
    peers.BY_NAME[OURS[1]] = replace(hopper, name=OURS[1], adapters=adapters, import_check=None)
    return [OURS[1], *PEERS]


def race(
    variant: Variant,
    device: Device,
    ceiling: Ceilings,
    skip: list[str],
    seconds: float,
    dry: bool,
) -> None:
    """Times the variant, the portable kernel and the peers in alternating rounds, shape by shape;
    the order is reversed at every other shape. After `seconds`, it begins no further shape and says
    how many are left."""
    end = time.monotonic() + seconds
    with Sensors() as sensors:
        clock = WatchedClock(device)
        runner = Runner(clock, ceiling)
        names = _contenders(variant, dry)
        left = [work for work in _workloads(variant, dry) if work.shape not in skip]
        while left and time.monotonic() < end:
            workload = left.pop(0)
            print(f"race {workload.shape}", flush=True)
            clock.spans.clear()
            contest = OpContest(workload, torch.device("cpu" if dry else "cuda"), device.l2_bytes)
            rows = runner.run(contest, names[:: -1 if len(left) % 2 else 1])
            found = []
            for name in names:
                info = rows[name].info | sensors.over(clock.spans[name])
                found.append(replace(rows[name], info=info).to_json())
            emit({"rows": found})
    if left:
        emit({"left": len(left), "complaints": []})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("describe", "compile", "consan", "check", "race"))
    parser.add_argument("what", nargs="?", default="")
    parser.add_argument("--run", type=int, default=1, help="of a check: other calls in each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a race")
    parser.add_argument("--skip", default="", help="shapes that were raced before")
    parser.add_argument("--ceilings", default="{}", help="as JSON")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    dry = options.dry_run
    table = variants.TINY_VARIANTS if dry else variants.VARIANTS
    names = {"describe": ("",), "check": (*table, variants.PORTABLE)}.get(options.kind, table)
    if options.what not in names:
        parser.error(f"WHAT: expected one of {', '.join(names)}; got {options.what!r}")
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
        case "compile":
            compile_traced(variant)
        case "consan":
            emit(consan(variant, dry))
        case "check":
            most = 2 if dry else variants.MOST_CASES
            emit(check(variant, variants.CHECK_SECONDS, most, dry, options.run))
        case "race":
            ceiling = Ceilings(**json.loads(options.ceilings))
            race(variant, device, ceiling, options.skip.split(","), options.seconds, dry)


if __name__ == "__main__":
    main()
