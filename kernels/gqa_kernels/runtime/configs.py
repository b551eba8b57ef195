"""Launch configurations: tile sizes, warps and stages.

The first row of a table that covers the size applies. Rows marked "compiled" were chosen from
compiled code (registers, spills, width of accesses) and have not been measured on a GPU.
"""

from typing import NamedTuple

import triton


class RowConfig(NamedTuple):
    max_width: int
    num_warps: int
    programs_per_sm: int = 0  # persistent kernels only


def row_config(table: tuple[RowConfig, ...], width: int) -> RowConfig:
    for row in table:
        if width <= row.max_width:
            return row
    raise ValueError(f"width: expected at most {table[-1].max_width}; got {width}")


# 40 float32 per thread: 5120 is 4 warps × 32 lanes × 5 loads of 16 bytes, so no lane is idle.
NORM_FORWARD = (  # compiled, sm_90
    RowConfig(max_width=1280, num_warps=1),
    RowConfig(max_width=2560, num_warps=2),
    RowConfig(max_width=5120, num_warps=4),
    RowConfig(max_width=10240, num_warps=8),
    RowConfig(max_width=16384, num_warps=16),
)

# Half as many per thread: x, dy and the partial weight gradient are live together.
NORM_BACKWARD = (  # compiled, sm_90
    RowConfig(max_width=1280, num_warps=2, programs_per_sm=8),
    RowConfig(max_width=2560, num_warps=4, programs_per_sm=4),
    RowConfig(max_width=5120, num_warps=8, programs_per_sm=2),
    RowConfig(max_width=10240, num_warps=16, programs_per_sm=1),
    RowConfig(max_width=16384, num_warps=32, programs_per_sm=1),
)

# On an H200, the partial sums of the weight gradient have 264 rows at a width of 5120. Two or more
# programs per SM load them in one step; a loop over fewer rows per step would wait at each step.
NORM_SUM_ROWS = 512  # compiled, sm_90
NORM_SUM_COLUMNS = 16
NORM_SUM_NUM_WARPS = 8

NORM_MAX_WIDTH = NORM_FORWARD[-1].max_width

# Two loads of 16 bytes per thread and operand, 16 programs per SM.
SWIGLU_BLOCK = 1024  # compiled, sm_90
SWIGLU_NUM_WARPS = 4

# Per thread, two loads of 16 bytes of each float32 tensor, one of each 16-bit tensor.
ADAMW_BLOCK = 1024  # compiled, sm_90
ADAMW_NUM_WARPS = 4


class AttentionConfig(NamedTuple):
    arch: str  # a prefix; "" covers every architecture
    element_size: int
    max_head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ahead: bool = True  # forward: the next tile's product is issued before this tile's softmax
    apart: bool = True  # dkdv: a separate loop for tiles that need no mask
    max_registers: int | None = None  # per thread; NVIDIA only


ATTENTION_FORWARD = (
    # Small tiles, so that tests cross tile borders with few keys; both loops, as on sm_90.
    AttentionConfig(
        "interpreter", 2, 64, block_m=32, block_n=16, num_warps=4, num_stages=2, ahead=False
    ),
    AttentionConfig("interpreter", 2, 256, block_m=32, block_n=16, num_warps=4, num_stages=2),
    AttentionConfig("interpreter", 4, 256, block_m=32, block_n=16, num_warps=4, num_stages=2),
    # Compiled, sm_90: with one live tile of scores, two programs share an SM, and the softmax of
    # one overlaps the products of the other. Without max_registers, ptxas would use too many
    # registers for that if packed sequences save a residue; two stages spill with a key mask.
    AttentionConfig(
        "sm_90",
        2,
        64,
        block_m=128,
        block_n=64,
        num_warps=8,
        num_stages=3,
        ahead=False,
        max_registers=128,
    ),
    # Compiled, sm_90: the softmax overlaps the product of the next tile. Two stages have two spill
    # instructions at head_dim 192.
    AttentionConfig("sm_90", 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=2),
    AttentionConfig("sm_90", 2, 256, block_m=128, block_n=32, num_warps=8, num_stages=3),
    # Compiled, sm_100: tcgen05 needs 64 rows or more.
    AttentionConfig("sm_100", 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=2),
    AttentionConfig("sm_100", 2, 256, block_m=64, block_n=64, num_warps=8, num_stages=1),
    # Compiled, gfx942: a soft cap spills with 128 rows.
    AttentionConfig("gfx", 2, 128, block_m=64, block_n=32, num_warps=8, num_stages=2),
    # Compiled, all other targets: the largest tiles that fit the registers and shared memory of
    # all.
    AttentionConfig("", 2, 64, block_m=128, block_n=64, num_warps=8, num_stages=2),
    # Compiled, sm_120: a padded head spills with 128 rows.
    AttentionConfig("", 2, 120, block_m=64, block_n=32, num_warps=8, num_stages=2),
    AttentionConfig("", 2, 128, block_m=128, block_n=32, num_warps=8, num_stages=2),
    AttentionConfig("", 2, 256, block_m=32, block_n=32, num_warps=8, num_stages=2),
    # float32 products run outside the tensor cores, with a whole row of operands in registers; at
    # head_dim 256 every tile size spills.
    AttentionConfig("", 4, 64, block_m=32, block_n=32, num_warps=8, num_stages=1),
    AttentionConfig("", 4, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
)


# A program keeps block_n keys and values and loops over queries, block_m at a time.
ATTENTION_DKDV = (
    AttentionConfig("interpreter", 2, 256, block_m=16, block_n=32, num_warps=4, num_stages=2),
    AttentionConfig("interpreter", 4, 256, block_m=16, block_n=32, num_warps=4, num_stages=2),
    # Compiled, sm_90: the largest tiles that do not spill. A padded head needs more registers; the
    # widest heads leave none for a second loop.
    AttentionConfig("sm_90", 2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2),
    AttentionConfig("sm_90", 2, 120, block_m=32, block_n=128, num_warps=8, num_stages=2),
    AttentionConfig("sm_90", 2, 128, block_m=64, block_n=128, num_warps=8, num_stages=2),
    AttentionConfig(
        "sm_90", 2, 256, block_m=32, block_n=64, num_warps=8, num_stages=2, apart=False
    ),
    # Compiled, sm_100: ptxas limits this kernel to 96 registers, and a second loop spills one.
    AttentionConfig(
        "sm_100", 2, 64, block_m=32, block_n=64, num_warps=4, num_stages=2, apart=False
    ),
    # Compiled, gfx942.
    AttentionConfig("gfx", 2, 128, block_m=32, block_n=32, num_warps=4, num_stages=1),
    AttentionConfig("gfx", 2, 256, block_m=16, block_n=32, num_warps=4, num_stages=1),
    # Compiled, every other target.
    AttentionConfig("", 2, 64, block_m=32, block_n=64, num_warps=4, num_stages=2),
    AttentionConfig("", 2, 128, block_m=32, block_n=64, num_warps=8, num_stages=2),
    AttentionConfig("", 2, 256, block_m=32, block_n=32, num_warps=8, num_stages=1),
    AttentionConfig("", 4, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
)

# A soft cap needs a second live tile of scores, and packed sequences more offsets; with either,
# heads of more than 64 features get smaller tiles.
ATTENTION_DKDV_SMALL = (
    AttentionConfig("sm_90", 2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2),
    AttentionConfig("sm_90", 2, 128, block_m=32, block_n=128, num_warps=8, num_stages=2),
    *ATTENTION_DKDV,
)

# A program keeps block_m queries and loops over keys and values, block_n at a time.
ATTENTION_DQ = (
    AttentionConfig("interpreter", 2, 256, block_m=32, block_n=16, num_warps=4, num_stages=2),
    AttentionConfig("interpreter", 4, 256, block_m=32, block_n=16, num_warps=4, num_stages=2),
    # Compiled, sm_90: small enough for two programs per SM.
    AttentionConfig("sm_90", 2, 64, block_m=128, block_n=32, num_warps=8, num_stages=3),
    # Compiled, sm_90: no spills, and nearly every exponential overlaps a product.
    AttentionConfig("sm_90", 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=2),
    AttentionConfig("sm_90", 2, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    # Compiled, gfx942.
    AttentionConfig("gfx", 2, 256, block_m=32, block_n=16, num_warps=4, num_stages=1),
    # Compiled, every other target.
    AttentionConfig("", 2, 64, block_m=64, block_n=64, num_warps=4, num_stages=2),
    AttentionConfig("", 2, 128, block_m=64, block_n=32, num_warps=8, num_stages=2),
    AttentionConfig("", 2, 256, block_m=32, block_n=32, num_warps=8, num_stages=1),
    AttentionConfig("", 4, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
)

# Memory-bound, like the row kernels.
ATTENTION_PREPARE_BLOCK = 64
ATTENTION_PREPARE_NUM_WARPS = 4
ATTENTION_RANGES_BLOCK = 256  # ranges that a program reads at a time to find the queries it needs


def attention_config(
    table: tuple[AttentionConfig, ...], arch: str, element_size: int, head_dim: int
) -> AttentionConfig:
    for row in table:
        if (
            head_dim <= row.max_head_dim
            and element_size == row.element_size
            and arch.startswith(row.arch)
        ):
            return row
    raise ValueError(f"head_dim: expected at most {table[-1].max_head_dim}; got {head_dim}")


# Bytes that the programs of a section of heads read over and over (`ops/attention/sequences.py`):
# about half of the L2 cache or two thirds, by its size in the vendor's documents. Not measured.
ATTENTION_SECTION_BYTES = {
    "interpreter": 4 << 10,  # so that tests cross the borders of sections with small inputs
    "sm_80": 20 << 20,  # of 40 MB
    "sm_90": 32 << 20,  # of 50 MB
    "sm_100": 64 << 20,  # of 126 MB
}
_LEAST_SECTION_BYTES = 4 << 20  # small GPUs of an architecture have 4 to 6 MB


def section_bytes(arch: str) -> int:
    return ATTENTION_SECTION_BYTES.get(arch, _LEAST_SECTION_BYTES)


# Split-KV: a sequence is split into chunks of the smallest multiple of DECODE_CHUNK keys that gives
# at most DECODE_MAX_SPLITS splits. This depends on its length alone, so its bits do not depend on
# the batch. More splits use more SMs at batch 1, but the program that combines them has more to do.
DECODE_CHUNK = 256
DECODE_MAX_SPLITS = 64
# Programs per SM if there are enough splits: enough to balance ragged batches, and few enough that
# the programs of short sequences that find no split cost next to nothing.
DECODE_PROGRAMS_PER_SM = 64
# A step of the combination processes this many splits of as many queries as give this many
# features. Compiled, sm_90: twice as much would need more registers in every program, and one
# program less would fit an SM.
DECODE_COMBINE_SPLITS = 8
DECODE_COMBINE_FEATURES = 512
DECODE_NUM_WARPS = 4
# Rows of the tile for a single row, one new token of MHA: 1 multiplies vectors, 16 pads a matrix
# tile. In compiled code the padded tile issues fewer instructions; in a public measurement of
# another kernel, vectors were faster by a tenth. Not yet measured on a GPU.
DECODE_LONE_ROW = 16


class DecodeConfig(NamedTuple):
    element_size: int  # of the cache
    max_head_dim: int
    max_block_m: int
    block_n: int
    num_stages: int


DECODE_TILES = (
    # Compiled, all targets: no spills, and on sm_90 at least 64 KB in flight per SM, where Little's
    # law requires 40. The dequantised cache is in registers.
    DecodeConfig(1, 128, max_block_m=32, block_n=32, num_stages=5),
    DecodeConfig(1, 256, max_block_m=16, block_n=32, num_stages=5),
    DecodeConfig(2, 128, max_block_m=64, block_n=64, num_stages=2),
    DecodeConfig(2, 256, max_block_m=32, block_n=32, num_stages=3),
    # Compiled, sm_90: more rows or keys in float32, outside the tensor cores, spill.
    DecodeConfig(4, 256, max_block_m=16, block_n=16, num_stages=2),
)


def decode_config(element_size: int, head_dim: int) -> DecodeConfig:
    return next(
        row
        for row in DECODE_TILES
        if element_size == row.element_size and head_dim <= row.max_head_dim
    )


# The keys of sequences with at most this many new tokens are split among programs. More tokens have
# blocks of rows enough to fill a GPU, and partial results would take memory and time.
PREFILL_SPLIT_TOKENS = 64
# Programs per SM that share these sequences' splits, of which some find none.
PREFILL_PROGRAMS_PER_SM = 8
# A step of the combination processes this many splits of as many queries as give this many
# features, and this many lse.
PREFILL_COMBINE_SPLITS = 8
PREFILL_COMBINE_FEATURES = 512
PREFILL_COMBINE_LSE = 16


class PrefillConfig(NamedTuple):
    arch: str  # a prefix; "" covers every architecture
    element_size: int  # of the queries
    cache_element_size: int
    max_head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # A tile of keys takes about a microsecond (a prediction), a launch some more: a split of 2048
    # keys is neither the longest part of a launch nor too short for its combination.
    split_keys: int = 2048


PREFILL = (
    # Small tiles, and splits, so that tests cross their borders with few keys.
    *(
        PrefillConfig("interpreter", *sizes, 256, 32, 16, num_warps=4, num_stages=2, split_keys=32)
        for sizes in ((2, 2), (2, 1), (4, 4), (4, 1))
    ),
    *(
        # Under Triton 3.6, larger tiles over pages of 16 keys need more registers than there are,
        # and ptxas serialises their products. Contiguous caches have the same tiles, and so the
        # same bits.
        (
            PrefillConfig("sm_90", 2, 2, 64, block_m=128, block_n=64, num_warps=8, num_stages=3),
            PrefillConfig("sm_90", 2, 2, 128, block_m=128, block_n=32, num_warps=8, num_stages=2),
            PrefillConfig("sm_90", 2, 2, 256, block_m=64, block_n=16, num_warps=8, num_stages=2),
            PrefillConfig("sm_90", 2, 1, 128, block_m=64, block_n=32, num_warps=8, num_stages=2),
        )
        if triton.__version__.startswith("3.6.")
        else ()
    ),
    # Compiled: the largest tiles that do not spill with any option. wgmma and tcgen05 need 64 rows.
    # With scales per token, an 8-bit cache needs a second accumulator.
    PrefillConfig("sm_90", 2, 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=3),
    PrefillConfig("sm_90", 2, 2, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("sm_90", 2, 1, 128, block_m=128, block_n=32, num_warps=8, num_stages=3),
    PrefillConfig("sm_90", 2, 1, 256, block_m=64, block_n=16, num_warps=8, num_stages=2),
    PrefillConfig("sm_100", 2, 2, 128, block_m=128, block_n=64, num_warps=8, num_stages=2),
    PrefillConfig("sm_100", 2, 2, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("sm_100", 2, 1, 128, block_m=128, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("sm_100", 2, 1, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("gfx", 2, 2, 128, block_m=128, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("gfx", 2, 2, 256, block_m=64, block_n=32, num_warps=8, num_stages=1),
    PrefillConfig("gfx", 2, 1, 128, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("gfx", 2, 1, 256, block_m=32, block_n=32, num_warps=4, num_stages=1),
    PrefillConfig("", 2, 2, 64, block_m=128, block_n=64, num_warps=8, num_stages=2),
    PrefillConfig("", 2, 2, 256, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("", 2, 1, 128, block_m=64, block_n=32, num_warps=8, num_stages=2),
    PrefillConfig("", 2, 1, 256, block_m=32, block_n=32, num_warps=8, num_stages=2),
    # As in ATTENTION_FORWARD: float32 products run outside the tensor cores.
    PrefillConfig("", 4, 4, 64, block_m=32, block_n=32, num_warps=8, num_stages=1),
    PrefillConfig("", 4, 4, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
    PrefillConfig("", 4, 1, 256, block_m=16, block_n=16, num_warps=8, num_stages=1),
)


def prefill_config(
    arch: str, element_size: int, cache_element_size: int, head_dim: int
) -> PrefillConfig:
    return next(
        row
        for row in PREFILL
        if arch.startswith(row.arch)
        and (element_size, cache_element_size) == (row.element_size, row.cache_element_size)
        and head_dim <= row.max_head_dim
    )


class ProductConfig(NamedTuple):
    arch: str  # a prefix; "" covers every architecture
    element_size: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_rows: int = 1 << 30  # per chunk of logits

    def launch(self) -> dict[str, int]:
        """The configuration as launch arguments."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


LINEAR_CROSS_ENTROPY = (
    # Small chunks, so that tests cross chunk borders with few rows.
    ProductConfig("interpreter", 2, 32, 128, 128, num_warps=4, num_stages=2, max_rows=32),
    ProductConfig("interpreter", 4, 32, 128, 128, num_warps=4, num_stages=2, max_rows=32),
    # Compiled, sm_90: the largest tiles that do not spill.
    ProductConfig("sm_90", 2, 128, 256, 64, num_warps=8, num_stages=3),
    # Compiled, sm_100: with twice as many columns, the accumulator that is loaded first spills.
    ProductConfig("sm_100", 2, 128, 128, 64, num_warps=8, num_stages=3),
    ProductConfig("sm_120", 2, 128, 128, 32, num_warps=8, num_stages=2),
    ProductConfig("", 2, 128, 128, 32, num_warps=8, num_stages=3),
    ProductConfig("", 4, 64, 64, 16, num_warps=8, num_stages=2),
)

# The most memory for the logits of a chunk, unless one block of rows needs more; see ops/.
LINEAR_CROSS_ENTROPY_BYTES = 256 << 20
SOFTMAX_BLOCK = 4096
SOFTMAX_NUM_WARPS = 8
SCALE_BLOCK = 2048
SCALE_NUM_WARPS = 4

# The number of logits that a program reads at a time. Not yet measured on a GPU.
SAMPLING_BLOCK = 8192
SAMPLING_NUM_WARPS = 16


def linear_cross_entropy_config(arch: str, element_size: int) -> ProductConfig:
    return next(
        row
        for row in LINEAR_CROSS_ENTROPY
        if arch.startswith(row.arch) and element_size == row.element_size
    )
