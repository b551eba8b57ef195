"""Predictions of a GPU's performance from binaries. No figure of this module was measured.

Programs per SM: from registers, shared memory and warps, by the vendor's documented rules; at most
the number of programs per SM of the launch.

Bytes in flight per SM: the bytes loaded by one step of the main loop (or by the whole kernel, if it
has no loop), times the steps that cp.async runs ahead, times programs per SM. A norm's weight is
counted although it comes from the cache. By Little's law, 4.3 TB/s at a latency of 1.0 to 1.2 µs
need 32 to 40 KB in flight on each of 132 SMs.

Rate of attention on sm_90, for the programs that share one SM, in a step of the main loop:

    tensor = flops / 4096                                            cycles
    step   = max(simulated cycles, bytes loaded / 30)
    rate   = 790 TFLOP/s · tensor / step

The simulation (`simulation.py`) models latencies, and programs that hide each other's latencies.
The model assumes 30 bytes per cycle between the L2 cache and an SM, and 790 TFLOP/s for a large
bf16 product on an H200. The rate counts executed products. It omits the code before and after the
loop, masked tiles and the tail of a launch. The rates serve to rank tiles, not to predict times.
"""

import math
import re

from binary import Binary, count
from capture import ARCHITECTURES, Launch
from simulation import simulate

BYTES_IN_FLIGHT_NEEDED = 40 * 1024  # per SM, at 4.3 TB/s
MATMUL_TFLOPS = 790.0
L2_BYTES_PER_CYCLE = 30  # per SM


def programs_per_sm(arch: str, launch: Launch, binary: Binary) -> int | None:
    """How many programs of a kernel fit on one SM; None for AMD, which allocates registers by other
    rules."""
    gpu = ARCHITECTURES[arch]
    if gpu.target.backend != "cuda":
        return None
    registers_per_warp = -(-binary.registers // 8) * 8 * 32
    reserved = 1024  # bytes of shared memory reserved per program
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


def launched_per_sm(arch: str, launch: Launch, binary: Binary) -> float | None:
    """How many programs of this launch are on an SM at once, on average over the SMs."""
    fits = programs_per_sm(arch, launch, binary)
    return None if fits is None else min(fits, math.prod(launch.grid) / ARCHITECTURES[arch].num_sms)


def bytes_in_flight(arch: str, launch: Launch, binary: Binary) -> float | None:
    """The bytes in flight of the programs of one SM; None if the loads do not show it."""
    resident = launched_per_sm(arch, launch, binary)
    mix = binary.loop or binary.mix
    if resident is None or count(mix, "UTMALDG"):
        return None
    ahead = max(1, launch.num_stages - 1)
    per_thread = _bytes_per_thread(mix, "LDG") + _bytes_per_thread(mix, "LDGSTS") * ahead
    return per_thread * launch.num_warps * 32 * resident


def attention_rate(arch: str, launch: Launch, binary: Binary) -> float | None:
    """The predicted TFLOP/s; None unless the main loop uses wgmma."""
    launched = launched_per_sm(arch, launch, binary)
    if not binary.schedule or not launched:
        return None
    programs = math.ceil(launched)
    step = simulate(binary.schedule, launch.num_warps, programs)
    traffic = programs * _bytes_per_step(launch, binary) / L2_BYTES_PER_CYCLE
    return MATMUL_TFLOPS * step.tensor_cycles / max(step.cycles, traffic)


def _bytes_per_step(launch: Launch, binary: Binary) -> int:
    """The bytes that one step of the main loop loads. With tensor descriptors, these are the tiles
    that one warpgroup reads from shared memory, each counted once."""
    copied = _bytes_per_thread(binary.loop, "LDGSTS") * launch.num_warps * 32
    if copied or not count(binary.loop, "UTMALDG"):
        return copied
    return sum(
        n * int(found[1]) * 16 * 2
        for opcode, n in binary.loop.items()
        if (found := re.fullmatch(r"HGMMA\.64x(\d+)x16", opcode))
    )
