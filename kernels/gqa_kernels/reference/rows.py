"""Ops on rows of features, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Returns x in float32, or in its own dtype if that is wider, where kernels use float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = cast(x / sqrt(mean(x²) + eps)) · weight, the mean over the last dimension.

    Llama's order of roundings: statistics in float32, cast to `x.dtype`, then times `weight`.

    Args:
        x: `[..., hidden_size]`.
        weight: `[hidden_size]`.
        eps: added to the mean square; the Llama 2 checkpoints use 1e-5.
    Returns:
        `[..., hidden_size]` in `promote_types(x.dtype, weight.dtype)`.
    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x_wide = wide(x)
    normalized = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return normalized.to(x.dtype) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = x + residual, rounded to `x.dtype`; y = rms_norm(h, weight, eps).

    Args:
        x, residual: `[..., hidden_size]`, of one shape and dtype.
        weight: `[hidden_size]`.
    Returns:
        (y, h): the normalised sum, and the sum itself, which is the next residual.
    """
    hidden = x + residual
    return rms_norm(hidden, weight, eps), hidden


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, with silu(z) = z / (1 + exp(-z)), computed in float32 and rounded once.

    Args:
        gate, up: `[..., intermediate_size]`, of one shape and dtype.
    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x_wide = wide(x)
    if interleaved:
        first, second = x_wide[..., 0::2], x_wide[..., 1::2]
    else:
        first, second = x_wide.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return out.to(x.dtype)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates each pair of features (a, b) of q and k at position p by the angle of the pair:
    (a, b) → (a·cos[p] − b·sin[p], b·cos[p] + a·sin[p]), in float32, rounded once.

    Args:
        q: `[batch, seq_len, num_q_heads, head_dim]`.
        k: `[batch, seq_len, num_kv_heads, head_dim]`.
        cos, sin: float32 `[max_seq_len, head_dim / 2]`.
        positions: integer `[batch, seq_len]`; None means 0, 1, … seq_len − 1 in every sequence.
            A position outside [0, max_seq_len) gives NaN in its row.
        interleaved: pairs are (2i, 2i + 1), as in Meta's checkpoints; otherwise
            (i, i + head_dim / 2), as in Hugging Face's.
    Returns:
        (q, k) rotated, in new tensors.
    Reference: Su et al. 2021, arXiv:2104.09864.
    """
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    outside = (positions < 0) | (positions >= cos.shape[0])
    if cos.shape[0] == 0:  # no position is in the table, so all rows are NaN
        cos = sin = cos.new_zeros(1, cos.shape[1])
    rows = positions.clamp(0, cos.shape[0] - 1).long()
    # [batch, seq_len, 1, head_dim / 2]: one angle for all heads
    cos = cos[rows].masked_fill(outside[..., None], math.nan).unsqueeze(2)
    sin = sin[rows].masked_fill(outside[..., None], math.nan).unsqueeze(2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
