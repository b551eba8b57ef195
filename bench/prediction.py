"""What a binary lets one expect of a GPU. Predictions, every one: no figure here was measured.

Programs per SM: registers, shared memory and warps shared out, as the vendor documents.

Bytes in flight per SM: what the loads of one step of the main loop (of the whole kernel, if it has
none) ask for, times the steps that cp.async runs ahead, times programs per SM; a norm's weight is
counted, though it comes from the cache. Little's law: 4.3 TB/s at a latency of 1.0 to 1.2 µs keep
32 to 40 KB in flight on each of 132 SMs.

Ceiling of attention on sm_90, for one step of the main loop of the programs on one SM:

    tensor  = flops / 4096                                      cycles
    cycles of other instructions = max(issued · warps / 4, MUFU · warps · 2)
    step    = max(tensor, under) + exposed                      one program per SM
    step    = max(tensor, under + exposed)                      two or more
    ceiling = 790 TFLOP/s · tensor / step

where `under` counts instructions issued while a wgmma runs and `exposed` the rest. 790 is assumed
of a large bf16 product on an H200. Latencies, barriers and the traffic of K and V are left out, so
that a kernel stays below its ceiling. It ranks tiles; it promises nothing.
"""

import re

from binary import Binary, count
from capture import ARCHITECTURES, Launch

BYTES_IN_FLIGHT_NEEDED = 40 * 1024  # per SM, at 4.3 TB/s
MATMUL_TFLOPS = 790.0
_FLOPS_PER_CYCLE = 4096


def programs_per_sm(arch: str, launch: Launch, binary: Binary) -> int | None:
    """How many programs of a kernel one SM holds; None for AMD, whose registers come in blocks of
    another kind."""
    gpu = ARCHITECTURES[arch]
    if gpu.target.backend != "cuda":
        return None
    registers_per_warp = -(-binary.registers // 8) * 8 * 32
    reserved = 1024  # bytes of shared memory that each program costs besides its own
    return min(
        65536 // registers_per_warp // launch.num_warps,
        gpu.shared_per_sm // (launch.shared + reserved),
        gpu.warps_per_sm // launch.num_warps,
        gpu.programs_per_sm,
    )


def _bytes_per_thread(mix: dict[str, int], name: str) -> int:
    bits = {"8": 8, "16": 16, "32": 32, "64": 64, "128": 128, "256": 256}
    total = 0
    for opcode, n in mix.items():
        if found := re.fullmatch(rf"{name}\.[US]?(\d+)", opcode):
            total += n * bits[found[1]] // 8
    return total


def bytes_in_flight(arch: str, launch: Launch, binary: Binary) -> int | None:
    """Bytes that the programs of one SM have asked for at once; None where loads do not say."""
    resident = programs_per_sm(arch, launch, binary)
    mix = binary.loop or binary.mix
    if resident is None or count(mix, "UTMALDG"):
        return None
    ahead = max(1, launch.num_stages - 1)
    per_thread = _bytes_per_thread(mix, "LDG") + _bytes_per_thread(mix, "LDGSTS") * ahead
    return per_thread * launch.num_warps * 32 * resident


def attention_ceiling(arch: str, launch: Launch, binary: Binary) -> float | None:
    """TFLOP/s; None unless the main loop is made of wgmma."""
    flops = sum(
        n * 2 * 64 * int(columns) * 16 * launch.num_warps // 4
        for opcode, n in binary.loop.items()
        if (columns := re.sub(r"HGMMA\.64x(\d+)x16|.*", r"\1", opcode))
    )
    resident = programs_per_sm(arch, launch, binary)
    if not flops or not resident:
        return None

    def cycles(mix: dict[str, int]) -> float:
        other = sum(mix.values()) - count(mix, "HGMMA")
        return max(other * launch.num_warps / 4, count(mix, "MUFU") * launch.num_warps * 2)

    tensor = flops / _FLOPS_PER_CYCLE
    under = cycles(binary.under_wgmma)
    rest = {opcode: n - binary.under_wgmma.get(opcode, 0) for opcode, n in binary.loop.items()}
    exposed = cycles(rest)
    step = max(tensor, under) + exposed if resident == 1 else max(tensor, under + exposed)
    return MATMUL_TFLOPS * tensor / step
