"""How evenly causal attention keeps the SMs of a GPU busy: predictions from the order of programs.

    python bench/balance.py

An SM that has nothing left to do while others work is lost. `useful_share` is the time of the
products that a causal mask asks for, divided by the time of the whole launch, on all SMs. No figure
here was measured. The model: a program takes `START_CYCLES`, for its first loads and its end, and
for each of its tiles the cycles of the products at the full rate of an SM of Hopper. A GPU starts
programs in the order of their ids, each on the first SM that is free.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FLOPS_PER_CYCLE = 4096  # of an SM
START_CYCLES = 3500
NUM_SMS = 132  # of an H200, with one program at a time, as at head_dim 128
L2_BYTES = 32 << 20  # `configs.ATTENTION_SECTION_BYTES` of sm_90


class Shape(NamedTuple):
    """Of a causal call in 16 bits, with as many keys as queries."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int = 128


class Kernel(NamedTuple):
    """A kernel whose programs own a block of rows of a head and walk the others tile by tile."""

    block: int
    tile: int
    products: int  # of a tile
    owns_keys: bool = False  # of a group of heads, and walks their queries


FORWARD = Kernel(128, 64, products=2)
DKDV = Kernel(128, 64, products=4, owns_keys=True)
DQ = Kernel(128, 64, products=3)


def num_tiles(kernel: Kernel, shape: Shape) -> list[int]:
    """The tiles that the programs of a head walk, the longest program first."""
    found = []
    for first in range(0, shape.seq_len, kernel.block):
        if kernel.owns_keys:  # queries from the first key on
            seen = -(-shape.seq_len // kernel.tile) - first // kernel.tile
            found.append(seen * (shape.num_q_heads // shape.num_kv_heads))
        else:  # keys up to the last query
            found.append(-(-min(first + kernel.block, shape.seq_len) // kernel.tile))
    return sorted(found, reverse=True)


def programs(num_blocks: int, num_heads: int, section: int) -> Iterator[tuple[int, int]]:
    """(head, block) of the programs of a launch, by id (`ops/attention/sequences.py`)."""
    for first in range(0, num_heads, section):
        heads = range(first, min(first + section, num_heads))
        yield from ((head, block) for block in range(num_blocks) for head in heads)


def duration(costs: Sequence[float], num_places: int) -> float:
    """How long programs take that start in this order, each where a place is free first."""
    ends = [0.0] * num_places
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def useful_share(kernel: Kernel, shape: Shape, section: int, num_places: int = NUM_SMS) -> float:
    """The share of the GPU's time that computes products of visible pairs of query and key.

    Args:
        section: how many heads' programs start together; 1: one head after another.
        num_places: programs that run at a time.
    """
    tiles = num_tiles(kernel, shape)
    num_heads = shape.batch * (shape.num_kv_heads if kernel.owns_keys else shape.num_q_heads)
    cycles_per_pair = kernel.products * 2 * shape.head_dim / FLOPS_PER_CYCLE
    cycles_per_tile = kernel.block * kernel.tile * cycles_per_pair
    costs = [
        START_CYCLES + tiles[block] * cycles_per_tile
        for _, block in programs(len(tiles), num_heads, section)
    ]
    pairs = shape.batch * shape.num_q_heads * shape.seq_len * (shape.seq_len + 1) / 2
    return pairs * cycles_per_pair / num_places / duration(costs, num_places)


def section_of(kernel: Kernel, shape: Shape, l2_bytes: int = L2_BYTES) -> int:
    """The section of a launch, as `ops/attention/sequences.py` chooses it."""
    groups = max(1, l2_bytes // (2 * shape.seq_len * shape.head_dim * 2))
    if kernel.owns_keys:
        return min(groups, shape.batch * shape.num_kv_heads)
    group_size = shape.num_q_heads // shape.num_kv_heads
    return min(groups * group_size, shape.batch * shape.num_q_heads)


def main() -> None:
    print("Predicted share of an H200 that computes visible products, causal, head_dim 128:")
    print("one head after another → sections of heads\n")
    print("| batch, heads | tokens | forward | dk, dv | dq |\n|---|---|---|---|---|")
    for batch, heads, kv_heads in ((1, 64, 8), (1, 32, 8), (1, 32, 32), (4, 32, 32)):
        for seq_len in (1024, 2048, 4096, 8192, 16384):
            shape = Shape(batch, heads, kv_heads, seq_len)
            cells = [
                f"{useful_share(kernel, shape, 1):.0%} → "
                f"{useful_share(kernel, shape, section_of(kernel, shape)):.0%}"
                for kernel in (FORWARD, DKDV, DQ)
            ]
            print(f"| {batch}, {heads}:{kv_heads} | {seq_len} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
