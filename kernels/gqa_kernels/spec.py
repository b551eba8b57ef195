"""The op table: what tests, compile checks, benchmarks and the demo iterate over.

Data and ordinary functions; what is peculiar to one op is an ordinary test of that op.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from gqa_kernels import fused, reference


class Cost(NamedTuple):
    """The algorithmic minimum of a forward pass."""

    read_bytes: int
    write_bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One shape of an op and where it comes from. `test`: small enough for the interpreter."""

    sizes: dict[str, Any]
    source: str
    test: bool = False

    def __str__(self) -> str:
        return "-".join(f"{name}={size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class OpSpec:
    name: str
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    cost: Callable[[Case, torch.dtype], Cost]
    wrt: tuple[str, ...]  # the arguments with gradients

    def test_cases(self) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.test)


def standard_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal float32 numbers on the generator's device; from one of the CPU, the same on
    every machine, which those of torch.randn are not."""
    if generator.device.type != "cpu":
        return torch.randn(shape, generator=generator, device=generator.device)
    (seed,) = torch.randint(2**62, (1,), generator=generator, device="cpu").tolist()
    drawn = numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)
    return torch.empty(shape, dtype=torch.float32, device="cpu").copy_(torch.from_numpy(drawn))


class _Draw:
    """Standard normal tensors of one dtype and device from one generator."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.dtype, self.device, self.generator = dtype, device, generator

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return standard_normal(shape, self.generator).to(self.device, dtype or self.dtype)


# --- RMSNorm ---------------------------------------------------------------------------------


def _norm_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = _Draw(*context), case.sizes
    return {
        "x": draw(sizes["num_tokens"], sizes["hidden_size"]),
        "weight": draw(sizes["hidden_size"]),
    }


def _add_norm_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = _Draw(*context), case.sizes
    return {
        "x": draw(sizes["num_tokens"], sizes["hidden_size"]),
        "residual": draw(sizes["num_tokens"], sizes["hidden_size"]),
        "weight": draw(sizes["hidden_size"]),
    }


def _norm_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads x and weight, writes y; a square, an add, and two products per element."""
    tokens, width = case.sizes["num_tokens"], case.sizes["hidden_size"]
    return Cost(
        (tokens + 1) * width * dtype.itemsize, tokens * width * dtype.itemsize, 4 * tokens * width
    )


def _add_norm_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads x, residual and weight, writes y and h; one add more than the norm."""
    tokens, width = case.sizes["num_tokens"], case.sizes["hidden_size"]
    size = dtype.itemsize
    return Cost((2 * tokens + 1) * width * size, 2 * tokens * width * size, 5 * tokens * width)


_HIDDEN = (("7B", 4096), ("13B", 5120), ("34B and 70B", 8192))

_NORM_CASES = (
    Case({"num_tokens": 19, "hidden_size": 128}, "more rows than persistent programs", test=True),
    Case({"num_tokens": 11, "hidden_size": 111}, "odd width: no 16-byte accesses", test=True),
    Case({"num_tokens": 3, "hidden_size": 1}, "the narrowest row", test=True),
    Case({"num_tokens": 1, "hidden_size": 4096}, "7B, decoding one token", test=True),
    Case({"num_tokens": 9, "hidden_size": 5120}, "13B: not a power of two", test=True),
    Case({"num_tokens": 2, "hidden_size": 16384}, "the widest row", test=True),
    *(
        Case({"num_tokens": tokens, "hidden_size": width}, source)
        for source, width in _HIDDEN
        for tokens in (1, 128, 8192)
    ),
)

# --- SwiGLU ----------------------------------------------------------------------------------


def _swiglu_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = _Draw(*context), case.sizes
    shape = (sizes["num_tokens"], sizes["intermediate_size"])
    return {"gate": draw(*shape), "up": draw(*shape)}


def _swiglu_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads gate and up, writes y; exp, add, division and two products per element."""
    elements = case.sizes["num_tokens"] * case.sizes["intermediate_size"]
    return Cost(2 * elements * dtype.itemsize, elements * dtype.itemsize, 5 * elements)


_INTERMEDIATE = (("7B", 11008), ("13B", 13824), ("34B", 22016), ("70B", 28672))

_SWIGLU_CASES = (
    Case({"num_tokens": 3, "intermediate_size": 63}, "odd width", test=True),
    Case({"num_tokens": 2, "intermediate_size": 1}, "the narrowest row", test=True),
    Case({"num_tokens": 4, "intermediate_size": 1025}, "one more than a block", test=True),
    Case({"num_tokens": 2, "intermediate_size": 11008}, "7B: not a power of two", test=True),
    Case({"num_tokens": 1, "intermediate_size": 13824}, "13B: not a power of two", test=True),
    *(
        Case({"num_tokens": tokens, "intermediate_size": width}, source)
        for source, width in _INTERMEDIATE
        for tokens in (1, 128, 8192)
    ),
)

# --- RoPE ------------------------------------------------------------------------------------


def _rope_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = _Draw(*context), case.sizes
    batch, seq_len, head_dim = sizes["batch"], sizes["seq_len"], sizes["head_dim"]
    max_seq_len = 2 * seq_len
    angle = torch.outer(
        torch.arange(max_seq_len, device=draw.device),
        10000.0 ** (-torch.arange(0, head_dim, 2, device=draw.device) / head_dim),
    )
    positions = torch.randint(
        0, max_seq_len, (batch, seq_len), generator=draw.generator, device=draw.generator.device
    )
    return {
        "q": draw(batch, seq_len, sizes["num_q_heads"], head_dim),
        "k": draw(batch, seq_len, sizes["num_kv_heads"], head_dim),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": positions.to(draw.device) if sizes["positions"] else None,
        "interleaved": sizes["interleaved"],
    }


def _rope_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads and writes q and k, reads one angle per token and pair; three flops per element."""
    sizes = case.sizes
    tokens = sizes["batch"] * sizes["seq_len"]
    elements = tokens * (sizes["num_q_heads"] + sizes["num_kv_heads"]) * sizes["head_dim"]
    angles = tokens * sizes["head_dim"] * 4
    return Cost(elements * dtype.itemsize + angles, elements * dtype.itemsize, 3 * elements)


def _rope_case(
    batch: int,
    seq_len: int,
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    interleaved: bool = False,
    positions: bool = False,
    test: bool = False,
) -> Case:
    sizes = {
        "batch": batch,
        "seq_len": seq_len,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "interleaved": interleaved,
        "positions": positions,
    }
    return Case(sizes, source, test)


_ROPE_CASES = (
    _rope_case(2, 3, (8, 8), 64, "MHA", test=True),
    _rope_case(2, 3, (8, 2), 128, "GQA, Meta's pairs", interleaved=True, test=True),
    _rope_case(1, 5, (7, 1), 80, "MQA, heads that fill no block", positions=True, test=True),
    _rope_case(3, 2, (6, 2), 96, "GQA", interleaved=True, positions=True, test=True),
    _rope_case(1, 1, (5, 5), 2, "the smallest head", test=True),
    *(
        _rope_case(1, tokens, heads, 128, source)
        for source, heads in (("7B", (32, 32)), ("13B", (40, 40)), ("34B and 70B", (64, 8)))
        for tokens in (1, 128, 8192)
    ),
)

# --- Flash attention -------------------------------------------------------------------------


def _attention_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = _Draw(*context), case.sizes
    batch, head_dim = sizes["batch"], sizes["head_dim"]
    kv_shape = (batch, sizes["seq_len_kv"], sizes["num_kv_heads"], head_dim)
    return {
        "q": draw(batch, sizes["seq_len_q"], sizes["num_q_heads"], head_dim),
        "k": draw(*kv_shape),
        "v": draw(*kv_shape),
        "return_lse": True,
        **_score_inputs(case, draw),
        **_limits(case, draw.device),
    }


def _limits(case: Case, device: torch.device) -> dict[str, Any]:
    """Padding on the left, and documents side by side, as masks that each query or key has."""
    batch, seq_len_q, seq_len_kv = (
        case.sizes[name] for name in ("batch", "seq_len_q", "seq_len_kv")
    )
    keys = torch.arange(seq_len_kv, device=device)
    limits = {}
    if case.sizes.get("padded"):
        padding = torch.arange(batch, device=device)[:, None] * (seq_len_kv // batch)
        limits["key_mask"] = keys >= padding
    if num_documents := case.sizes.get("documents"):
        length = -(-seq_len_kv // num_documents)
        own_keys = torch.arange(seq_len_q, device=device) + seq_len_kv - seq_len_q
        first = own_keys // length * length
        limits["key_ranges"] = torch.stack((first, first + length), -1).expand(batch, -1, -1)
    return limits


def _score_inputs(case: Case, draw: _Draw) -> dict[str, Any]:
    """What the case names of that which shapes scores. Slopes are those of ALiBi's paper."""
    sizes = case.sizes
    heads = sizes["num_q_heads"]
    inputs = {name: sizes[name] for name in ("causal", "window", "softcap") if name in sizes}
    if sizes.get("alibi"):
        exponents = torch.arange(1, heads + 1, device=draw.device) * (-8.0 / heads)
        inputs["alibi_slopes"] = exponents.exp2()
    if sizes.get("sinks"):
        inputs["sinks"] = draw(heads)
    return inputs


def _attention_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products of 2 · head_dim flops per visible pair of query and key; reads q, k, v, writes
    out and the float32 lse."""
    sizes = case.sizes
    batch, heads, head_dim = sizes["batch"], sizes["num_q_heads"], sizes["head_dim"]
    seq_len_q, seq_len_kv = sizes["seq_len_q"], sizes["seq_len_kv"]
    left, right = sizes.get("window", (None, None))
    if sizes["causal"]:
        right = 0
    own_keys = range(seq_len_kv - seq_len_q, seq_len_kv)  # the key that each query stands on
    ends = [seq_len_kv if right is None else min(seq_len_kv, p + right + 1) for p in own_keys]
    starts = [0 if left is None else max(0, p - left) for p in own_keys]
    pairs = sum(max(0, end - start) for start, end in zip(starts, ends, strict=True))
    queries = batch * seq_len_q * heads
    keys = batch * seq_len_kv * sizes["num_kv_heads"]
    return Cost(
        (queries + 2 * keys) * head_dim * dtype.itemsize,
        queries * (head_dim * dtype.itemsize + 4),
        4 * batch * heads * head_dim * pairs,
    )


def _attention_case(
    batch: int,
    seq_lens: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    causal: bool,
    test: bool = False,
    **scores: Any,
) -> Case:
    sizes = {
        "batch": batch,
        "seq_len_q": seq_lens[0],
        "seq_len_kv": seq_lens[1],
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "causal": causal,
        **scores,
    }
    return Case(sizes, source, test)


_ATTENTION_CASES = (
    _attention_case(
        1, (63, 63), (4, 4), 64, "MHA, one short of two blocks", causal=True, test=True
    ),
    _attention_case(2, (33, 33), (4, 4), 64, "MHA", causal=False, test=True),
    _attention_case(
        1, (40, 111), (6, 2), 80, "GQA 3, keys before the queries", causal=True, test=True
    ),
    _attention_case(
        1, (50, 20), (5, 1), 96, "MQA 5, queries that see no key", causal=True, test=True
    ),
    _attention_case(4, (1, 65), (7, 1), 128, "MQA 7, one query", causal=True, test=True),
    _attention_case(1, (17, 47), (8, 1), 128, "MQA 8", causal=False, test=True),
    _attention_case(1, (65, 65), (2, 1), 256, "the widest head", causal=True, test=True),
    _attention_case(3, (34, 18), (2, 2), 8, "the narrowest head", causal=False, test=True),
    _attention_case(
        1, (45, 70), (4, 2), 64, "Mistral's window", causal=True, window=(20, None), test=True
    ),
    _attention_case(
        1, (70, 45), (4, 2), 32, "a window to both sides", causal=False, window=(9, 3), test=True
    ),
    _attention_case(1, (40, 40), (4, 2), 64, "Gemma 2's cap", causal=True, softcap=5.0, test=True),
    _attention_case(1, (40, 40), (4, 2), 64, "gpt-oss's sinks", causal=True, sinks=True, test=True),
    _attention_case(1, (40, 50), (4, 1), 64, "ALiBi", causal=True, alibi=True, test=True),
    _attention_case(
        3, (40, 40), (4, 2), 64, "padded on the left", causal=True, padded=True, test=True
    ),
    _attention_case(
        2, (70, 75), (6, 2), 32, "documents in a row", causal=True, documents=3, test=True
    ),
    _attention_case(
        2, (20, 75), (4, 4), 64, "both", causal=False, documents=2, padded=True, test=True
    ),
    *(
        _attention_case(16384 // seq_len, (seq_len, seq_len), heads, 128, source, causal=causal)
        for source, heads in (("7B", (32, 32)), ("13B", (40, 40)), ("34B and 70B", (64, 8)))
        for seq_len in (512, 2048, 8192)
        for causal in (True, False)
    ),
)

# --- Flash attention, packed -----------------------------------------------------------------


def packed_lengths(case: Case) -> list[int]:
    """Lengths of the sequences: every fifth and the last are empty, the rest from a half to one and
    a half of their mean."""
    total, count = case.sizes["total"], case.sizes["num_sequences"]
    shares = [0 if i % 5 == 4 or i == count - 1 else 2 + i % 5 for i in range(count)]
    shares = shares if any(shares) else [1] * count
    lengths = [total * share // sum(shares) for share in shares]
    lengths[0] += total - sum(lengths)
    return lengths


def _varlen_inputs(case: Case, *context: Any) -> dict[str, Any]:
    """Queries and keys of the same lengths, as where documents are packed for training."""
    draw, sizes = _Draw(*context), case.sizes
    total, head_dim = sizes["total"], sizes["head_dim"]
    bounds = torch.tensor([0, *packed_lengths(case)]).cumsum(0)
    cu_seqlens = bounds.to(draw.device, torch.int32)
    return {
        "q": draw(total, sizes["num_q_heads"], head_dim),
        "k": draw(total, sizes["num_kv_heads"], head_dim),
        "v": draw(total, sizes["num_kv_heads"], head_dim),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "causal": sizes["causal"],
        "return_lse": True,
    }


def _varlen_cost(case: Case, dtype: torch.dtype) -> Cost:
    """The sum of flash_attention's over the sequences."""
    kept = {
        name: case.sizes[name] for name in ("num_q_heads", "num_kv_heads", "head_dim", "causal")
    }
    costs = [
        _attention_cost(
            Case({"batch": 1, "seq_len_q": length, "seq_len_kv": length, **kept}, case.source),
            dtype,
        )
        for length in packed_lengths(case)
    ]
    return Cost(*map(sum, zip(*costs, strict=True)))


def _varlen_case(
    total: int,
    num_sequences: int,
    heads: tuple[int, int],
    head_dim: int,
    source: str,
    *,
    causal: bool = True,
    test: bool = False,
) -> Case:
    sizes = {
        "total": total,
        "num_sequences": num_sequences,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "causal": causal,
    }
    return Case(sizes, source, test)


_VARLEN_CASES = (
    _varlen_case(150, 6, (4, 2), 64, "GQA 2, two sequences empty", test=True),
    _varlen_case(97, 1, (3, 1), 80, "MQA 3, one sequence", causal=False, test=True),
    _varlen_case(40, 11, (2, 2), 16, "MHA, sequences of a few rows", test=True),
    *(
        _varlen_case(16384, num_sequences, heads, 128, source)
        for source, heads in (("7B", (32, 32)), ("34B and 70B", (64, 8)))
        for num_sequences in (8, 64)
    ),
)

# --- Decode attention ------------------------------------------------------------------------


def decode_lengths(case: Case) -> list[int]:
    """Spread from the longest down to an eighth of it, unless the case is not ragged."""
    batch, capacity = case.sizes["batch"], case.sizes["max_seq_len"]
    spread = capacity * 7 if case.sizes.get("ragged", True) else 0
    return [capacity - i * spread // (8 * batch) for i in range(batch)]


def quantized(x: Tensor, dtype: torch.dtype, *, per_token: bool) -> tuple[Tensor, Tensor]:
    """(stored, scale) of `[…, num_kv_heads, head_dim]`, the largest feature at the dtype's end."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    features = x.float().abs().amax(-1)
    if not per_token:
        features = features.flatten(0, -2).amax(0)
    scale = features / largest
    stored = x.float() / scale[..., None]
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


def _spoil(x: Tensor) -> None:
    """Fills x with what must never be read: NaN, or the int8 that is furthest off."""
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(0x7F)
    else:
        x.fill_(math.nan if x.is_floating_point() else -128)


def _paged(x: Tensor, block_table: Tensor, num_pages: int) -> Tensor:
    """`[batch, max_seq_len, …]` dealt out to pages; what no sequence owns is spoilt."""
    rows = x.unflatten(1, (block_table.shape[1], -1)).flatten(0, 1)
    pages = rows.new_empty(num_pages, *rows.shape[1:])
    _spoil(pages)
    raw = torch.uint8 if x.element_size() == 1 else x.dtype  # indexing knows no float8
    pages.view(raw)[block_table.flatten().long()] = rows.view(raw)
    return pages


def decode_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    spoil: bool = True,
) -> dict[str, Any]:
    """Caches of `decode_lengths`: contiguous, or in shuffled pages of `page_size`; of `dtype`, or
    quantised to `cache_dtype` with scales per token or, with `scale_per_head`, per head.

    spoil: fill what lies beyond the lengths with NaN, and the block table with pages that there are
        not.
    """
    draw, sizes = _Draw(dtype, device, generator), case.sizes
    batch, capacity = sizes["batch"], sizes["max_seq_len"]
    lengths = decode_lengths(case)
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
    return {
        "q": draw(batch, sizes["seq_len_q"], sizes["num_q_heads"], sizes["head_dim"]),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        **caches,
    }


def _decode_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads every valid cache entry, its scale and its page's number once; two products of
    2 · head_dim flops per query and key, all keys counted as seen by all new tokens."""
    sizes, lengths = case.sizes, decode_lengths(case)
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
    *(
        _decode_case(batch, 1, context, heads, 128, source)
        for source, heads in (("7B", (32, 32)), ("13B", (40, 40)), ("34B and 70B", (64, 8)))
        for batch, context in ((1, 1024), (1, 32768), (64, 4096))
    ),
)


# --- RoPE into a cache -----------------------------------------------------------------------


def _append_inputs(case: Case, *context: Any) -> dict[str, Any]:
    """Shuffled slots of a cache of pages with room for twice the tokens; q, k and v are views of a
    fused projection. Scales are those of heads where sizes say so, else those of tokens."""
    draw, sizes = _Draw(*context), case.sizes
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


OPS = (
    OpSpec(
        "rms_norm",
        reference.rms_norm,
        fused.rms_norm,
        _NORM_CASES,
        _norm_inputs,
        _norm_cost,
        wrt=("x", "weight"),
    ),
    OpSpec(
        "add_rms_norm",
        reference.add_rms_norm,
        fused.add_rms_norm,
        _NORM_CASES,
        _add_norm_inputs,
        _add_norm_cost,
        wrt=("x", "residual", "weight"),
    ),
    OpSpec(
        "swiglu",
        reference.swiglu,
        fused.swiglu,
        _SWIGLU_CASES,
        _swiglu_inputs,
        _swiglu_cost,
        wrt=("gate", "up"),
    ),
    OpSpec(
        "apply_rope",
        reference.apply_rope,
        fused.apply_rope,
        _ROPE_CASES,
        _rope_inputs,
        _rope_cost,
        wrt=("q", "k"),
    ),
    OpSpec(
        "flash_attention",
        reference.flash_attention,
        fused.flash_attention,
        _ATTENTION_CASES,
        _attention_inputs,
        _attention_cost,
        wrt=("q", "k", "v"),
    ),
    OpSpec(
        "flash_attention_varlen",
        reference.flash_attention_varlen,
        fused.flash_attention_varlen,
        _VARLEN_CASES,
        _varlen_inputs,
        _varlen_cost,
        wrt=("q", "k", "v"),
    ),
    OpSpec(
        "decode_attention",
        reference.decode_attention,
        fused.decode_attention,
        _DECODE_CASES,
        decode_inputs,
        _decode_cost,
        wrt=(),
    ),
)

# Ops that write to their arguments: not for what calls an op twice on the same inputs.
IN_PLACE_OPS = (
    OpSpec(
        "rope_append_kv",
        reference.rope_append_kv,
        fused.rope_append_kv,
        _APPEND_CASES,
        _append_inputs,
        _append_cost,
        wrt=(),
    ),
)
