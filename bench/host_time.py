"""Measures the host time of calls of the ops and of their peers, without a GPU.

    python bench/host_time.py [--op rms_norm …] [--rounds 20] [--write]

Measures the thread's CPU time per eager call of every op, for the forward pass alone and with the
backward pass. The GPU is a stand-in that does nothing (`idle_gpu.py` says which parts of a launch
are real). The unit is the time of a launch of an empty kernel with RMSNorm's arguments through
Triton, in the same run. The shapes are tiny, so that PyTorch's own ops, which run on the CPU here,
compute almost nothing. Prints the table; `--write` also writes it to bench/results/host_time.md and
the figures to host_time.json. Needs a C compiler.

Not included: the driver's time for a launch, which is the same for all kernels; the launches of
PyTorch's ops on a GPU, where they therefore cost more than here; the allocator of a GPU; and the
thread in which autograd runs on a GPU.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import importable

importable.extend_path()

import idle_gpu
import torch
import triton
import triton.language as tl
from adapters import Backend, make_call, outputs_of
from ceilings import environment, version

UNIT = "empty launch"
RESULTS = importable.ROOT / "bench" / "results" / "host_time.json"
FORWARD, BOTH = "forward", "forward + backward"
# More than one row, of 16 bytes each, so that kernels are specialised as for real shapes.
SIZES = {
    "rms_norm": {"num_tokens": 2, "hidden_size": 16},
    "add_rms_norm": {"num_tokens": 2, "hidden_size": 16},
    "swiglu": {"num_tokens": 2, "intermediate_size": 16},
    "apply_rope": {"batch": 1, "seq_len": 2, "head_dim": 16},
    "flash_attention": {"batch": 1, "seq_len_q": 2, "seq_len_kv": 2, "head_dim": 16},
    "decode_attention": {"batch": 1, "head_dim": 16, "ragged": False},
    "prefill_attention": {"total": 2, "num_sequences": 1, "head_dim": 16},
    "rope_append_kv": {"batch": 1, "head_dim": 16},
    "sample_tokens": {"num_tokens": 2, "vocab_size": 16},
}
PEERS = ("triton", "liger", "torch", "sdpa_default")


@triton.jit
def _empty_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pass


class Measured(NamedTuple):
    """CPU time of one call: medians of all rounds."""

    op: str
    pass_: str
    name: str
    microseconds: float
    units: float  # the time divided by that of the empty launch in the same round
    quartiles: tuple[float, float]  # of the units
    launches: int  # of Triton kernels per call


def _transformers() -> Backend:
    """Transformers' norm and RoPE, called as in its Llama."""

    def norm(inputs: dict[str, Any]) -> Callable[[], Any]:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        module = LlamaRMSNorm(inputs["weight"].shape[0])
        del module.weight  # a parameter, replaced by the workload's tensor
        module.weight = inputs["weight"]
        return lambda: module(inputs["x"])

    def rope(inputs: dict[str, Any]) -> Callable[[], Any]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = (inputs[name] for name in ("q", "k"))
        cos, sin = (
            inputs[name][: q.shape[1]].repeat(1, 2)[None].to(q.dtype) for name in ("cos", "sin")
        )
        return lambda: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)

    def check() -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401

    return Backend(
        "transformers", {"rms_norm": norm, "apply_rope": rope}, check, distribution="transformers"
    )


def _inputs(op: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(arguments, names of those with gradients) of a tiny call."""
    from gqa_kernels.spec import OPS, Case
    from gqa_kernels.spec.cache import IN_PLACE_OPS

    (spec,) = (spec for spec in (*OPS, *IN_PLACE_OPS) if spec.name == op)
    case = Case(spec.tiny | SIZES[op], "tiny")
    generator = torch.Generator().manual_seed(0)
    return spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), generator), spec.wrt


def _calls(backend: Backend, op: str, pass_: str) -> Callable[[], Any]:
    inputs, wrt = _inputs(op)
    if pass_ == FORWARD:
        forward = make_call(backend, op, "fwd", inputs, wrt, ())

        def without_grad() -> Any:
            with torch.no_grad():
                return forward()

        return without_grad
    leaves = {n: x.detach().requires_grad_() if n in wrt else x for n, x in inputs.items()}
    wanted = [leaves[name] for name in wrt]

    forward = backend.adapters[op]
    once = forward(leaves)
    cotangents = [torch.ones_like(x) for x in outputs_of(once()) if x.requires_grad]

    def both() -> Any:
        outputs = [x for x in outputs_of(once()) if x.requires_grad]
        return torch.autograd.grad(outputs, wanted, cotangents)

    return both


def contests(ops: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Callable[[], Any]]]]:
    """Yields (op, pass, calls by contestant); one of the calls is the empty launch."""
    import peers

    x, weight = torch.zeros(4, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)

    def empty() -> None:
        _empty_kernel[(4,)](
            x_ptr=x,
            residual_ptr=None,
            weight_ptr=weight,
            y_ptr=x,
            h_ptr=None,
            rstd_ptr=None,
            x_stride=4096,
            residual_stride=0,
            eps=1e-5,
            WIDTH=4096,
            BLOCK=4096,
            num_warps=4,
            enable_fp_fusion=True,
        )

    backends = [backend for backend in peers.BACKENDS if backend.name in PEERS]
    backends = [x for x in (*backends, _transformers()) if x.available() is None]
    for op in ops:
        for pass_, bench_pass in ((FORWARD, "fwd"), (BOTH, "bwd")):
            takers = [x for x in backends if x.lacks(op, bench_pass) is None]
            if takers:
                yield op, pass_, {UNIT: empty} | {x.name: _calls(x, op, pass_) for x in takers}


def race(
    calls: dict[str, Callable[[], Any]], rounds: int, seconds: float = 1e-2
) -> dict[str, tuple[float, float, tuple[float, float], int]]:
    """Returns (µs per call, units, quartiles of the units, launches) of each call. The calls take
    turns."""
    counts, launched, samples = {}, {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(20):
            call()
        before, start = idle_gpu.launches(), time.thread_time()
        call()
        counts[name] = max(1, round(seconds / max(time.thread_time() - start, 1e-6)))
        launched[name] = idle_gpu.launches() - before
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.thread_time()
                for _ in range(counts[name]):
                    call()
                samples[name].append((time.thread_time() - start) / counts[name] * 1e6)
    finally:
        gc.enable()
    found = {}
    for name, times in samples.items():
        units = [x / unit for x, unit in zip(times, samples[UNIT], strict=True)]
        low, middle, high = statistics.quantiles(units, n=4)
        found[name] = statistics.median(times), middle, (low, high), launched[name]
    return found


def measure(ops: tuple[str, ...], rounds: int) -> list[Measured]:
    return [
        Measured(op, pass_, name, *result)
        for op, pass_, calls in contests(ops)
        for name, result in race(calls, rounds).items()
    ]


def markdown(content: dict[str, Any]) -> str:
    rows = [Measured(**row) for row in content["rows"]]
    names = list(dict.fromkeys(row.name for row in rows if row.name != UNIT))
    where = content["environment"]
    versions = ", ".join(f"{name} {x}" for name, x in content["versions"].items())
    units = [row.microseconds for row in rows if row.name == UNIT]
    lines = [
        "# What a call costs the host",
        "",
        "Written by `python bench/host_time.py --write` on a CPU, with Python "
        f"{where['python']}, PyTorch {where['torch']}, Triton {where['triton']}, {versions}, at "
        f"commit {where['commit']}.",
        "",
        "CPU time of the calling thread per eager call, divided by that of launching an empty",
        f"kernel with 11 arguments through Triton ({statistics.median(units):.1f} µs here). In "
        "brackets: how many Triton",
        "kernels the call launches. The GPU is a stand-in that does nothing, so the table says",
        "nothing of the speed of a GPU. PyTorch's own ops compute on the CPU here; the cost of",
        "launching them on a GPU is not included. `bench/host_time.py` says what else is not.",
        "",
        "| op | pass | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    groups: dict[tuple[str, str], dict[str, Measured]] = {}
    for row in rows:
        groups.setdefault((row.op, row.pass_), {})[row.name] = row
    for (op, pass_), group in groups.items():
        cells = []
        for name in names:
            row = group.get(name)
            launches = f" ({row.launches})" if row and row.launches else ""
            cells.append(f"{row.units:.1f}{launches}" if row else "–")
        lines.append(f"| {op} | {pass_} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=SIZES, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--json", action="store_true", help="print the figures as JSON, not the table"
    )
    names = f"{RESULTS.name} and {RESULTS.with_suffix('.md').name}"
    parser.add_argument("--write", action="store_true", help=f"write bench/results/{names}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    idle_gpu.activate()
    rows = measure(tuple(options.op or SIZES), options.rounds)
    packages = ("gqa-kernels", "transformers", "liger-kernel")
    content = {
        "environment": environment(),
        "versions": {name: x for name in packages if (x := version(name))},
        "rows": [row._asdict() for row in rows],
    }
    if options.write:
        from llama2.storage import write_text

        write_text(RESULTS, json.dumps(content, indent=1) + "\n")
        write_text(RESULTS.with_suffix(".md"), markdown(content))
    print(json.dumps(content) if options.json else markdown(content))


if __name__ == "__main__":
    main()
