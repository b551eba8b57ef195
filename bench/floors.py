"""The lower bound of a call's time on a device with known ceilings.

    floor = max(bytes / bandwidth, flops / matrix rate)

`bytes` and `flops` are the algorithmic minimum, from `gqa_kernels.spec`. The bandwidth is the
measured rate of a copy or, if nearly all traffic is reads, as in decoding, the measured rate of
reads. Attention is bounded by the rate of the matrix units, row ops by bandwidth.
"""

from typing import NamedTuple

from gqa_kernels.spec import Cost

LATENCY_SECONDS = 5e-6  # below this floor, a launch costs more than the work


class Ceilings(NamedTuple):
    """The peak rates of the device, measured in the same run."""

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
