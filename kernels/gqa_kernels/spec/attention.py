"""Rows of the table: attention."""

import math
from typing import Any

import torch

from gqa_kernels import fused, reference
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec

# --- Flash attention -------------------------------------------------------------------------


def _attention_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = Draw(case, *context), case.sizes
    batch, head_dim = sizes["batch"], sizes["head_dim"]
    kv_shape = (batch, sizes["seq_len_kv"], sizes["num_kv_heads"], head_dim)
    return {
        "q": draw(batch, sizes["seq_len_q"], sizes["num_q_heads"], head_dim),
        "k": draw(*kv_shape),
        "v": draw(*kv_shape),
        "return_lse": True,
        **score_inputs(case, draw),
        **_limits(case, draw.device),
    }


def _limits(case: Case, device: torch.device) -> dict[str, Any]:
    """Returns key_mask for left padding and key_ranges for packed documents, if the case has
    them."""
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


def score_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    """Returns the options of a case that change scores. Slopes are those of the ALiBi paper."""
    sizes = case.sizes
    heads = sizes["num_q_heads"]
    inputs = {name: sizes[name] for name in ("causal", "window", "softcap") if name in sizes}
    if sizes.get("alibi"):
        exponents = torch.arange(1, heads + 1, device=draw.device) * (-8.0 / heads)
        inputs["alibi_slopes"] = exponents.exp2()
    if sizes.get("sinks"):
        inputs["sinks"] = draw(heads)
    return inputs


def visible_pairs(case: Case, seq_len_q: int, seq_len_kv: int) -> int:
    """The number of pairs of a query and a key that it sees, of one sequence and head."""
    left, right = case.sizes.get("window", (None, None))
    if case.sizes["causal"]:
        right = 0
    own_keys = range(seq_len_kv - seq_len_q, seq_len_kv)  # the key that each query is aligned with
    ends = [seq_len_kv if right is None else min(seq_len_kv, p + right + 1) for p in own_keys]
    starts = [0 if left is None else max(0, p - left) for p in own_keys]
    return sum(max(0, end - start) for start, end in zip(starts, ends, strict=True))


def _attention_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products of 2 · head_dim flops per visible pair of query and key; reads q, k, v, writes
    out and the float32 lse."""
    sizes = case.sizes
    batch, heads, head_dim = sizes["batch"], sizes["num_q_heads"], sizes["head_dim"]
    seq_len_q, seq_len_kv = sizes["seq_len_q"], sizes["seq_len_kv"]
    pairs = visible_pairs(case, seq_len_q, seq_len_kv)
    queries = batch * seq_len_q * heads
    keys = batch * seq_len_kv * sizes["num_kv_heads"]
    return Cost(
        (queries + 2 * keys) * head_dim * dtype.itemsize,
        queries * (head_dim * dtype.itemsize + 4),
        4 * batch * heads * head_dim * pairs,
    )


def _attention_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads q, k, v, out, dout and lse, writes dq, dk and dv; five products, where the forward pass
    has two."""
    sizes = case.sizes
    rows_q, rows_kv = (sizes["batch"] * sizes[f"seq_len_{side}"] for side in ("q", "kv"))
    return _backward_cost(case, dtype, rows_q, rows_kv, _attention_cost(case, dtype))


def _backward_cost(
    case: Case, dtype: torch.dtype, rows_q: int, rows_kv: int, forward: Cost
) -> Cost:
    queries, keys = rows_q * case.sizes["num_q_heads"], rows_kv * case.sizes["num_kv_heads"]
    row = case.sizes["head_dim"] * dtype.itemsize
    return Cost(
        (3 * queries + 2 * keys) * row + 4 * queries,
        (queries + 2 * keys) * row,
        math.ceil(2.5 * forward.flops),
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
    """Lengths of the sequences: every fifth and the last are empty, the others are between 0.5 and
    1.5 times their mean."""
    total, count = case.sizes["total"], case.sizes["num_sequences"]
    shares = [0 if i % 5 == 4 or i == count - 1 else 2 + i % 5 for i in range(count)]
    shares = shares if any(shares) else [1] * count
    lengths = [total * share // sum(shares) for share in shares]
    lengths[0] += total - sum(lengths)
    return lengths


def _varlen_inputs(case: Case, *context: Any) -> dict[str, Any]:
    """Queries and keys of equal lengths, as when documents are packed for training."""
    draw, sizes = Draw(case, *context), case.sizes
    total, head_dim = sizes["total"], sizes["head_dim"]
    bounds = torch.tensor([0, *packed_lengths(case)], device="cpu").cumsum(0)
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
    """The sum of flash_attention's costs over the sequences."""
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


def _varlen_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """The sum of flash_attention's backward costs over the sequences."""
    total = case.sizes["total"]
    return _backward_cost(case, dtype, total, total, _varlen_cost(case, dtype))


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


_TINY_HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}

OPS = (
    OpSpec(
        "flash_attention",
        reference.flash_attention,
        fused.flash_attention,
        _ATTENTION_CASES,
        _attention_inputs,
        _attention_cost,
        {**_TINY_HEADS, "batch": 2, "seq_len_q": 5, "seq_len_kv": 9, "causal": True},
        ("q", "k", "v"),
        _attention_backward_cost,
    ),
    OpSpec(
        "flash_attention_varlen",
        reference.flash_attention_varlen,
        fused.flash_attention_varlen,
        _VARLEN_CASES,
        _varlen_inputs,
        _varlen_cost,
        {**_TINY_HEADS, "total": 11, "num_sequences": 2, "causal": True},
        ("q", "k", "v"),
        _varlen_backward_cost,
    ),
)
