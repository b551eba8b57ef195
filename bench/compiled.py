"""Compiles every op for GPUs that need not be present, and shows properties of the binaries.

    python bench/compiled.py [--arch sm_90] [--op rms_norm] [--write bench/results/compiled.md]

Registers, spills and instructions are read from the binaries. Programs per SM, bytes in flight and
rates are predictions, explained in `prediction.py`. No speed is measured.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import capture
import torch
from binary import Binary, examine
from compiled_table import markdown
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from gqa_kernels import interpreter
from gqa_kernels.spec import IN_PLACE_OPS, OPS, Case, OpSpec

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SPECS = (*OPS, *IN_PLACE_OPS)


@dataclass(frozen=True)
class Entry:
    """One launch of one op on one architecture, or the error that prevented it."""

    arch: str
    op: str
    case: Case
    dtype: str
    mode: str  # "inference" or "training"
    launch: capture.Launch | None = None
    binary: Binary | None = None
    error: str = ""


def _variants(spec: OpSpec) -> list[tuple[Case, torch.dtype]]:
    """Additional shapes to those of the op table: other heads, other dtypes."""
    base = [case for case in spec.cases if not case.test][-1]

    def variant(source: str, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> tuple:
        return replace(base, sizes={**base.sizes, **sizes}, source=source), dtype

    match spec.name:
        case "rms_norm":
            return [variant("the widest row", hidden_size=16384)]
        case "apply_rope":
            return [variant("Meta's pairs", interleaved=True)]
        case "rope_append_kv":
            int8, float8 = torch.int8, torch.float8_e4m3fn
            return [
                variant("Meta's pairs", interleaved=True),
                *(
                    variant(f"{scale} scales", cache_dtype=dtype, scale_per_head=scale == "heads'")
                    for dtype in (int8, float8)
                    for scale in ("heads'", "tokens'")
                ),
                variant("Meta's pairs, quantised", cache_dtype=int8, interleaved=True),
                variant("the widest head", cache_dtype=int8, head_dim=256),
                variant("a padded head", cache_dtype=int8, head_dim=80),
                variant("float32", torch.float32, head_dim=256),
            ]
        case "flash_attention":
            wide = [
                variant("other heads", head_dim=head_dim, causal=causal)
                for head_dim in HEAD_DIMS
                for causal in (True, False)
            ]
            scores = (
                {"window": (4096, None)},
                {"softcap": 50.0},
                {"alibi": True},
                {"sinks": True},
                {"padded": True},
                {"documents": 4},
            )
            return [
                *wide,
                *(
                    variant("float32", torch.float32, head_dim=head_dim, causal=True)
                    for head_dim in (64, 128, 256)
                ),
                *(
                    variant("scores", head_dim=head_dim, causal=True, **score)
                    for head_dim in (64, 128)
                    for score in scores
                ),
            ]
        case "flash_attention_varlen":
            return [variant("other heads", head_dim=64)]
        case "decode_attention":
            return [
                variant("other heads", head_dim=64),
                variant("other heads", head_dim=256),
                variant("sixteen new tokens", seq_len_q=16),
                variant("float32", torch.float32),
                *(variant("pages", page_size=page_size) for page_size in (16, 64)),
                variant("pages of wide heads", page_size=16, head_dim=256),
                variant("pages, sixteen new tokens", page_size=16, seq_len_q=16),
                *(
                    variant("scores", **score)
                    for score in (
                        {"window": (4096, None)},
                        {"sinks": True},
                        {"alibi": True},
                        {"softcap": 50.0, "head_dim": 256},
                        {"window": (4096, None), "softcap": 50.0, "sinks": True, "page_size": 16},
                    )
                ),
                *(
                    variant("quantised", cache_dtype=dtype, **cache)
                    for dtype in (torch.int8, torch.float8_e4m3fn)
                    for cache in (
                        {"scale_per_head": True},
                        {"page_size": 64, "scale_per_head": True},
                        {"page_size": 16},
                        {"page_size": 16, "head_dim": 256},
                        {"page_size": 64, "seq_len_q": 16},
                    )
                ),
            ]
        case "prefill_attention":
            return [
                *(variant("other heads", head_dim=head_dim) for head_dim in HEAD_DIMS),
                variant("full", causal=False),
                *(variant("float32", torch.float32, head_dim=head_dim) for head_dim in (128, 256)),
                variant("pages", page_size=16),
                variant("pages of wide heads", page_size=16, head_dim=256),
                *(
                    variant("scores", head_dim=head_dim, **score)
                    for head_dim in (64, 128, 256)
                    for score in (
                        {"window": (4096, None)},
                        {"alibi": True},
                        {"window": (4096, None), "softcap": 50.0, "sinks": True, "page_size": 16},
                    )
                ),
                *(
                    variant("quantised", cache_dtype=dtype, **cache)
                    for dtype in (torch.int8, torch.float8_e4m3fn)
                    for cache in (
                        {"scale_per_head": True},
                        {"page_size": 16},
                        {"page_size": 16, "head_dim": 256},
                        {"page_size": 64, "scale_per_head": True, "softcap": 50.0},
                    )
                ),
            ]
        case "linear_cross_entropy":
            return [
                variant("GPT-2's vocabulary, a cap", vocab_size=50257, softcap=30.0),
                variant("float32", torch.float32),
            ]
        case "token_log_probs":
            return [variant("entropies", temperature=0.7, return_entropy=True)]
    return []


def representative(spec: OpSpec, arch: str, fewer: bool = False) -> list[tuple[Case, torch.dtype]]:
    """The shapes to compile. On sm_90: the op table's real shapes and the variants. On other
    targets: the last shape of each op and its bfloat16 variants, of attention only causal ones and,
    of the options for scores, only the soft cap, since these need the most registers. With `fewer`:
    only the last shape, for attention the last causal one."""
    real = [(case, torch.bfloat16) for case in spec.cases if not case.test]
    if fewer:
        return [(case, dtype) for case, dtype in real if case.sizes.get("causal", True)][-1:]
    variants = _variants(spec)
    if arch == "sm_90":
        return real + variants
    return real[-1:] + [
        (case, dtype)
        for case, dtype in variants
        if dtype == torch.bfloat16
        and case.sizes.get("causal", True)
        # Triton supports this type from sm_89 on.
        and (arch != "sm_80" or case.sizes.get("cache_dtype") != torch.float8_e4m3fn)
        and (case.source != "scores" or "softcap" in case.sizes)
    ]


class _WithoutDrawing(TorchFunctionMode):
    """Replaces random tensors by tensors with shapes but without values."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("generator", None) is not None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def make_inputs(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The case's inputs at full size; they are never written to, so they use address space only."""
    with _WithoutDrawing():
        inputs = spec.make_inputs(case, dtype, torch.device("meta"), torch.Generator())
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        if isinstance(x, Tensor)
        else x
        for name, x in inputs.items()
    }


def _calls(spec: OpSpec, case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    inputs = make_inputs(spec, case, dtype)

    def infer() -> None:
        with torch.no_grad():
            spec.kernel(**inputs)

    def train() -> None:
        wrt = [inputs[name].requires_grad_() for name in spec.wrt]
        outputs = spec.kernel(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, wrt, [torch.empty_like(output) for output in outputs])

    yield "inference", infer
    if spec.wrt:
        yield "training", train


def compile_case(spec: OpSpec, case: Case, dtype: torch.dtype, arch: str) -> Iterator[Entry]:
    """Yields every launch of the op: forward, then forward and backward."""
    for mode, call in _calls(spec, case, dtype):
        entry = Entry(arch, spec.name, case, str(dtype).removeprefix("torch."), mode)
        try:
            for launch in capture.capture(arch, call):
                yield replace(entry, launch=launch, binary=examine(launch))
        except Exception as error:  # any failure of a compilation is a result
            yield replace(entry, error=f"{type(error).__name__}: {error}")


def compile_all(archs: list[str], ops: list[str], fewer: bool = False) -> list[Entry]:
    specs = [spec for spec in SPECS if spec.name in ops]
    work = [
        (spec, case, dtype, arch)
        for arch in archs
        for spec in specs
        for case, dtype in representative(spec, arch, fewer)
    ]
    entries: dict[tuple, Entry] = {}  # the launch with the most programs for each binary
    for spec, case, dtype, arch in tqdm(work, unit="case", file=sys.stderr):
        for entry in compile_case(spec, case, dtype, arch):
            key = arch, spec.name, entry.launch.hash if entry.launch else str(case)
            kept = entries.setdefault(key, entry)
            if entry.launch and math.prod(entry.launch.grid) > math.prod(kept.launch.grid):
                entries[key] = entry
    return list(entries.values())


def calls_of_many_sizes(spec: OpSpec) -> Iterator[tuple[str, Callable]]:
    """Yields (mode, call) for 20 calls of an op that differ only in numbers of tokens and
    sequences."""
    lengths = (*range(1, 10), 15, 16, 17, 32, 33, 64, 100, 128, 255, 256, 1000)
    base = [case for case in spec.cases if not case.test][-1]
    for index, length in enumerate(lengths):
        sizes = {"num_tokens": length, "batch": 1 + index % 4, "seq_len": length}
        # A single query has no causal mask and therefore another binary.
        sizes |= {"seq_len_kv": length + 7 * index, "max_seq_len": 8 * length}
        sizes |= {"seq_len_q": length + 1} if spec.name == "flash_attention" else {}
        sizes |= {"positions": True, "total": 8 * length, "num_sequences": 1 + index % 4}
        kept = {name: size for name, size in sizes.items() if name in base.sizes}
        case = replace(base, sizes={**base.sizes, **kept})
        yield from _calls(spec, case, torch.bfloat16)


def count_binaries(arch: str, names: list[str]) -> dict[str, tuple[int, int]]:
    """Numbers of binaries, per op, mode and kernel, of one call and of `calls_of_many_sizes`."""
    hashes: dict[str, list[set[str]]] = {}  # one set per call
    for spec in SPECS:
        if spec.name not in names:
            continue
        for mode, call in calls_of_many_sizes(spec):
            launches = capture.capture(arch, call)
            for kernel in {launch.kernel for launch in launches}:
                found = {launch.hash for launch in launches if launch.kernel == kernel}
                hashes.setdefault(f"{spec.name}, {mode}, {kernel}", []).append(found)
    return {key: (max(map(len, calls)), len(set().union(*calls))) for key, calls in hashes.items()}


def _as_json(entries: list[Entry]) -> str:
    return json.dumps(
        [
            vars(entry)
            | {
                "case": str(entry.case),
                "launch": entry.launch and entry.launch._asdict(),
                "binary": entry.binary and vars(entry.binary),
            }
            for entry in entries
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [spec.name for spec in SPECS]
    parser.add_argument("--arch", action="append", choices=capture.ARCHITECTURES)
    parser.add_argument("--op", action="append", choices=names)
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the table to a file")
    parser.add_argument("--json", action="store_true", help="print every launch instead")
    parser.add_argument("--count", action="store_true", help="count the binaries of 20 calls")
    parser.add_argument("--fewer", action="store_true", help="only the last shape of each op")
    options = parser.parse_args(arguments)
    if interpreter.is_enabled():
        parser.error("TRITON_INTERPRET: expected it to be unset; the interpreter compiles nothing")
    archs = options.arch or list(capture.ARCHITECTURES)
    if options.count:
        counted = {arch: count_binaries(arch, options.op or names) for arch in archs}
        print(json.dumps(counted))
        return
    entries = compile_all(archs, options.op or names, options.fewer)
    if options.json:
        print(_as_json(entries))
    elif options.write:
        options.write.write_text(markdown(entries), encoding="utf-8")
    else:
        print(markdown(entries))


if __name__ == "__main__":
    main()
