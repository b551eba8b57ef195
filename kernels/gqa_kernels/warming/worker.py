"""A process that compiles kernels: each line of stdin is a kernel, each line of stdout its result.

    python -m gqa_kernels.warming.worker

Lines are JSON: [module, name, specialization] and {"error": null or a text, "was_there": …}.
"""

import importlib
import json
import os
import signal
import sys
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget

from gqa_kernels.warming.absent_gpu import AbsentGpu, active


def compile_kernel(module: str, name: str, specialization: str) -> bool:
    """Compiles a kernel into Triton's cache; returns whether it was already there."""
    found = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found.append(cache_hit)

    target = GPUTarget(**json.loads(specialization)["target"])
    knobs.compilation.listener = listen
    with active(AbsentGpu(target, {})):
        getattr(importlib.import_module(module), name).preload(specialization)
    return found == [True]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the compiler's output goes to stderr, as stdout carries results only
    for line in sys.stdin:
        answer: dict[str, object] = {"error": None, "was_there": False}
        try:
            answer["was_there"] = compile_kernel(*json.loads(line))
        except Exception as error:  # a failed compilation must not stop the others
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
