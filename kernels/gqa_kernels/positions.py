"""Positions for RoPE: the table of angles, and positions in packed sequences."""

import torch
from torch import Tensor

from gqa_kernels.runtime import arguments


def rope_table(
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of position · theta^(−2i / head_dim), computed in float64.

    Returns:
        (cos, sin), float32 `[max_seq_len, head_dim / 2]`.
    Raises:
        ValueError: an odd head_dim, or a size that is not positive.
    """
    arguments.size("head_dim", head_dim)
    arguments.size("max_seq_len", max_seq_len)
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number; got {head_dim}")
    feature = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(max_seq_len, dtype=torch.float64, device=device)
    angle = position[:, None] * theta ** (-feature / head_dim)
    return angle.cos().float(), angle.sin().float()


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Returns positions `[1, total]` of packed tokens, from 0 in every sequence, without a device
    sync.

    Tokens after the last sequence are at position 0.

    Args:
        cu_seqlens: int32 or int64 `[num_sequences + 1]`, from 0 and never decreasing.
    Raises:
        TypeError, ValueError: cu_seqlens of another kind, dtype or shape.
    """
    arguments.tensor("cu_seqlens", cu_seqlens, shape=("num_sequences + 1",), dtypes=arguments.INTS)
    if len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens: expected the bounds of one sequence or more; got none")
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1  # never an empty one
    return (row - cu_seqlens[sequence]).masked_fill(row >= cu_seqlens[-1], 0)[None]
