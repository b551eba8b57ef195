"""The row of the table: attention of any number of new tokens over a key/value cache."""

from typing import Any

import torch

from gqa_kernels import fused, reference
from gqa_kernels.spec.attention import packed_lengths, score_inputs, visible_pairs
from gqa_kernels.spec.cache import cache_inputs
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec


def prefill_lengths(case: Case) -> tuple[list[int], list[int]]:
    """(new tokens, tokens in the cache before them) of each sequence.

    New tokens: `packed_lengths`, or, if the case is mixed, one of each sequence but the first.
    Before them: between `cached` tokens and a fraction of as many.
    """
    sizes, count = case.sizes, case.sizes["num_sequences"]
    if sizes.get("mixed"):
        new = [sizes["total"] - count + 1] + [1] * (count - 1)
    else:
        new = packed_lengths(case)
    return new, [sizes["cached"] * (count - i) // count for i in range(count)]


def prefill_inputs(case: Case, *context: Any, spoil: bool = True) -> dict[str, Any]:
    """`cache_inputs` with `prefill_lengths`, and the new tokens' queries."""
    draw, sizes = Draw(case, *context), case.sizes
    new, cached = prefill_lengths(case)
    bounds = torch.tensor([0, *new], device="cpu").cumsum(0)
    lengths = [sum(pair) for pair in zip(new, cached, strict=True)]
    unit = sizes.get("page_size", 8)
    capacity = -(-(max(lengths) + 3) // unit) * unit
    caches = cache_inputs(draw, sizes, lengths, capacity, spoil=spoil)
    return {
        "q": draw(sizes["total"], sizes["num_q_heads"], sizes["head_dim"]),
        "cu_seqlens_q": bounds.to(draw.device, torch.int32),
        **caches,
        **score_inputs(case, draw),
    }


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads q and, once, every valid cache entry within the window of a new token of its sequence,
    its scale and its page's number; two products of 2 · head_dim flops per visible pair of query
    and key."""
    sizes, head_dim = case.sizes, case.sizes["head_dim"]
    left, _ = sizes.get("window", (None, None))
    keys = pairs = pages = 0
    for new, cached in zip(*prefill_lengths(case), strict=True):
        seen = cached + new if new else 0
        if left is not None:
            seen = min(seen, left + new)
        keys += seen
        pairs += visible_pairs(case, new, cached + new)
        pages += -(-seen // sizes["page_size"]) if "page_size" in sizes else 0
    entry = head_dim * sizes.get("cache_dtype", dtype).itemsize
    if "cache_dtype" in sizes and not sizes.get("scale_per_head"):
        entry += 4
    q_bytes = sizes["total"] * sizes["num_q_heads"] * head_dim * dtype.itemsize
    return Cost(
        q_bytes + 2 * keys * sizes["num_kv_heads"] * entry + 4 * pages,
        q_bytes,
        4 * sizes["num_q_heads"] * head_dim * pairs,
    )


def _case(
    lengths: tuple[int, int, int],
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    test: bool = False,
    **options: Any,
) -> Case:
    total, num_sequences, cached = lengths
    sizes = {
        "total": total,
        "num_sequences": num_sequences,
        "cached": cached,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "causal": True,
    }
    return Case(sizes | options, source, test)


def _tested(*arguments: Any, **options: Any) -> Case:
    return _case(*arguments, **options, test=True)


_INT8, _FLOAT8 = {"cache_dtype": torch.int8}, {"cache_dtype": torch.float8_e4m3fn}
_BOTH = {"window": (9, 3), "causal": False, "sinks": True}
_GEMMA = {"window": (30, None), "softcap": 5.0}

_CASES = (
    _tested((75, 3, 50), (6, 2), 80, "GQA 3, blocks of two sequences, one without new tokens"),
    _tested((21, 2, 70), (5, 1), 64, "MQA 5"),
    _tested((70, 1, 0), (2, 2), 128, "MHA, a whole prompt"),
    _tested((72, 5, 60), (4, 2), 16, "a chunk with decode steps", page_size=8, mixed=True),
    _tested((24, 2, 80), (4, 1), 32, "MQA 4, a page of tiles", page_size=64),
    _tested((30, 3, 40), (4, 2), 64, "GQA 2, a scale per token, pages", **_INT8, page_size=16),
    _tested((30, 3, 40), (4, 2), 64, "GQA 2, a scale per head", **_FLOAT8, scale_per_head=True),
    _tested((40, 2, 60), (4, 2), 32, "Gemma 2's window and cap", **_GEMMA),
    _tested((40, 2, 30), (8, 1), 16, "gpt-oss's sinks, pages", sinks=True, page_size=8),
    _tested((40, 2, 30), (4, 2), 8, "ALiBi, the narrowest head", alibi=True),
    _tested((40, 2, 50), (4, 2), 16, "a window to both sides, sinks", **_BOTH),
    _tested((20, 2, 30), (4, 2), 20, "a narrow head, no multiple of 8"),
    *(
        _case(lengths, heads, 128, source, **options)
        for source, heads in (("7B", (32, 32)), ("34B and 70B", (64, 8)))
        for lengths, options in (
            # The fourth chunk of a prompt, in Sarathi's size; one with 63 decode steps.
            ((2048, 1, 6144), {"page_size": 16}),
            ((2048, 64, 4096), {"page_size": 16, "mixed": True}),
            ((2048, 1, 6144), {}),
        )
    ),
)

OPS = (
    OpSpec(
        "prefill_attention",
        reference.prefill_attention,
        fused.prefill_attention,
        _CASES,
        prefill_inputs,
        _cost,
        {
            "total": 11,
            "num_sequences": 2,
            "cached": 9,
            "num_q_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "causal": True,
        },
    ),
)
