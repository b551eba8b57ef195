"""Checks the eight more bits of an output that the forward kernel for Hopper keeps for autograd."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gqa_kernels.ops.attention.call import Call


def check(
    call: Call,
    block_n: int,
    sequences: Iterable[tuple[range, range]],
    out: Tensor,
    residue: Tensor,
) -> None:
    """Raises unless the residue leaves at most a fiftieth of the difference between out and the
    mean of the values under the weights as they were rounded.

    Args:
        block_n: keys of a step of the kernel.
        sequences: the queries and keys of each.
    """
    q, k, v = call[:3]
    before = after = 0.0
    for rows, keys in sequences:
        if len(rows) and len(keys):
            rows, keys = (slice(x.start, x.stop) for x in (rows, keys))
            part = call._replace(q=q[:, rows], k=k[:, keys], v=v[:, keys])
            errors = _errors(part, block_n, out[:, rows], residue[:, rows])
            before, after = before + errors[0] ** 2, after + errors[1] ** 2
    before, after = before**0.5, after**0.5
    assert 50 * after <= before, f"the residue leaves {after:.2e} of {before:.2e}"


def _errors(call: Call, block_n: int, out: Tensor, residue: Tensor) -> tuple[float, ...]:
    """The norms of the differences from the mean of the values under the rounded weights, of out
    and of out with its residue."""
    q, k, v = (x.double().transpose(1, 2) for x in call[:3])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * call.softmax_scale
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    keys = torch.arange(k.shape[2], device=q.device)
    own = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    if call.window_right is not None:
        scores = scores.masked_fill(keys > own + call.window_right, -torch.inf)
    if call.window_left is not None:
        scores = scores.masked_fill(keys < own - call.window_left, -torch.inf)
    # A weight is rounded relative to the largest score so far, from the last tile downwards.
    tiles = scores.split(block_n, dim=-1)
    largest = torch.stack([tile.amax(-1) for tile in tiles])
    anchors = largest.flip(0).cummax(0).values.flip(0).nan_to_num(neginf=0.0)[..., None]
    weights = torch.cat(
        [
            (tile - anchor).exp().to(out.dtype).double() * (anchor - anchors[0]).exp()
            for tile, anchor in zip(tiles, anchors, strict=True)
        ],
        dim=-1,
    )
    mean = (weights @ v / weights.sum(-1, keepdim=True)).nan_to_num().transpose(1, 2)
    exponent = out.double().abs().clamp(min=2.0**-14).log2().floor()
    restored = (
        out.double() + residue * (exponent - (14 if out.dtype == torch.bfloat16 else 17)).exp2()
    )
    return tuple((x - mean).norm().item() for x in (out.double(), restored))
