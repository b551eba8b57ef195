"""How evenly the persistent forward kernel for Hopper keeps the SMs busy: a prediction.

It walks the order in which the kernel's own `block_of_step` deals blocks of queries to programs,
with the tiles that its own `key_tiles` counts, in the emulator of Gluon. The model: a step of a
program, one tile of keys, takes `step_cycles`, and every block `BLOCK_CYCLES` besides, for its
first loads and its end under the work of the next one. Nothing here was measured.
"""

import functools
import types
from collections.abc import Iterator

import hopper_forward
from balance import FORWARD, NUM_SMS, Shape, section_of
from gluon_emulator import load
from gluon_emulator.schedule import Program

BLOCK_CYCLES = 1500


@functools.cache
def _tiles() -> types.ModuleType:
    names = hopper_forward.MODULES
    last = next(index for index, name in enumerate(names) if name.endswith(".tiles"))
    return load(names[: last + 1])


def tiles_of_blocks(
    shape: Shape, block: int, tile: int, causal: bool, program: int, num_programs: int
) -> Iterator[int]:
    """The numbers of key tiles of the blocks of a program, in its order.

    Args:
        block, tile: rows of queries and of keys.
    """
    tiles, num_heads = _tiles(), shape.num_q_heads
    sizes = tiles.Sizes(
        seq_len_q=shape.seq_len,
        seq_len_kv=shape.seq_len,
        num_heads=num_heads,
        num_batch_heads=shape.batch * num_heads,
        num_row_blocks=-(-shape.seq_len // block),
        section=section_of(FORWARD, shape),
    )
    Program.running = Program(0, program, num_programs, num_warps=4)
    step = 0
    while (found := tiles.block_of_step(step, sizes, block)).exists:
        yield int(tiles.key_tiles(found.first_row, sizes, block, tile, causal)[0])
        step += 1


def useful_share(
    shape: Shape,
    block: int,
    tile: int,
    step_cycles: float,
    *,
    causal: bool = True,
    num_programs: int = NUM_SMS,
) -> float:
    """The share of the time of all programs in which visible pairs of query and key are computed:
    1 if all are busy to the end with such pairs."""
    ends = [
        sum(BLOCK_CYCLES + step_cycles * count for count in counts)
        for program in range(num_programs)
        if (counts := list(tiles_of_blocks(shape, block, tile, causal, program, num_programs)))
    ]
    pairs = shape.batch * shape.num_q_heads * shape.seq_len**2 / (2 if causal else 1)
    return pairs / (block * tile) * step_cycles / num_programs / max(ends)
