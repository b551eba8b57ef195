"""Ops on rows of features, in PyTorch's fused functions; contracts as in `reference.rows`."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_kernels import reference


def reads_freely(x: Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting: on a CPU, unless a compiler
    traces."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def wide(x: Tensor) -> Tensor:
    """Returns x in float32 or wider, like the reference's `wide`, without a call if it is
    already."""
    return x if x.dtype.itemsize > 2 else x.float()


def own_dtype(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does not change dtypes."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """See `reference.rms_norm`."""
    if x.dtype == weight.dtype and x.dtype.itemsize > 2:
        return F.rms_norm(x, weight.shape, weight, eps)
    # With a weight, F.rms_norm would multiply by it before it rounds.
    return F.rms_norm(x, weight.shape, None, eps) * weight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    hidden = x + residual
    return rms_norm(hidden, weight, eps), hidden


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`; in 16 bits silu(gate) is rounded before the product."""
    return F.silu(gate) * up


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `reference.apply_rope`, which computes calls with a position outside of the table."""
    if not reads_freely(q) or (angles := _angles(cos, sin, positions, q.shape[1])) is None:
        return reference.apply_rope(q, k, cos, sin, positions, interleaved=interleaved)
    # The dimension of the two features of a pair: [..., head_dim / 2, 2] or [..., 2, head_dim / 2].
    dim = -1 if interleaved else -2
    cos, sin = (x[:, :, None] for x in angles)  # the same for all heads
    both = wide(torch.cat((q, k), 2))
    pairs = both.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    signed_sin = torch.stack((-sin, sin), dim)
    rotated = torch.addcmul(pairs * cos.unsqueeze(dim), pairs.flip(dim), signed_sin)
    q, k = rotated.flatten(-2).to(q.dtype).split((q.shape[2], k.shape[2]), 2)
    return q, k


def _angles(
    cos: Tensor, sin: Tensor, positions: Tensor | None, seq_len: int
) -> tuple[Tensor, Tensor] | None:
    """cos and sin `[batch or 1, seq_len, head_dim / 2]`; None if a position is not in the table."""
    if positions is None:
        return (cos[None, :seq_len], sin[None, :seq_len]) if seq_len <= len(cos) else None
    if len(cos) == 0:  # the look-up would not raise IndexError
        return None
    positions = positions.long()
    try:  # the look-up checks the positions; a separate check would cost a pass
        return torch.embedding(cos, positions), torch.embedding(sin, positions)
    except IndexError:
        return None
