"""Rows of the table: ops on rows of features."""

from collections.abc import Callable
from typing import Any

import torch

from gqa_kernels import fused, reference
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec

# --- RMSNorm ---------------------------------------------------------------------------------


def _norm_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = Draw(case, *context), case.sizes
    return {
        "x": draw(sizes["num_tokens"], sizes["hidden_size"]),
        "weight": draw(sizes["hidden_size"]),
    }


def _add_norm_inputs(case: Case, *context: Any) -> dict[str, Any]:
    draw, sizes = Draw(case, *context), case.sizes
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
    """Reads x, residual and weight, writes y and h; one more add than the norm."""
    tokens, width = case.sizes["num_tokens"], case.sizes["hidden_size"]
    size = dtype.itemsize
    return Cost((2 * tokens + 1) * width * size, 2 * tokens * width * size, 5 * tokens * width)


def _norm_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads x, dy and weight, writes dx and dweight; three times the flops of the forward pass."""
    return _norm_backward(case, dtype, 2, _norm_cost)


def _add_norm_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads h, dy, dh and weight, writes dx, which is also the gradient of the residual, and
    dweight; three times the flops of the forward pass."""
    return _norm_backward(case, dtype, 3, _add_norm_cost)


def _norm_backward(
    case: Case, dtype: torch.dtype, planes: int, forward: Callable[[Case, torch.dtype], Cost]
) -> Cost:
    row = case.sizes["hidden_size"] * dtype.itemsize
    plane = case.sizes["num_tokens"] * row
    return Cost(planes * plane + row, plane + row, 3 * forward(case, dtype).flops)


_HIDDEN = (("7B", 4096), ("13B", 5120), ("34B and 70B", 8192))

_TINY_NORM = {"num_tokens": 3, "hidden_size": 24}
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
    draw, sizes = Draw(case, *context), case.sizes
    shape = (sizes["num_tokens"], sizes["intermediate_size"])
    return {"gate": draw(*shape), "up": draw(*shape)}


def _swiglu_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads gate and up, writes y; exp, add, division and two products per element."""
    elements = case.sizes["num_tokens"] * case.sizes["intermediate_size"]
    return Cost(2 * elements * dtype.itemsize, elements * dtype.itemsize, 5 * elements)


def _swiglu_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads dy, gate and up, writes dgate and dup; three times the flops of the forward pass."""
    plane = case.sizes["num_tokens"] * case.sizes["intermediate_size"] * dtype.itemsize
    return Cost(3 * plane, 2 * plane, 3 * _swiglu_cost(case, dtype).flops)


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
    draw, sizes = Draw(case, *context), case.sizes
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
    """Reads and writes q and k, reads one angle per token and pair; three flops per element. The
    backward pass does the same with dq and dk."""
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


OPS = (
    OpSpec(
        "rms_norm",
        reference.rms_norm,
        fused.rms_norm,
        _NORM_CASES,
        _norm_inputs,
        _norm_cost,
        _TINY_NORM,
        ("x", "weight"),
        _norm_backward_cost,
    ),
    OpSpec(
        "add_rms_norm",
        reference.add_rms_norm,
        fused.add_rms_norm,
        _NORM_CASES,
        _add_norm_inputs,
        _add_norm_cost,
        _TINY_NORM,
        ("x", "residual", "weight"),
        _add_norm_backward_cost,
    ),
    OpSpec(
        "swiglu",
        reference.swiglu,
        fused.swiglu,
        _SWIGLU_CASES,
        _swiglu_inputs,
        _swiglu_cost,
        {"num_tokens": 3, "intermediate_size": 24},
        ("gate", "up"),
        _swiglu_backward_cost,
    ),
    OpSpec(
        "apply_rope",
        reference.apply_rope,
        fused.apply_rope,
        _ROPE_CASES,
        _rope_inputs,
        _rope_cost,
        _rope_case(2, 3, (4, 2), 8, "tiny").sizes,
        ("q", "k"),
        _rope_cost,
    ),
)
