"""`warm_up(call)`: what a call needs compiled lies in Triton's cache before the first such call.

Triton compiles a kernel when it is first launched, and keeps the binary in a directory,
TRITON_CACHE_DIR or ~/.triton/cache, under a hash of all that it depends on: the kernels' source,
what they are specialised for, the target, Triton and ptxas, and variables such as TRITON_DEBUG. The
GPU itself is no part of it, so that a machine without one fills a cache for it.
"""

import os
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from gqa_kernels import interpreter
from gqa_kernels.warming.recording import record
from gqa_kernels.warming.workers import Outcome, compile_all


class Report(NamedTuple):
    """What `warm_up` found. Kernels are named by module and function, one per binary.

    Attributes:
        compiled: what has been compiled.
        were_there: what the cache held.
        failed: (kernel, error) of each that does not compile.
    """

    compiled: tuple[str, ...]
    were_there: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        counts = f"{len(self.compiled)} kernels compiled, {len(self.were_there)} were there"
        failed = [f"{kernel} does not compile: {error}" for kernel, error in self.failed]
        return "\n".join([counts, *failed])


class CompilationError(RuntimeError):
    """Kernels that do not compile; the others have been.

    Attributes:
        report: of all of them.
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
    """Compiles what `call()` launches of this package's kernels, in parallel processes, into
    Triton's cache: afterwards the same call compiles nothing, in this process or another.

    The call is made once, by this process. Its launches are written down and not made, so that it
    takes no time of a GPU; what the ops return is not initialised, and nothing that was computed
    from it is to be used. Launches of other packages' kernels are made as ever.

        model = ...  # on the GPU, patched or made with get_backend("triton")
        gqa_kernels.warm_up(lambda: model(tokens))

    A binary serves every number of tokens but for corner cases (a batch with one token, a view with
    other strides), so that a call needs few of them; a cache of another dtype or in pages, a
    gradient and another dtype of the model are other binaries. A model of two layers launches what
    one of many does.

    What was interrupted goes on where it was; what is in the cache is not compiled again. The cache
    holds absolute paths: it is found where it was made. Environment, source, and the versions of
    Triton and its ptxas must be those of the process that is to find it. Triton 3.6 has a C
    compiler make a launcher per signature beside, every version a library of its driver; these come
    at the first launch.

    Args:
        arch: "sm_90", …: compiles for a GPU that need not be there; the call's tensors are on the
            CPU then. None: for the active GPU, where the call's tensors are.
        jobs: processes at most; None: as many as this process may use of the CPUs.
        progress: shows a bar on stderr, if that is a terminal; needs tqdm.
    Raises:
        CompilationError: kernels do not compile, after all others have been.
        RuntimeError: the kernels run in Triton's interpreter.
        ValueError: arch is none that Triton compiles for, or None where it drives no GPU; jobs is
            less than 1.
        ImportError: progress without tqdm.
    """
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1; got {jobs}")
    if interpreter.is_enabled():
        raise RuntimeError(
            "warm_up: expected kernels that are compiled; got Triton's interpreter. "
            "TRITON_INTERPRET has to be unset before the first import of triton"
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
