"""What a call must cost at least, on a device whose ceilings are known.

    floor = max(bytes / bandwidth, flops / matrix rate)

`bytes` and `flops` are the algorithmic minimum, from `gqa_kernels.spec`. The bandwidth is the
measured rate of a copy; where nearly all the traffic is reading, as in decoding, it is the measured
rate of reading. The rate of the matrix units bounds attention; the few flops of the row ops never
do.
"""

from typing import NamedTuple

from gqa_kernels.spec import Cost

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
