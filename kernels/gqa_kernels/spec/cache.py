"""Rows of the table: ops on a key/value cache."""

import math
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import fused, reference
from gqa_kernels.spec.attention import score_inputs
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec

# --- Decode attention ------------------------------------------------------------------------


def decode_lengths(case: Case) -> list[int]:
    """Lengths between the longest and an eighth of it; all the longest if the case is not
    ragged."""
    batch, capacity = case.sizes["batch"], case.sizes["max_seq_len"]
    spread = capacity * 7 if case.sizes.get("ragged", True) else 0
    return [capacity - i * spread // (8 * batch) for i in range(batch)]


def quantized(x: Tensor, dtype: torch.dtype, *, per_token: bool) -> tuple[Tensor, Tensor]:
    """Quantises `[…, num_kv_heads, head_dim]` to (stored, scale); the largest feature becomes the
    dtype's largest value."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    features = x.float().abs().amax(-1)
    if not per_token:
        features = features.flatten(0, -2).amax(0)
    scale = features / largest
    stored = x.float() / scale[..., None]
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


def _spoil(x: Tensor) -> None:
    """Fills x with values that must never be read: NaN, or the extreme int8."""
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(0x7F)
    else:
        x.fill_(math.nan if x.is_floating_point() else -128)


def _paged(x: Tensor, block_table: Tensor, num_pages: int) -> Tensor:
    """Distributes `[batch, max_seq_len, …]` over pages; pages that no sequence owns are spoilt."""
    rows = x.unflatten(1, (block_table.shape[1], -1)).flatten(0, 1)
    pages = rows.new_empty(num_pages, *rows.shape[1:])
    _spoil(pages)
    raw = torch.uint8 if x.element_size() == 1 else x.dtype  # indexing does not support float8
    pages.view(raw)[block_table.flatten().long()] = rows.view(raw)
    return pages


def cache_inputs(
    draw: Draw, sizes: dict[str, Any], lengths: list[int], capacity: int, *, spoil: bool = True
) -> dict[str, Any]:
    """Returns seq_lens and caches of these lengths: contiguous, or in shuffled pages of
    `page_size`; in the dtype drawn, or quantised to `cache_dtype` with scales per token or, with
    `scale_per_head`, per head.

    spoil: fill entries beyond the lengths with NaN, and those of the block table with pages that do
        not exist.
    """
    batch, device, generator = len(lengths), draw.device, draw.generator
    cache_shape = (batch, capacity, sizes["num_kv_heads"], sizes["head_dim"])
    caches = {"k_cache": draw(*cache_shape), "v_cache": draw(*cache_shape)}
    if "cache_dtype" in sizes:
        per_token = not sizes.get("scale_per_head", False)
        for side in "kv":
            caches[f"{side}_cache"], caches[f"{side}_scale"] = quantized(
                caches[f"{side}_cache"], sizes["cache_dtype"], per_token=per_token
            )
    per_slot = [name for name, x in caches.items() if x.dim() > 1]
    for name in per_slot if spoil else ():
        for row, length in zip(caches[name], lengths, strict=True):
            _spoil(row[length:])
    if "page_size" in sizes:
        max_pages = capacity // sizes["page_size"]
        num_pages = batch * max_pages + 2
        order = torch.randperm(num_pages, generator=generator, device=generator.device)
        block_table = order[: batch * max_pages].view(batch, max_pages).to(device, torch.int32)
        for name in per_slot:
            caches[name] = _paged(caches[name], block_table, num_pages)
        for row, length in zip(block_table, lengths, strict=True):
            if spoil:
                row[-(-length // sizes["page_size"]) :] = 1 << 30
        caches["block_table"] = block_table
    return {"seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device), **caches}


def decode_inputs(case: Case, *context: Any, spoil: bool = True) -> dict[str, Any]:
    """`cache_inputs` with `decode_lengths`, and the new tokens' queries."""
    draw, sizes = Draw(case, *context), case.sizes
    lengths = decode_lengths(case)
    caches = cache_inputs(draw, sizes, lengths, sizes["max_seq_len"], spoil=spoil)
    return {
        "q": draw(sizes["batch"], sizes["seq_len_q"], sizes["num_q_heads"], sizes["head_dim"]),
        **caches,
        **score_inputs(case, draw),
    }


def _decode_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads every valid cache entry within the window, its scale and its page's number once; two
    products of 2 · head_dim flops per query and key, as if all new tokens saw all keys."""
    sizes, lengths = case.sizes, decode_lengths(case)
    left, _ = sizes.get("window", (None, None))
    if left is not None:
        lengths = [min(length, left + sizes["seq_len_q"]) for length in lengths]
    head_dim, keys = sizes["head_dim"], sum(lengths)
    queries = sizes["batch"] * sizes["seq_len_q"] * sizes["num_q_heads"]
    entry = head_dim * sizes.get("cache_dtype", dtype).itemsize
    if "cache_dtype" in sizes and not sizes.get("scale_per_head"):
        entry += 4
    pages = sum(-(-n // sizes["page_size"]) for n in lengths) if "page_size" in sizes else 0
    return Cost(
        queries * head_dim * dtype.itemsize + 2 * keys * sizes["num_kv_heads"] * entry + 4 * pages,
        queries * head_dim * dtype.itemsize,
        4 * sizes["seq_len_q"] * sizes["num_q_heads"] * head_dim * keys,
    )


def _decode_case(
    batch: int,
    seq_len_q: int,
    max_seq_len: int,
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    test: bool = False,
    **cache: Any,
) -> Case:
    sizes = {
        "batch": batch,
        "seq_len_q": seq_len_q,
        "max_seq_len": max_seq_len,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        **cache,
    }
    return Case(sizes, source, test)


_DECODE_CASES = (
    _decode_case(3, 1, 70, (4, 4), 64, "MHA, one chunk", test=True),
    _decode_case(2, 1, 600, (8, 1), 128, "MQA 8, three chunks", test=True),
    _decode_case(2, 3, 520, (6, 2), 80, "GQA 3, three new tokens", test=True),
    _decode_case(1, 16, 300, (5, 1), 96, "MQA 5, sixteen new tokens in two blocks", test=True),
    _decode_case(2, 2, 257, (7, 7), 8, "the narrowest head, one key in the last chunk", test=True),
    _decode_case(2, 1, 304, (6, 2), 64, "GQA 3, small pages", page_size=8, test=True),
    _decode_case(2, 2, 384, (4, 1), 32, "MQA 4, a page of tiles", page_size=128, test=True),
    *(
        _decode_case(2, 1, 272, (4, 2), 64, source, test=True, cache_dtype=dtype, **cache)
        for dtype in (torch.float8_e4m3fn, torch.int8)
        for source, cache in (
            ("GQA 2, a scale per head", {"scale_per_head": True}),
            ("GQA 2, a scale per token, pages", {"page_size": 16}),
        )
    ),
    _decode_case(
        *(2, 3, 700, (4, 2), 32, "Gemma 2's window and cap"),
        **{"test": True, "window": (300, None), "softcap": 5.0},
    ),
    _decode_case(
        *(2, 1, 600, (8, 1), 16, "gpt-oss's window and sinks, pages"),
        **{"test": True, "window": (127, None), "sinks": True, "page_size": 8},
    ),
    _decode_case(
        *(2, 2, 300, (4, 2), 32, "ALiBi and a cap, 8 bits"),
        **{"test": True, "alibi": True, "softcap": 5.0, "cache_dtype": torch.int8},
    ),
    _decode_case(
        *(2, 5, 300, (4, 2), 16, "a window to both sides, sinks"),
        **{"test": True, "causal": False, "window": (9, 3), "sinks": True},
    ),
    _decode_case(2, 3, 70, (6, 2), 59, "FlashAttention's test of odd widths", test=True),
    *(
        _decode_case(batch, 1, context, heads, 128, source)
        for source, heads in (("7B", (32, 32)), ("13B", (40, 40)), ("34B and 70B", (64, 8)))
        for batch, context in ((1, 1024), (1, 32768), (64, 4096))
    ),
)


# --- RoPE into a cache -----------------------------------------------------------------------


def _append_inputs(case: Case, *context: Any) -> dict[str, Any]:
    """Shuffled slots of a paged cache with room for twice the tokens; q, k and v are views of a
    fused projection. Scales are per head if sizes say so, otherwise per token."""
    draw, sizes = Draw(case, *context), case.sizes
    tokens = (sizes["batch"], sizes["seq_len"])
    heads = (sizes["num_q_heads"], sizes["num_kv_heads"], sizes["num_kv_heads"])
    num_tokens, head_dim = math.prod(tokens), sizes["head_dim"]
    num_pages = -(-2 * num_tokens // sizes["page_size"])
    q, k, v = draw(*tokens, sum(heads), head_dim).split(heads, dim=2)
    cache_shape = (num_pages, sizes["page_size"], sizes["num_kv_heads"], head_dim)
    cache_dtype = sizes.get("cache_dtype", draw.dtype)
    k_cache, v_cache = (draw(*cache_shape, dtype=cache_dtype) for _ in range(2))
    angles = draw(2 * tokens[1], head_dim // 2, dtype=torch.float32)
    shuffled = torch.randperm(2 * num_tokens, generator=draw.generator, device="cpu")
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.arange(tokens[1], device=draw.device).expand(tokens),
        "slots": shuffled[:num_tokens].view(tokens).to(draw.device),
        "interleaved": sizes["interleaved"],
    }
    if "cache_dtype" in sizes:
        per_head = sizes.get("scale_per_head", False)
        scale_shape = cache_shape[2:3] if per_head else cache_shape[:3]
        for name in ("k_scale", "v_scale"):
            inputs[name] = draw(*scale_shape, dtype=torch.float32).abs()
    return inputs


def _append_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads q, k, v, cos, sin, positions and slots, writes the rotated q and k and the cache's k
    and v; six flops per rotated pair."""
    sizes = case.sizes
    num_tokens = sizes["batch"] * sizes["seq_len"]
    q_size = sizes["num_q_heads"] * sizes["head_dim"]
    k_size = sizes["num_kv_heads"] * sizes["head_dim"]
    stored = 2 * k_size * sizes.get("cache_dtype", dtype).itemsize
    if "cache_dtype" in sizes and not sizes.get("scale_per_head"):
        stored += 2 * sizes["num_kv_heads"] * 4
    return Cost(
        num_tokens * ((q_size + 2 * k_size) * dtype.itemsize + 4 * sizes["head_dim"] + 16),
        num_tokens * ((q_size + k_size) * dtype.itemsize + stored),
        3 * num_tokens * (q_size + k_size),
    )


def _append_case(
    batch: int,
    seq_len: int,
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    test: bool = False,
    **cache: Any,
) -> Case:
    sizes = {
        "batch": batch,
        "seq_len": seq_len,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "page_size": 16,
        "interleaved": False,
    }
    return Case(sizes | cache, source, test)


_APPEND_CASES = (
    _append_case(2, 3, (6, 2), 40, "GQA 3, a head that no power of two fits", test=True),
    *(
        _append_case(batch, seq_len, heads, 128, source)
        for source, heads in (("7B", (32, 32)), ("13B", (40, 40)), ("34B and 70B", (64, 8)))
        for batch, seq_len in ((1, 1), (64, 1), (1, 4096))
    ),
)


_TINY_HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}

OPS = (
    OpSpec(
        "decode_attention",
        reference.decode_attention,
        fused.decode_attention,
        _DECODE_CASES,
        decode_inputs,
        _decode_cost,
        {**_TINY_HEADS, "batch": 2, "seq_len_q": 1, "max_seq_len": 20},
    ),
)

IN_PLACE_OPS = (
    OpSpec(
        "rope_append_kv",
        reference.rope_append_kv,
        fused.rope_append_kv,
        _APPEND_CASES,
        _append_inputs,
        _append_cost,
        {**_TINY_HEADS, "batch": 2, "seq_len": 3, "page_size": 4, "interleaved": False},
    ),
)
