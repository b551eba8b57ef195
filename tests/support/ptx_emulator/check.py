"""Runs ops of the table in the emulator; reports findings, and errors against the error budget.

    python -m ptx_emulator.check --arch sm_80 [--op rms_norm] [--dtype bfloat16] [--case 3]

Prints a line per call, and at the end how much of the compiled code ran. The exit status is 1 after
a finding, an error beyond its budget or an exception. For an op that is not in the table, use
`Call(spec, case, dtype).run("sm_90")` with another `OpSpec`.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
import time
import traceback
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from poison import poison_allocations

from gqa_kernels import accuracy
from gqa_kernels.accuracy import Measured, Results
from gqa_kernels.spec import IN_PLACE_OPS, OPS, Case, OpSpec
from ptx_emulator.approximation import Approximate
from ptx_emulator.cases import QUANTISED, VIEWS, extra_cases
from ptx_emulator.driver import ARCHITECTURES, emulating, programs

SPECS = (*OPS, *IN_PLACE_OPS)
DTYPES = ("bfloat16", "float16", "float32")
ORDERS = ("forward", "backward", "random", "interleaved")


class Outcome(NamedTuple):
    """The result of one call in the emulator."""

    measured: list[Measured]
    findings: list[str]
    results: Results
    num_launches: int
    seconds: float  # of emulation, without compilation

    @property
    def complaints(self) -> list[str]:
        return [*self.findings, *(str(m) for m in self.measured if not m.ok)]


class Call:
    """A call of an op, forward and backward, that can run any number of times."""

    def __init__(
        self,
        spec: OpSpec,
        case: Case,
        dtype: torch.dtype,
        *,
        view: str | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            view: a name in `cases.VIEWS`: the kind of view that replaces floating inputs other than
                caches and scales.
        """
        self.spec, self.seed = spec, seed
        generator = torch.Generator().manual_seed(seed)
        self.inputs = spec.make_inputs(case, dtype, torch.device("cpu"), generator)
        for name, x in self.inputs.items() if view else ():
            floating = isinstance(x, torch.Tensor) and x.is_floating_point()
            if floating and not name.endswith(("_cache", "_scale")):
                self.inputs[name] = VIEWS[view](x)
        # The arguments to which the op writes; they are a part of the result.
        self.written = [
            name
            for name in ("k_cache", "v_cache", "k_scale", "v_scale")
            if spec in IN_PLACE_OPS and name in self.inputs
        ]
        self.dtypes = {name: self.inputs[name].dtype for name in self.written}
        self.codes = [name for name in self.written if self.dtypes[name] in QUANTISED]
        self._drawn: dict[bool, list[tuple[Results, Results]]] = {}

    def run(self, arch: str, *, mutate: Any = None, **options: Any) -> Outcome:
        """
        Args:
            mutate: (kernel's name, PTX) → PTX that runs instead.
            options: those of `machine.Options`.
        """
        codes: dict[str, torch.Tensor] = {}
        with emulating(arch, mutate=mutate, strict=False, **options) as emulator:
            kernel = self._function(self.spec.kernel, codes)
            actual = accuracy.run(kernel, self.inputs, self.spec.wrt, self.seed)
        noise = options.get("noise", False)
        measured = accuracy.measure_results(actual, self._draws(actual, noise))
        measured += [self._compare_codes(name, codes[name]) for name in self.codes]
        seconds = sum(record.seconds for record in emulator.records)
        results = actual | codes
        return Outcome(measured, emulator.findings, results, len(emulator.records), seconds)

    def _function(self, function: Any, codes: dict[str, torch.Tensor]) -> Any:
        """Wraps the op so that it writes to copies and returns them too; 8-bit copies go to `codes`
        instead."""
        if not self.written:
            return function

        def call(**inputs: Any) -> tuple[torch.Tensor, ...]:
            # A float64 oracle writes codes and scales in their own dtypes too.
            kept = self.written if self.codes else ()
            copies = {
                name: inputs[name].to(self.dtypes[name] if name in kept else None, copy=True)
                for name in self.written
            }
            outputs = function(**inputs | copies)
            codes.update({name: copies[name] for name in self.codes})
            return (*outputs, *(x for name, x in copies.items() if name not in self.codes))

        return call

    def _evaluate(self, actual: Results) -> Any:
        reference = self._function(self.spec.reference, {})
        return lambda given: accuracy.run(reference, given, self.spec.wrt, self.seed, like=actual)

    def _draws(self, actual: Results, noise: bool) -> list[tuple[Results, Results]]:
        """Draws of eager code, cached for exact and for approximate instructions."""
        if noise not in self._drawn:
            evaluate = self._evaluate(actual)

            def oracle(given: Any) -> Results:
                return {name: x.double() for name, x in evaluate(given).items()}

            with Approximate(self.seed) if noise else contextlib.nullcontext():
                self._drawn[noise] = accuracy.draw(evaluate, self.inputs, oracle)
        return self._drawn[noise]

    @functools.cached_property
    def _reference_codes(self) -> dict[str, torch.Tensor]:
        codes: dict[str, torch.Tensor] = {}
        accuracy.run(self._function(self.spec.reference, codes), self.inputs, ())
        return codes

    def _compare_codes(self, name: str, codes: torch.Tensor) -> Measured:
        """Compares 8-bit values with those of eager code. A rotation that rounds differently may
        change a value to its neighbour."""
        ours, eager = (x.view(torch.uint8).int() for x in (codes, self._reference_codes[name]))
        apart = (ours - eager).abs()
        return Measured(name, float(((apart > 1) & (apart < 255)).sum()), 0.0)


def _digest(results: Results) -> str:
    """A digest of the bits of results."""
    raw = [x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in results.values()]
    return hashlib.sha256(b"".join(raw)).hexdigest()[:16]


def refused(error: Exception, arch: str, case: Case) -> bool:
    """Whether the error says that the package does not support float8 on this architecture."""
    float8 = case.sizes.get("cache_dtype") == torch.float8_e4m3fn
    return float8 and arch == "sm_80" and "float8" in str(error) and "PTX" not in str(error)


def record_of(
    arch: str, spec: OpSpec, case: Case, dtype: str, view: str | None, seed: int, **options: Any
) -> dict[str, Any]:
    """Runs a call; returns its line of JSON. "status" is passed, refused or failed; "complaints"
    are the reasons."""
    record = {"arch": arch, "op": spec.name, "case": str(case), "dtype": dtype, "view": view}
    try:
        call = Call(spec, case, getattr(torch, dtype), view=view, seed=seed)
        outcome = call.run(arch, seed=seed, **options)
    except Exception as error:
        if refused(error, arch, case):
            return record | {"status": "refused", "complaints": [str(error)]}
        traceback.print_exc(limit=-4)
        complaint = f"{type(error).__name__}: {error}"
        return record | {"status": "failed", "complaints": [complaint[:600]]}
    worst = max(outcome.measured, key=lambda m: m.share)
    return record | {
        "status": "failed" if outcome.complaints else "passed",
        "complaints": outcome.complaints[:20],
        "worst": round(worst.share, 3),
        "what": worst.what,
        "launches": outcome.num_launches,
        "emulated": round(outcome.seconds, 2),
        "bits": _digest(outcome.results),
    }


def _print_coverage() -> None:
    covered = [(*program.coverage(), program.kernel.name) for program in programs.values()]
    ran, everything = (sum(numbers[i] for numbers in covered) for i in (0, 1))
    print(f"{len(covered)} binaries; {ran} of {everything} PTX instructions ran; least covered:")
    for done, count, lines, name in sorted(covered, key=lambda c: c[0] / c[1])[:5]:
        print(f"  {done / count:.0%} of {count} of {name}; never: PTX lines {lines[:4]}")


def _print_worst(records: list[dict[str, Any]]) -> None:
    worst: dict[tuple[str, str], tuple[float, str]] = defaultdict(lambda: (0.0, ""))
    for record in records:
        key = record["op"], record["dtype"]
        found = record.get("worst", 0.0), f"{record.get('what')} of {record['case']}"
        worst[key] = max(worst[key], found)
    print("The largest part of a budget that an error used:")
    for (op, dtype), (share, where) in worst.items():
        print(f"  {op}, {dtype}: {share:.2f} ({where})")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=ARCHITECTURES)
    parser.add_argument("--op", action="append", choices=[s.name for s in SPECS])
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--case", action="append", type=int, help="index of a case; repeatable")
    parser.add_argument("--extra", action="store_true", help="run the longer cases instead")
    parser.add_argument("--views", action="store_true", help="strided and misaligned inputs")
    parser.add_argument("--sms", type=int, help="processors that launches are planned for")
    parser.add_argument("--schedule", default="lockstep", choices=("lockstep", "random"))
    parser.add_argument("--ctas", default="forward", choices=ORDERS, help="order of programs")
    parser.add_argument(
        "--noise", action="store_true", help="add errors to approximate instructions"
    )
    parser.add_argument(
        "--report", action="store_true", help="show failures only, and exit with status 0"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", metavar="FILE", help="append a line of JSON per call")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.sms:
        limits = ARCHITECTURES[options.arch]._replace(num_sms=options.sms)
        ARCHITECTURES[options.arch] = limits
    poison_allocations()
    started, records = time.time(), []
    settings = {name: getattr(options, name) for name in ("schedule", "ctas", "noise", "seed")}
    calls = [
        (spec, case, dtype, view)
        for spec in SPECS
        if not options.op or spec.name in options.op
        for number, case in enumerate(extra_cases(spec) if options.extra else spec.test_cases())
        if not options.case or number in options.case
        for dtype in options.dtype or DTYPES
        for view in (VIEWS if options.views else (None,))
    ]
    for spec, case, dtype, view in calls:
        began = time.time()
        record = record_of(options.arch, spec, case, dtype, view, **settings)
        record["seconds"] = round(time.time() - began, 1)
        records.append(record)
        if options.results:
            with open(options.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if options.report and record["status"] == "passed":
            continue
        told = ("view", "worst", "what", "launches", "emulated", "seconds")
        shown = ", ".join(f"{name} {record[name]}" for name in told if record.get(name))
        why = "".join(f"\n    {complaint}" for complaint in record["complaints"][:3])
        print(f"{record['status']} {spec.name} {case} {dtype}: {shown}{why}", flush=True)
    _print_coverage()
    _print_worst(records)
    count = {s: sum(r["status"] == s for r in records) for s in ("passed", "refused", "failed")}
    counted = ", ".join(f"{number} {status}" for status, number in count.items())
    print(f"{len(records)} calls in {time.time() - started:.0f} s: {counted}")
    if count["failed"] and not options.report:
        sys.exit(1)


if __name__ == "__main__":
    main()
