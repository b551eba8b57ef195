"""Configurations of the warp-specialised kernels in `ops/attention/hopper/`: 16 bits, sm_90.

Chosen from compiled code: with Triton 3.7, no or few accesses to local memory in the loops with
products. Registers are per thread; those of two consumers and of the copy warp, with three idle
warps beside it, are 65536 in all.
"""

from typing import NamedTuple, TypeVar


class HopperConfig(NamedTuple):
    """Of the forward kernel."""

    head_dim: int
    num_consumers: int  # groups of four warps with 64 queries each: 2 or 3
    block_n: int
    num_stages: int  # tiles of keys, and as many of values
    own_out: bool  # whether there is shared memory for out beside that of q
    consumer_registers: int = 240
    copy_registers: int = 24
    turns: bool = True  # whether the consumers take turns at issuing products
    capped_windows: bool = False  # whether there are registers for a soft cap with a window
    measured: bool = False  # on a GPU; other rows run only where a caller asks for them
    options_measured: bool = False  # likewise, with windows, a soft cap or packed sequences


HOPPER_FORWARD = (
    HopperConfig(64, 2, block_n=128, num_stages=4, own_out=True, capped_windows=True),
    HopperConfig(80, num_consumers=2, block_n=128, num_stages=4, own_out=True),
    HopperConfig(96, num_consumers=2, block_n=128, num_stages=3, own_out=True),
    HopperConfig(128, num_consumers=2, block_n=128, num_stages=2, own_out=True),
    HopperConfig(256, num_consumers=2, block_n=64, num_stages=2, own_out=False),
)


class HopperBackwardConfig(NamedTuple):
    """Of the backward kernels, which have two consumers with 64 rows each."""

    head_dim: int
    block: int  # rows that a consumer processes in a step: queries for dk and dv, keys for dq
    num_stages: int  # tiles of such rows, of either kind
    consumer_registers: int = 240
    copy_registers: int = 24
    measured: bool = False  # as in `HopperConfig`


HOPPER_BACKWARD = (
    HopperBackwardConfig(64, block=64, num_stages=4),
    HopperBackwardConfig(128, block=64, num_stages=3),
)


class SpecializedConfig(NamedTuple):
    """Of `dkdv_specialized.py`, whose warps and registers Triton divides."""

    head_dim: int
    block_m: int
    block_n: int  # 128: Triton gives each of two consumers half of it
    num_stages: int  # with 3, accesses to local memory in the loop at head_dim 128
    measured: bool = False  # as in `HopperConfig`


SPECIALIZED_DKDV = (
    SpecializedConfig(64, block_m=64, block_n=128, num_stages=2),
    SpecializedConfig(128, block_m=64, block_n=128, num_stages=2),
)

Row = TypeVar("Row", HopperConfig, HopperBackwardConfig, SpecializedConfig)


def hopper_config(
    table: tuple[Row, ...], arch: str, element_size: int, head_dim: int, unmeasured: bool
) -> Row | None:
    """The row that applies; None if there is none or, unless `unmeasured`, it was not measured."""
    if arch != "sm_90" or element_size != 2:
        return None
    row = next((row for row in table if row.head_dim == head_dim), None)
    return row if row is not None and (row.measured or unmeasured) else None
