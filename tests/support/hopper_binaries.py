"""Prints as JSON what the kernels for Hopper compile to; needs bench/ on the path.

    PYTHONPATH=bench python tests/support/hopper_binaries.py [--fewer]

[forward, backward]: every row of the tables, causal and full, the forward kernel with each of its
options too, for inference and for training, which needs the residue; from Triton 3.8 on, all
gradients by one kernel, too. --fewer: one of each of the others.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import capture
import torch
from binary import examine, product_loops

from gqa_kernels.ops.attention.backward import launch_backward
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.ops.attention.hopper.pipeline import start_add
from gqa_kernels.ops.attention.launch import launch_forward
from gqa_kernels.runtime.hopper_configs import HOPPER_BACKWARD, HOPPER_FORWARD, HopperConfig

# The synchronisation in a partition's PTX, by a letter.
_STEPS = {
    r"stmatrix|st\.shared": "S",  # generic writes
    r"fence\.proxy\.async": "F",
    r"bar\.sync\s+\d+, 128": "|",  # of a partition
    r"bar\.warp\.sync": "|",  # of the copy warp
    r"barrier\.sync\s+1;": "|",  # of all partitions, at their ends
    r"cp\.(reduce\.)?async\.bulk\.tensor\.\dd\.global": "O",  # a copy out, an addition
    r"cp\.async\.bulk\.wait_group": "w",
    r"mbarrier\.arrive\.shared": "A",
    r"wgmma\.wait_group": "g",
    r"wgmma\.mma_async": "M",
}


def order_of(ptx: str) -> str:
    """The letters of `_STEPS` in the order of the PTX."""
    found = []
    for line in ptx.splitlines():
        found += [step for pattern, step in _STEPS.items() if re.search(pattern, line)][:1]
    return "".join(found)


class Form(NamedTuple):
    """What the forward kernel is compiled for."""

    causal: bool = True
    window: bool = False
    softcap: float | None = None
    packed: bool = False
    training: bool = False


def _forms(row: HopperConfig) -> Iterator[Form]:
    for packed, training in itertools.product((False, True), repeat=2):
        form = Form(packed=packed, training=training)
        yield form
        yield form._replace(causal=False)
        yield form._replace(window=True)
        yield form._replace(softcap=2.0)
        if row.capped_windows:
            yield form._replace(window=True, softcap=2.0)


def entries(fewer: bool) -> Iterator[dict]:
    rows = [row for row in HOPPER_FORWARD if row.head_dim == 128] if fewer else HOPPER_FORWARD
    for row in rows:
        for form in [Form()] if fewer else _forms(row):
            call = call_of(row.head_dim, form.causal)
            bounds = torch.empty(9, dtype=torch.int32) if form.packed else None
            call = call._replace(
                window_left=100 if form.window else None,
                softcap=form.softcap,
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
            )
            (launch,) = capture.capture(
                "sm_90",
                lambda call=call, form=form: launch_forward(
                    call, need_lse=True, need_residue=form.training, unmeasured=True
                ),
            )
            yield {"row": row._asdict(), "form": form._asdict(), **read(launch)}


def backward_entries(fewer: bool) -> Iterator[dict]:
    rows = [row for row in HOPPER_BACKWARD if row.head_dim == 128] if fewer else HOPPER_BACKWARD
    for row in rows:
        for causal in (True,) if fewer else (True, False):
            call = call_of(row.head_dim, causal)
            lse = torch.empty(1, 64, 8192, dtype=torch.float32)
            residue = torch.empty(call.q.shape, dtype=torch.int8)
            for deterministic in (True, False) if start_add and not fewer else (True,):
                launches = capture.capture(
                    "sm_90",
                    lambda call=call, lse=lse, residue=residue, deterministic=deterministic:
                    launch_backward(
                        call, call.q, None, call.q, lse, residue,
                        need_dq=not fewer, need_dkdv=True, need_dsinks=False, unmeasured=True,
                        deterministic=deterministic,
                    ),
                )  # fmt: skip
                for launch in launches:
                    if ".hopper." in launch.kernel:
                        yield {"row": row._asdict(), "causal": causal, **read(launch)}


def call_of(head_dim: int, causal: bool) -> Call:
    q = torch.empty(1, 8192, 64, head_dim, dtype=torch.bfloat16)
    k = torch.empty(1, 8192, 8, head_dim, dtype=torch.bfloat16)
    return prepared(Call(q, k, k, *[None] * 8, 0 if causal else None, None))


def read(launch: capture.Launch) -> dict:
    binary = examine(launch)
    ptx = Path(launch.files()["ptx"]).read_text(encoding="utf-8")
    return {
        "kernel": launch.kernel,
        "shared": launch.shared,
        "mix": binary.mix,
        "serialized": binary.serialized,
        "local": binary.spills,
        "loops": [loop._asdict() for loop in product_loops(launch)],
        "order": order_of(ptx),
        "named": sorted(set(re.findall(r"bar\.(?:sync|arrive)\s+(\d+), 256", ptx))),
        "barriers": sorted(set(re.findall(r"\bbar\.sync\s+(\d+), 128", ptx))),
        "registers": [int(n) for n in re.findall(r"setmaxnreg\.\w+\.\S+\s+(\d+)", ptx)],
        "max_registers": int(re.search(r"\.maxnreg\s+(\d+)", ptx)[1]),
        "threads": int(re.search(r"\.reqntid\s+(\d+)", ptx)[1]),
    }


if __name__ == "__main__":
    fewer = "--fewer" in sys.argv
    print(json.dumps([list(entries(fewer)), list(backward_entries(fewer))]))
