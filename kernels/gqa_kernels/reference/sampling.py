"""The choice of a token, in plain PyTorch."""

import torch
from torch import Tensor

from gqa_kernels.reference.rows import wide


def sample_tokens(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token per row from softmax(logits / temperature), cut to its nucleus.

    Tokens stand in the order of their logits, the largest first and the lower id first among equal
    ones. The nucleus is their shortest run whose probabilities reach `top_p`: a token belongs to it
    if those before it sum to less. The draw inverts the cumulative distribution of the nucleus at
    `uniform`, so it is a function of its arguments, and of its row's alone.

    Args:
        logits: `[batch, vocab_size]`.
        temperature: float32 `[batch]`, at least 0; 0 takes the first token in that order.
        top_p: float32 `[batch]` in (0, 1].
        uniform: float32 `[batch]` in [0, 1).
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    Reference: Holtzman et al. 2020, arXiv:1904.09751.
    """
    logits = wide(logits)
    temperature, top_p, uniform = (x[:, None].to(logits) for x in (temperature, top_p, uniform))
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    highest = logits.amax(dim=-1, keepdim=True)  # NaN where there is one
    # Subtracting first keeps a small temperature from overflowing; tiny keeps it from being 0.
    smallest = torch.finfo(torch.float32).tiny
    weights = ((ordered - highest) / temperature.clamp(min=smallest)).exp()
    reached = weights.cumsum(dim=-1)
    size = (reached - weights < top_p * reached[:, -1:]).sum(dim=-1, keepdim=True).clamp(min=1)
    target = uniform * reached.gather(-1, size - 1)
    rank = (reached <= target).sum(dim=-1, keepdim=True).clamp(max=size - 1)
    rank = torch.where(temperature > 0, rank, 0)
    return order.gather(-1, rank).where(highest.isfinite(), -1)[:, 0]
