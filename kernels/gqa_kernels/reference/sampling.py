"""The choice of a token, in plain PyTorch."""

import torch
from torch import Tensor

from gqa_kernels.reference.rows import wide


def sample_tokens(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token per row from softmax(logits / temperature), cut to its nucleus.

    Tokens are ordered by decreasing logit, equal logits by increasing id. The nucleus is the
    shortest prefix of this order whose probabilities sum to `top_p` or more. The token is the
    inverse of the nucleus' cumulative distribution at `uniform`. The token of a row depends only on
    the arguments of that row.

    Args:
        logits: `[batch, vocab_size]`, in any floating dtype.
        temperature: float32 `[batch]`, at least 0; 0 selects the first token in that order.
        top_p: float32 `[batch]` in (0, 1].
        uniform: float32 `[batch]` in [0, 1).
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    Reference: Holtzman et al. 2020, arXiv:1904.09751.
    """
    logits = wide(logits)
    temperature, top_p, uniform = (x[:, None].to(logits) for x in (temperature, top_p, uniform))
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    highest = logits.amax(dim=-1, keepdim=True)  # NaN if the row has one
    # The maximum is subtracted before the division, which could overflow; `smallest` avoids 0 / 0.
    smallest = torch.finfo(torch.float32).tiny
    weights = ((ordered - highest) / temperature.clamp(min=smallest)).exp()
    reached = weights.cumsum(dim=-1)
    size = (reached - weights < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True).clamp(min=1)
    target = uniform * reached.gather(-1, size - 1)
    rank = (reached <= target).sum(dim=-1, keepdim=True).clamp(max=size - 1)
    rank = torch.where(temperature > 0, rank, 0)
    return order.gather(-1, rank).where(highest.isfinite(), -1)[:, 0]
