"""`warm_up(call)` compiles the kernels of a call into Triton's cache ahead of time.

Triton compiles a kernel at its first launch and stores the binary in a directory, TRITON_CACHE_DIR
or ~/.triton/cache, under a hash of everything that it depends on: the kernels' source, their
specialisation, the target, Triton and ptxas, and variables such as TRITON_DEBUG. It does not depend
on the GPU itself, so a machine without a GPU can fill a cache for one.
"""

import os
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from gqa_kernels import interpreter
from gqa_kernels.warming.recording import record
from gqa_kernels.warming.workers import Outcome, compile_all


class Report(NamedTuple):
    """The result of `warm_up`. Kernels are named by module and function, one entry per binary.

    Attributes:
        compiled: the kernels that were compiled.
        were_there: the kernels that were already in the cache.
        failed: (kernel, error) of each kernel that does not compile.
    """

    compiled: tuple[str, ...]
    were_there: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        counts = f"{len(self.compiled)} kernels compiled, {len(self.were_there)} were there"
        failed = [f"{kernel} does not compile: {error}" for kernel, error in self.failed]
        return "\n".join([counts, *failed])


class CompilationError(RuntimeError):
    """Some kernels do not compile; all others have been compiled.

    Attributes:
        report: the report on all kernels.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def warm_up(
    call: Callable[[], object],
    *,
    arch: str | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> Report:
    """Compiles the kernels of this package that `call()` launches into Triton's cache, in parallel
    processes. Afterwards the same call compiles nothing, in this process or another.

    This process runs the call once. It records the launches of this package's kernels without
    executing them, so the call takes no GPU time; the outputs of ops are uninitialised, and results
    computed from them must not be used. Kernels of other packages are launched as usual.

        model = ...  # on the GPU, patched or made with get_backend("triton")
        gqa_kernels.warm_up(lambda: model(tokens))

    A binary serves all numbers of tokens except for corner cases (a batch with one token, a view
    with other strides), so few calls cover all of them. Other binaries are needed for a gradient,
    another dtype of the model, and a cache of another dtype or in pages. A model of two layers
    launches the same kernels as one of many.

    Kernels in the cache are not compiled again, so an interrupted call can be repeated. The cache
    contains absolute paths and cannot be moved. The process that uses it must have the same
    environment, source, and versions of Triton and ptxas. Triton 3.6 also builds a launcher per
    signature with a C compiler, and every version builds a library for its driver; both are built
    at the first launch, not here.

    Args:
        arch: "sm_90", …: compiles for a GPU that need not be present; the call's tensors are then
            on the CPU. None: for the active GPU, where the call's tensors are.
        jobs: the largest number of processes; None: the number of CPUs that this process may use.
        progress: shows a progress bar on stderr if that is a terminal; needs tqdm.
    Raises:
        CompilationError: some kernels do not compile; all others have been compiled.
        RuntimeError: the kernels run in Triton's interpreter.
        ValueError: Triton does not compile for arch, or arch is None without a GPU; jobs is less
            than 1.
        ImportError: progress without tqdm.
    """
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1; got {jobs}")
    if interpreter.is_enabled():
        raise RuntimeError(
            "warm_up: expected kernels that are compiled; got Triton's interpreter. "
            "Unset TRITON_INTERPRET before the first import of triton"
        )
    kernels = record(call, arch)
    with closing(compile_all(kernels, jobs)) as outcomes:
        if progress:
            from tqdm import tqdm

            outcomes = tqdm(outcomes, "compiling", len(kernels), unit="kernel", disable=None)
        report = _report(list(outcomes))
    if report.failed:
        raise CompilationError(report)
    return report


def _report(outcomes: list[Outcome]) -> Report:
    return Report(
        tuple(str(x.kernel) for x in outcomes if x.error is None and not x.was_there),
        tuple(str(x.kernel) for x in outcomes if x.was_there),
        tuple((str(x.kernel), x.error) for x in outcomes if x.error is not None),
    )
