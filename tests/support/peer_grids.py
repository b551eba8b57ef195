"""The parameters with which other libraries test their attention over key/value caches, and which
of them this package refuses.

Values and what a library's own test leaves out are those of the named test; the code is not.
"""

import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

Combination = dict[str, Any]
Rule = Callable[..., bool]  # of some parameters, by their names


class Grid(NamedTuple):
    values: dict[str, tuple]
    skipped: Rule  # left out by the library's own test
    refused: dict[str, Rule]  # by this package, and why


def _applies(rule: Rule, combination: Combination) -> bool:
    return rule(**{name: combination[name] for name in inspect.signature(rule).parameters})


def reasons(grid: Grid, combination: Combination) -> list[str]:
    """Why a combination is refused; empty for one that is accepted."""
    return [why for why, rule in grid.refused.items() if _applies(rule, combination)]


def count(grid: Grid) -> tuple[int, int]:
    """(number of combinations that the library tests, number of those that are accepted)."""
    rules = (grid.skipped, *grid.refused.values())
    read = {name for rule in rules for name in inspect.signature(rule).parameters}
    free = prod(len(values) for name, values in grid.values.items() if name not in read)
    tested = accepted = 0
    for chosen in itertools.product(*(grid.values[name] for name in sorted(read))):
        combination = dict(zip(sorted(read), chosen, strict=True))
        if not _applies(grid.skipped, combination):
            tested += free
            accepted += 0 if reasons(grid, combination) else free
    return tested, accepted


def cover(grid: Grid) -> Iterator[Combination]:
    """Yields combinations until every pair of two parameters' values that occurs in a combination
    has occurred; each is the best of a few random ones that contain a pair which has not."""
    generator, names = random.Random(0), list(grid.values)
    indices = {name: range(len(values)) for name, values in grid.values.items()}
    missing = dict.fromkeys(
        ((one, i), (other, j))
        for one, other in itertools.combinations(names, 2)
        for i, j in itertools.product(indices[one], indices[other])
    )

    def pairs(chosen: dict[str, int]) -> set:
        return set(itertools.combinations(chosen.items(), 2)) & missing.keys()

    def combination(chosen: dict[str, int]) -> Combination:
        return {name: grid.values[name][i] for name, i in chosen.items()}

    while missing:
        pair = next(iter(missing))
        drawn = [
            {name: generator.choice(indices[name]) for name in names} | dict(pair)
            for _ in range(20)
        ]
        valid = [x for x in drawn if not _applies(grid.skipped, combination(x))]
        if not valid:  # the library leaves the pair out
            del missing[pair]
            continue
        best = max(valid, key=lambda chosen: len(pairs(chosen)))
        for found in pairs(best):
            del missing[found]
        yield combination(best)


def _never(**_: Any) -> bool:
    return False


_never.__signature__ = inspect.Signature()


def _flash_attn_skips(
    seqlens: tuple[int, int], new_kv: bool, rotary_fraction: float, has_batch_idx: bool,
    has_leftpad: bool, paged_kv_block_size: int | None,
) -> bool:  # fmt: skip
    paged = paged_kv_block_size is not None
    return (
        (new_kv and seqlens[0] > seqlens[1])
        or (rotary_fraction > 0.0 and not new_kv)
        or (paged and (has_batch_idx or has_leftpad))
    )


_BOTH = (False, True)
_MIXED = ((1, 1328), (5, 18), (129, 463))  # (queries, keys) of each sequence
_DECODE = ((1, 523), (1, 37), (1, 2011))
_FLOAT8 = "float8_e4m3fn"

ROPE = {"RoPE inside attention": lambda pos_encoding_mode: pos_encoding_mode != "NONE"}
QUERIES = {"8-bit queries": lambda q_dtype: q_dtype is not None}

GRIDS = {
    # Dao-AILab/flash-attention v2.8.3, tests/test_flash_attn.py, with the dtype and the indices
    # that are comments there.
    "flash-attn `test_flash_attn_kvcache`": Grid(
        {
            "dtype": ("float16", "bfloat16"),
            "num_splits": (1, 0),
            "nheads_k": (6, 1, 3),
            "new_kv": _BOTH,
            "alibi": _BOTH,
            "local": _BOTH,
            "causal": _BOTH,
            "seqlen_new_eq_seqlen_q": _BOTH,
            "rotary_interleaved": _BOTH,
            "rotary_fraction": (0.0, 0.5, 1.0),
            "paged_kv_block_size": (None, 256),
            "has_leftpad": _BOTH,
            "has_batch_idx": _BOTH,
            "d": (32, 59, 64, 80, 128, 256),
            "seqlens": (
                *((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048)),
                *((16, 20000), (1, 131072), (16, 131072), (128, 128)),
            ),
        },
        _flash_attn_skips,
        {},
    ),
    # flashinfer-ai/flashinfer, tests/attention/test_batch_decode_kernels.py, with the layouts that
    # the test's helper takes.
    "FlashInfer `test_batch_decode_with_paged_kv_cache`": Grid(
        {
            "dtype": ("float16",),
            "batch_size": (12, 17, 128),
            "kv_len": (54, 97, 512, 2048, 16384),
            "page_size": (1, 8, 16),
            "num_heads": ((4, 4), (32, 4)),
            "head_dim": (128, 256, 512),
            "kv_layout": ("NHD", "HND"),
            "pos_encoding_mode": ("NONE", "ROPE_LLAMA"),
            "kv_dtype": ("float16", _FLOAT8),
            "contiguous_kv": _BOTH,
        },
        _never,
        {"head_dim above 256": lambda head_dim: head_dim > 256, **ROPE},
    ),
    # tests/attention/test_batch_prefill_kernels.py: this test, that of tuples and that of masks.
    "FlashInfer `test_batch_prefill_with_paged_kv_cache`": Grid(
        {
            "dtype": ("float16",),
            "batch_size": (12, 17, 128),
            "kv_len": (54, 97, 512, 2048),
            "qo_len": (37, 17, 127, 577),
            "page_size": (1, 5, 16),
            "num_heads": ((32, 32), (4, 4), (32, 4)),
            "head_dim": (128, 256),
            "mask": ("none", "causal", "custom"),
            "kv_layout": ("NHD", "HND"),
            "pos_encoding_mode": ("NONE", "ROPE_LLAMA"),
            "contiguous_kv": _BOTH,
        },
        lambda qo_len, kv_len, mask: qo_len > kv_len and mask != "none",
        {"masks of pairs": lambda mask: mask == "custom", **ROPE},
    ),
    # vllm-project/vllm, tests/kernels/attention/test_flash_attn.py.
    "vLLM `test_varlen_with_paged_kv`": Grid(
        {
            "dtype": ("bfloat16",),
            "use_out": _BOTH,
            "seq_lens": (_MIXED, _DECODE),
            "num_heads": ((4, 4), (8, 2)),
            "head_dim": (40, 72, 80, 128, 256),
            "page_size": (16,),
            "sliding_window": (None, 256),
            "soft_cap": (None, 50.0),
            "num_blocks": (32768, 2048),
            "fa_version": (2, 3),
            "q_dtype": (None, _FLOAT8),
        },
        lambda q_dtype, fa_version: q_dtype is not None and fa_version == 2,
        {"an output to write to": lambda use_out: use_out, **QUERIES},
    ),
    # tests/kernels/attention/test_triton_unified_attention.py.
    "vLLM `test_triton_unified_attn`": Grid(
        {
            "dtype": ("bfloat16",),
            "seq_lens": (_MIXED, _DECODE),
            "num_heads": ((4, 4), (8, 2), (5, 1)),
            "head_dim": (128, 256),
            "page_size": (16,),
            "sliding_window": (None, 64, 128, 256),
            "soft_cap": (None, 50.0),
            "num_blocks": (32768, 2048),
            "q_dtype": (None, _FLOAT8),
            "seq_threshold_3D": (0, 8),
        },
        _never,
        QUERIES,
    ),
    "vLLM `test_triton_unified_attn_bf16_query_fp8_kv`": Grid(
        {
            "dtype": ("bfloat16",),
            "seq_lens": (_MIXED, _DECODE),
            "num_heads": ((4, 4), (8, 2), (5, 1)),
            "head_dim": (128, 256),
            "page_size": (16,),
            "num_blocks": (32768, 2048),
            "kv_dtype": (_FLOAT8,),
            "seq_threshold_3D": (0, 8),
        },
        _never,
        {},
    ),
    "vLLM `test_triton_unified_attn_nvfp4_kv`": Grid(
        {
            "dtype": ("bfloat16",),
            "head_dim": (64, 128, 192, 256, 320, 384, 448, 512),
            "kv_dtype": ("uint8",),  # two numbers to a byte
            "seq_threshold_3D": (0, 8),
        },
        _never,
        {"4-bit caches": lambda kv_dtype: kv_dtype == "uint8"},
    ),
    # tests/kernels/attention/test_prefix_prefill.py: with a window and with ALiBi.
    "vLLM `test_contexted_kv_attention`": Grid(
        {
            "dtype": ("float16",),
            "num_heads": ((64, 64), (64, 1)),
            "head_dim": (24, 128),
            "kv_dtype": ("float16", _FLOAT8, "float8_e5m2"),
            "sliding_window": (0, 16, 2048),
            "alibi": _BOTH,
            "op": ("chunked_prefill_paged_decode", "context_attention_fwd"),
        },
        lambda alibi, sliding_window: alibi and sliding_window > 0,
        {"float8_e5m2 caches": lambda kv_dtype: kv_dtype == "float8_e5m2"},
    ),
}
