"""Losses from scores over a vocabulary, which may be sharded over ranks.

A token's scores x over the vocabulary are summarised by four numbers. Losses, log-probabilities and
entropies follow from them by arithmetic that autograd differentiates:

    maximum c = max x, a constant          log_sum = log Σ exp(x − c)
    score     = x[target] − c              mean    = Σ p · (x − c), with p = softmax(x)

    −log p(target) = log_sum − score       entropy = log_sum − mean       lse = c + log_sum

Differences to the maximum stay exact where scores are large. If every rank of a group has a part of
the vocabulary, the ranks exchange only these numbers and the gradient of the hidden states, no
weights and no logits. Shoeybi et al. 2019, arXiv:1909.08053.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class TokenScores(NamedTuple):
    """The four numbers, each in the shape of the targets; `score` is 0 for a target outside of the
    scores, `mean` is None unless requested."""

    maximum: Tensor
    log_sum: Tensor
    score: Tensor
    mean: Tensor | None


def token_losses(scores: TokenScores, z_loss: float) -> Tensor:
    """−log p(target) + z_loss · lse²."""
    losses = scores.log_sum - scores.score
    return losses + z_loss * (scores.maximum + scores.log_sum).square() if z_loss else losses


def of_predictions(
    losses: Tensor, targets: Tensor, ignored: Tensor | None, vocab_size: int
) -> Tensor:
    """Returns the losses with 0 at ignored targets and NaN at others outside of the vocabulary."""
    if ignored is None:
        return without_unknown(losses, targets, vocab_size)
    losses = without_unknown(losses, targets.masked_fill(ignored, 0), vocab_size)
    return losses.masked_fill(ignored, 0.0)


def without_unknown(x: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Returns x with NaN, whose gradient is NaN too, at targets outside of the vocabulary."""
    unknown = (targets < 0) | (targets >= vocab_size)
    return x * torch.ones_like(x).masked_fill(unknown, math.nan)


def reduce(
    losses: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    reduction: str,
    num_predictions: Tensor | float | None,
) -> Tensor:
    """Reduces losses, which are 0 at ignored targets, as `reduction` says."""
    if reduction == "none":
        return losses
    return mean_of(losses.sum(), targets, ignore_index, reduction, num_predictions)


def mean_of(
    total: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    reduction: str,
    num_predictions: Tensor | float | None,
) -> Tensor:
    """Returns the sum of all losses or, for "mean", the sum divided by the number of
    predictions."""
    if reduction == "sum":
        return total
    if num_predictions is not None:
        if isinstance(num_predictions, Tensor):
            num_predictions = num_predictions.to(total.dtype)
        return total / num_predictions
    if ignore_index is None:
        return total / targets.numel() if targets.numel() else total * math.nan
    return total / (targets != ignore_index).sum()


class Part(NamedTuple):
    """A rank's rows of the vocabulary's weight."""

    weight: Tensor
    first: int  # the id of the first row
    vocab_size: int  # of the whole vocabulary
    group: "dist.ProcessGroup"
    is_even: bool  # every rank has the same number of rows


def part_of(weight: Tensor, group: "dist.ProcessGroup | None") -> Part | None:
    """Returns which part of the vocabulary `weight` is, given `group` or a DTensor that is sharded
    over the vocabulary; None if it is the whole vocabulary.

    Raises:
        TypeError: `group` with a DTensor.
        NotImplementedError: a DTensor that is sharded in another way, on several dimensions of its
            mesh, or without a row for each rank.
    """
    placements = getattr(weight, "placements", None)
    if placements is None:
        if group is None:
            return None
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: expected a ProcessGroup; got {type(group).__name__}")
        rows = weight.shape[0]
        first, vocab_size = dist.get_rank(group) * rows, dist.get_world_size(group) * rows
        return Part(weight, first, vocab_size, group, is_even=True)
    if group is not None:
        raise TypeError("group: expected None for a weight that is a DTensor; got a group")
    if all(placement.is_replicate() for placement in placements):
        return None
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise NotImplementedError(
            "weight: expected a DTensor sharded over the vocabulary on a mesh of one dimension; "
            f"got placements {tuple(placements)}"
        )
    mesh, vocab_size = weight.device_mesh, weight.shape[0]
    rows = -(-vocab_size // mesh.size())
    if rows * (mesh.size() - 1) >= vocab_size:
        raise NotImplementedError(
            f"weight: expected a row of the vocabulary for each of {mesh.size()} ranks; got "
            f"{vocab_size} rows, sharded by {rows}"
        )
    first = rows * mesh.get_local_rank()
    return Part(weight.to_local(), first, vocab_size, mesh.get_group(), is_even=False)


class _Shared(torch.autograd.Function):
    """The identity on a value that all ranks have; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' values. The ranks compute the same from it, so its gradient passes
    through unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Shared.apply(grad, ctx.group), None


def whole(x: Tensor) -> Tensor:
    """Returns a DTensor as a whole plain tensor; a plain tensor as it is."""
    return x if getattr(x, "placements", None) is None else x.full_tensor()


def shared(hidden: Tensor, part: Part) -> Tensor:
    """Returns hidden states that each rank multiplies with its part of the vocabulary."""
    return _Shared.apply(hidden, part.group)


def of_all_parts(scores: TokenScores, targets: Tensor, part: Part) -> TokenScores:
    """Computes the scores over the whole vocabulary from those over each rank's part.

    Args:
        targets: ids of the whole vocabulary.
    Returns:
        the scores; NaN if the ranks of a group have different numbers of rows, since a rank does
        not know the other ranks' sizes and cannot raise.
    """
    group = part.group
    local = scores.maximum.detach()
    num_rows = local.new_full((1,), part.weight.shape[0])
    largest = torch.cat([local.flatten(), num_rows, -num_rows])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    maximum = largest[:-2].view(local.shape)
    # A rank whose scores are all −inf contributes nothing.
    shift = (local - maximum).masked_fill(local == -torch.inf, -torch.inf)
    if part.is_even:
        shift = shift.where(largest[-2] == -largest[-1], torch.nan)
    weights = torch.exp(scores.log_sum + shift)
    total = _Sum.apply(weights, group)
    here = (targets >= part.first) & (targets < part.first + part.weight.shape[0])
    score = _Sum.apply(torch.where(here, scores.score + shift, 0.0), group)
    mean = None
    if scores.mean is not None:
        mean = _Sum.apply(weights * (scores.mean + shift), group) / total
    return TokenScores(maximum, total.log(), score, mean)
