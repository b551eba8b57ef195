"""Runs contests (one op, pass and shape; several backends): gate, clock, and rows of results."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gate
import launches
import peers
import torch
from adapters import Lacks, make_call
from ceilings import ask, sensors
from cuda_device import kernel_names
from floors import Ceilings, Floor, floor
from grid import DTYPE, Workload
from record import Row
from stub import stand_ins
from timing import Call, Clock, Rotation, Timed, copies_needed
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gqa_kernels.accuracy import Measured
from gqa_kernels.spec import Cost

AGAIN = " again"  # one backend is timed twice under two names, to measure the noise


@dataclass
class Prepared:
    """A call that has been checked and warmed up."""

    call: Call
    measured: list[Measured]
    launched: list[str]  # of this package's kernels, in one call
    first_call_s: float  # including compilation and tuning
    kernels: list[str] | None = None  # all kernels on the GPU, from the profiler


class Contest(Protocol):
    op: str
    pass_: str
    shape: str
    cost: Cost
    model: str
    dtype: str
    sizes: dict[str, Any]

    def method(self, bound: Floor) -> str: ...
    def prepare(self, backend: str, method: str) -> Prepared: ...
    def missing(self, backend: str) -> str | None: ...
    def version(self, backend: str) -> str | None: ...
    def note(self, backend: str) -> str | None:
        """How the results differ from those of other backends, within their budget."""
        ...

    def rate(self, seconds: float) -> dict[str, float]:
        """Additional figures of a row, such as tokens per second."""
        ...

    def close(self) -> None:
        """Frees what `prepare` shares between backends."""
        ...


class OpContest:
    """The backends of one op on the same inputs."""

    dtype = str(DTYPE).removeprefix("torch.")

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        l2_bytes: int,
        *,
        names_kernels: bool = False,
    ) -> None:
        self.workload = workload
        self.op, self.pass_, self.shape = workload.op, workload.pass_, workload.shape
        self.cost, self.model = workload.cost, workload.case.source
        self.sizes = {
            name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x
            for name, x in workload.case.sizes.items()
        }
        self.device, self.l2_bytes = device, l2_bytes
        self.names_kernels = names_kernels
        self._copies: list[dict[str, Any]] = []

    def method(self, bound: Floor) -> str:
        return "graph" if bound.bound == "latency" and self.pass_ == "fwd" else "events"

    def missing(self, backend: str) -> str | None:
        found = peers.BY_NAME[backend]
        return found.lacks(self.op, self.pass_) or found.available()

    def version(self, backend: str) -> str | None:
        return peers.BY_NAME[backend].version

    def note(self, backend: str) -> str | None:
        return peers.BY_NAME[backend].coarse.get(self.op)

    def rate(self, seconds: float) -> dict[str, float]:
        return {}

    def inputs(self, count: int) -> list[dict[str, Any]]:
        """Copies of the inputs, each drawn separately, so that no result can be cached."""
        spec = self.workload.spec
        while len(self._copies) < count:
            generator = torch.Generator(self.device).manual_seed(len(self._copies))
            self._copies.append(spec.make_inputs(self.workload.case, DTYPE, self.device, generator))
        return self._copies[:count]

    def _cotangents(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.device).manual_seed(1)
        shapes = [output.shape for output in self._fake_outputs(inputs)]
        if self.pass_ == "step":
            return tuple(torch.ones(shape, device=self.device, dtype=DTYPE) for shape in shapes)
        return tuple(
            torch.randn(shape, generator=generator, device=self.device).to(DTYPE)
            for shape in shapes
        )

    def _fake_outputs(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Outputs without values, from a call that computes nothing."""
        with FakeTensorMode() as mode:
            fake = {
                name: mode.from_tensor(x) if torch.is_tensor(x) else x
                for name, x in inputs.items()
                if name != "return_lse"  # never requested
            }
            outputs = self.workload.spec.kernel(**fake)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def call(self, backend: str, inputs: dict[str, Any]) -> Call:
        """Returns an unchecked call on these inputs."""
        cotangents, wrt = self._cotangents(inputs), self.workload.spec.wrt
        return make_call(peers.BY_NAME[backend], self.op, self.pass_, inputs, wrt, cotangents)

    def prepare(self, backend: str, method: str) -> Prepared:
        workload = self.workload
        copies = self.inputs(copies_needed(workload.input_bytes, self.l2_bytes, method))
        calls = [self.call(backend, copy) for copy in copies]
        cotangents = self._cotangents(copies[0])
        gate.spoil(workload, copies[0])
        prepared = check_first_call(
            backend,
            calls[0],
            lambda actual: gate.check(
                workload, copies[0], cotangents, actual, coarse=self.note(backend) is not None
            ),
            self.device,
        )
        for call in calls:
            call()
        if self.names_kernels:
            prepared.kernels = ask(lambda: kernel_names(calls[-1]))
        prepared.call = Rotation(calls)
        return prepared

    def close(self) -> None:
        self._copies.clear()
        peers.forget_compiled()


def check_first_call(
    backend: str, call: Call, check: Callable[[Any], list[Measured]], device: torch.device
) -> Prepared:
    """Runs a call once, with memory full of NaN, and checks its launches and its results."""
    poison = torch.full((2**24,), float("nan"), device=device)
    del poison  # so that the allocator reuses it
    start = time.perf_counter()
    with launches.recorded() as launched:
        actual = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    launches.check(backend, launched)
    return Prepared(call, check(actual), list(launched), seconds)


class Runner:
    """Runs contests on a clock.

    With a `StubDevice` the gate is real, on the CPU, and the times are the stub's: the dry run.
    """

    def __init__(self, clock: Clock, ceilings: Ceilings) -> None:
        self.clock = clock
        self.ceilings = ceilings

    @torch.no_grad()
    def run(self, contest: Contest, backends: list[str]) -> dict[str, Row]:
        bound = floor(contest.cost, self.ceilings)
        method = contest.method(bound)
        rows: dict[str, Row] = {}
        prepared: dict[str, Prepared] = {}
        try:
            for name in backends:
                outcome = self._prepare(contest, name, method)
                if isinstance(outcome, Prepared):
                    prepared[name] = outcome
                else:
                    rows[name] = Row(outcome[0], self._head(contest, name, bound), outcome[1])
            rows |= self._time(contest, prepared, bound, method)
        finally:
            prepared.clear()
            contest.close()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return {name: rows[name] for name in backends}

    def _prepare(self, contest: Contest, name: str, method: str) -> Prepared | tuple[str, str]:
        reason = contest.missing(name)
        if reason is not None:
            return "skip", reason
        try:
            return contest.prepare(name, method)
        except Lacks as error:
            return "skip", str(error)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "skip", "does not fit in this GPU's memory"
        except Exception as error:
            # The failure of one contender is a row and must not stop the others.
            return "fail", f"{type(error).__name__}: {error}"[:500]

    def _time(
        self, contest: Contest, prepared: dict[str, Prepared], bound: Floor, method: str
    ) -> dict[str, Row]:
        contenders = stand_ins(self.clock.device, {name: p.call for name, p in prepared.items()})
        twin = next(iter(contenders), None)
        if twin is not None:
            contenders[twin + AGAIN] = contenders[twin]
        timed = self.clock.measure(contenders, method, rest=bound.bound == "mma")
        noise = None
        if twin is not None:
            noise = _noise(timed[twin], timed.pop(twin + AGAIN))
        rows = {}
        for name, result in timed.items():
            head = self._head(contest, name, bound)
            if isinstance(result, Exception):
                text = f"{method}: {type(result).__name__}: {result}"
                rows[name] = Row("fail", head, text[:500])
            else:
                info = head | _figures(contest, prepared[name], result, bound, noise)
                rows[name] = Row("ok", info, samples=result.samples)
        return rows

    def _head(self, contest: Contest, backend: str, bound: Floor) -> dict[str, Any]:
        cost = contest.cost
        return {
            "op": contest.op,
            "pass": contest.pass_,
            "shape": contest.shape,
            "sizes": contest.sizes,
            "model": contest.model,
            "dtype": contest.dtype,
            "backend": backend,
            "backend_version": contest.version(backend),
            "note": contest.note(backend),
            "bytes": cost.read_bytes + cost.write_bytes,
            "flops": cost.flops,
            "floor_us": bound.seconds * 1e6,
            "bound": bound.bound,
        }


def _noise(once: Timed | Exception, again: Timed | Exception) -> float | None:
    """|difference| / minimum of the two medians of a call that was timed twice."""
    if isinstance(once, Exception) or isinstance(again, Exception):
        return None
    return abs(once.median - again.median) / min(once.median, again.median)


def _figures(
    contest: Contest, prepared: Prepared, timed: Timed, bound: Floor, noise: float | None
) -> dict[str, Any]:
    cost, seconds = contest.cost, timed.median
    worst = max(prepared.measured, key=lambda measured: measured.share)
    return {
        "method": timed.method,
        "median_us": seconds * 1e6,
        "p20_us": timed.quantile(0.2) * 1e6,
        "p80_us": timed.quantile(0.8) * 1e6,
        "n": len(timed.samples),
        "rounds": len(timed.rounds),
        "noise": noise,
        "spread": timed.spread,
        "starved": timed.starved,
        "host_us": timed.host_seconds * 1e6,
        "tbps": (cost.read_bytes + cost.write_bytes) / seconds * 1e-12,
        "tflops": cost.flops / seconds * 1e-12,
        "sol": bound.seconds / seconds,
        "peak_mem_mib": timed.peak_bytes / 2**20,
        "first_call_s": prepared.first_call_s,
        "launches": None if prepared.kernels is None else len(prepared.kernels),
        "kernels": None if prepared.kernels is None else sorted({k[:80] for k in prepared.kernels}),
        "ours_launched": sorted(set(prepared.launched)),
        "gate": str(worst),
        "gate_share": worst.share,
        **contest.rate(seconds),
        **(sensors() if torch.cuda.is_available() else {}),
    }
