"""The loss over the vocabulary by chunks of tokens; contract as in `reference.losses`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_kernels import losses, reference
from gqa_kernels.native.rows import own_dtype, wide
from gqa_kernels.runtime import derivatives

# The logits of a chunk fit in a CPU cache of some megabytes; a chunk has enough rows for an
# efficient matrix product.
_LOGITS, _MIN_ROWS = 1 << 19, 64
_VOCABULARY_BLOCK = 256


def _over_the_vocabulary(grad: Tensor, weight: Tensor) -> Tensor:
    """grad · weight. In float32 it sums blocks of the vocabulary separately: the CPU's library adds
    all terms in sequence, so its error grows with their number."""
    if weight.dtype.itemsize == 2:
        return grad @ weight
    blocks = grad.split(_VOCABULARY_BLOCK, 1), weight.split(_VOCABULARY_BLOCK)
    return sum(part @ rows for part, rows in zip(*blocks, strict=True))


class _SumOfLosses(torch.autograd.Function):
    """Σ wᵢ · −log softmax(hiddenᵢ · weightᵀ)[targetᵢ]. The forward pass also computes the
    gradients, while it has the logits of a chunk. Hsu et al. 2024, arXiv:2410.10989."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(wide(weight)) if want_weight else None
        total = row_weights.new_zeros(())
        rows = max(_MIN_ROWS, _LOGITS // max(weight.shape[0], 1))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            x, target, factor = hidden[chunk], targets[chunk, None], row_weights[chunk, None]
            scores = wide(F.linear(x, weight))
            probs = scores.softmax(-1)
            # −log p(target) is computed from the largest p, because p(target) may underflow.
            below = scores.amax(-1, keepdim=True) - scores.gather(-1, target)
            total += ((below - probs.amax(-1, keepdim=True).log()) * factor).sum()
            if want_hidden or want_weight:
                grad = probs.scatter_add_(-1, target, -torch.ones_like(factor))
                grad = grad.mul_(factor).to(x.dtype)
                if want_hidden:
                    grad_hidden[chunk] = _over_the_vocabulary(grad, weight)
                if want_weight:
                    grad_weight += grad.T @ x
        ctx.save_for_backward(hidden, weight, grad_hidden, grad_weight, row_weights.any())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, grad_hidden, grad_weight, counts = ctx.saved_tensors
        with torch.no_grad():
            factor = grad.where(counts, 0.0)  # a mean of no rows is divided by 0
            scaled = tuple(
                None if x is None else (x * factor).to(of.dtype)
                for x, of in ((grad_hidden, hidden), (grad_weight, weight))
            )
        if torch.is_grad_enabled():  # with create_graph
            scaled = derivatives.only_first(scaled, hidden, weight, grad)
        return *scaled, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    num_predictions: Tensor | float | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """See `reference.linear_cross_entropy`, which computes reduction="none", soft caps, z-losses
    and a vocabulary that is sharded over ranks."""
    divided = {"reduction": reduction, "num_predictions": num_predictions}
    sharded = group is not None or hasattr(weight, "placements") or hasattr(hidden, "placements")
    if reduction == "none" or softcap is not None or z_loss or sharded:
        options = {"softcap": softcap, "z_loss": z_loss, "group": group}
        return reference.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, **divided, **options
        )
    ids, ignored = targets.long(), None
    if ignore_index is not None:
        # Ignored rows may contain anything, including NaN: they become 0, with a valid id.
        ignored = targets == ignore_index
        hidden, ids = hidden.masked_fill(ignored[..., None], 0.0), ids.masked_fill(ignored, 0)
    ones = torch.ones(ids.shape, dtype=wide(hidden[:0]).dtype, device=hidden.device)
    row_weights = losses.of_predictions(ones, targets, ignored, len(weight))
    flat = ids.clamp(0, len(weight) - 1).flatten(), row_weights.flatten()
    with own_dtype(hidden):
        total = _SumOfLosses.apply(hidden.reshape(-1, hidden.shape[-1]), weight, *flat)
    return losses.mean_of(total, targets, ignore_index, reduction, num_predictions)
