"""What a call must cost at least, on a device whose ceilings are known.

    floor = max(bytes / bandwidth, flops / matrix rate)

`bytes` and `flops` are the algorithmic minimum (`gqa_kernels.spec` for the forward passes, here
for the backward ones). The bandwidth is the measured rate of a copy; where nearly all the traffic
is reading, as in decoding, it is the measured rate of reading. The rate of the matrix units bounds
attention; the few flops of the row ops never do.
"""

import math
from typing import NamedTuple

import torch

from gqa_kernels.spec import Case, Cost

LATENCY_SECONDS = 5e-6  # below this floor a launch costs more than the work


class Ceilings(NamedTuple):
    """What the device itself does, measured in the same run."""

    copy_bytes_per_s: float  # read + written
    read_bytes_per_s: float
    mma_flops_per_s: float  # bfloat16 matrix product


class Floor(NamedTuple):
    seconds: float
    bound: str  # "mem", "mma" or "latency"


def floor(cost: Cost, ceilings: Ceilings) -> Floor:
    total = cost.read_bytes + cost.write_bytes
    reads_only = cost.write_bytes < 0.05 * total
    bandwidth = ceilings.read_bytes_per_s if reads_only else ceilings.copy_bytes_per_s
    memory, matrix = total / bandwidth, cost.flops / ceilings.mma_flops_per_s
    seconds = max(memory, matrix)
    if seconds < LATENCY_SECONDS:
        return Floor(seconds, "latency")
    return Floor(seconds, "mem" if memory >= matrix else "mma")


def backward_cost(op: str, case: Case, dtype: torch.dtype, forward: Cost) -> Cost:
    """The minimum of a backward pass whose forward pass costs `forward`.

    With T tokens of width d (or 2-byte elements, for a sense of it):
        rms_norm: reads x, dy, weight; writes dx, dweight: 3 T d elements
        add_rms_norm: reads h, dy, dh, weight; writes dx (the residual's too), dweight: 4 T d
        swiglu: reads dy, gate, up; writes dgate, dup: 5 T d
        apply_rope: as forward, with dq and dk
        flash_attention: reads q, k, v, out, dout, lse; writes dq, dk, dv; five products where the
            forward pass has two: 2.5 × its flops. Packed, likewise

    Raises:
        KeyError: the op has no backward pass.
    """
    sizes, size = case.sizes, dtype.itemsize
    if op in ("rms_norm", "add_rms_norm"):
        width = sizes["hidden_size"]
        plane = sizes["num_tokens"] * width * size
        planes_read = 2 if op == "rms_norm" else 3
        return Cost(planes_read * plane + width * size, plane + width * size, 3 * forward.flops)
    if op == "swiglu":
        plane = sizes["num_tokens"] * sizes["intermediate_size"] * size
        return Cost(3 * plane, 2 * plane, 3 * forward.flops)
    if op == "apply_rope":
        return forward
    if op in ("flash_attention", "flash_attention_varlen"):
        head_dim = sizes["head_dim"]
        if "total" in sizes:
            rows_q = rows_kv = sizes["total"]
        else:
            rows_q, rows_kv = (sizes["batch"] * sizes[f"seq_len_{side}"] for side in ("q", "kv"))
        queries, keys = rows_q * sizes["num_q_heads"], rows_kv * sizes["num_kv_heads"]
        read = (3 * queries + 2 * keys) * head_dim * size + 4 * queries
        write = (queries + 2 * keys) * head_dim * size
        return Cost(read, write, math.ceil(2.5 * forward.flops))
    raise KeyError(f"op: expected one with a backward pass; got {op!r}")
