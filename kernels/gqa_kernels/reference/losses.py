"""Losses over the vocabulary, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_kernels import losses
from gqa_kernels.reference.rows import wide


def _scores(hidden: Tensor, weight: Tensor, softcap: float | None, temperature: float) -> Tensor:
    logits = wide(F.linear(hidden, weight))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature if temperature != 1.0 else logits


def _at_targets(x: Tensor, targets: Tensor) -> Tensor:
    """Returns the number of each row at its target, clamped to the ids of the row."""
    nearest = targets.clamp(0, x.shape[-1] - 1).long()
    return x.gather(-1, nearest[..., None])[..., 0]


def _token_scores(x: Tensor, targets: Tensor, need_mean: bool) -> losses.TokenScores:
    """Summarises scores over a part of the vocabulary; targets count from the part's first row."""
    maximum = x.detach().amax(-1)
    x = x - maximum.masked_fill(maximum == -torch.inf, 0.0)[..., None]
    absent = (targets < 0) | (targets >= x.shape[-1])
    score = _at_targets(x, targets).masked_fill(absent, 0.0)
    mean = (x.softmax(-1) * x).sum(-1) if need_mean else None
    return losses.TokenScores(maximum, x.logsumexp(-1), score, mean)


def _of_part(
    hidden: Tensor,
    targets: Tensor,
    part: losses.Part,
    softcap: float | None,
    temperature: float,
    need_mean: bool,
) -> losses.TokenScores:
    x = _scores(losses.shared(hidden, part), part.weight, softcap, temperature)
    scores = _token_scores(x, targets - part.first, need_mean)
    return losses.of_all_parts(scores, targets, part)


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
    """The loss of x = hidden · weightᵀ: −log softmax(x)[target] + z_loss · lse(x)², in nats.

    The scores x and their gradient are rounded to `hidden.dtype`, as in a projection; everything
    else is float32, or wider if hidden is wider.

    Args:
        hidden: `[..., hidden_size]`.
        weight: `[vocab_size, hidden_size]`, in hidden's dtype; a DTensor sharded over the
            vocabulary, or with `group` this rank's part of it.
        targets: int `[...]`, ids. An id outside of the vocabulary makes loss and gradients NaN.
        ignore_index: the target of rows that are not read and have neither loss nor gradient; None
            if there are none.
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum", or "none".
        num_predictions: a number or scalar tensor by which "mean" divides instead: the number of
            predictions of the whole batch if this is a part of it.
        softcap: x ← softcap · tanh(x / softcap), as in Gemma 2.
        z_loss: a factor; Chowdhery et al. 2022, arXiv:2204.02311, use 1e-4.
        group: the ranks over which the vocabulary is sharded, in order, with equal numbers of rows.
            Each rank passes the same hidden and targets and gets the same loss.
    Returns:
        a scalar; with "none" `[...]`, 0 in ignored rows.
    """
    part = losses.part_of(weight, group)
    if part is not None:
        hidden, targets = losses.whole(hidden), losses.whole(targets)
    ignored = None if ignore_index is None else targets == ignore_index
    ids = targets
    if ignored is not None:
        # Ignored rows may contain anything, including NaN, so they become 0, with a valid id.
        hidden, ids = hidden.masked_fill(ignored[..., None], 0.0), targets.masked_fill(ignored, 0)
    if part is None:
        x = _scores(hidden, weight, softcap, 1.0)
        token_losses = -_at_targets(x.log_softmax(-1), ids)
        if z_loss:
            token_losses = token_losses + z_loss * x.logsumexp(-1).square()
    else:
        scores = _of_part(hidden, ids, part, softcap, 1.0, need_mean=False)
        token_losses = losses.token_losses(scores, z_loss)
    vocab_size = weight.shape[0] if part is None else part.vocab_size
    token_losses = losses.of_predictions(token_losses, targets, ignored, vocab_size)
    return losses.reduce(token_losses, targets, ignore_index, reduction, num_predictions)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(target) in nats, where p = softmax(hidden · weightᵀ / temperature), and optionally the
    entropy −Σ p · log p.

    Args:
        hidden, weight, targets, group: as in `linear_cross_entropy`, but no target is ignored: a
            target outside of the vocabulary makes its row and gradients NaN.
        temperature: positive.
        return_entropy: also return the entropy.
    Returns:
        `[...]` in float32, or wider if hidden is wider; with return_entropy, (log_probs, entropy).
    """
    part = losses.part_of(weight, group)
    if part is not None:
        hidden, targets = losses.whole(hidden), losses.whole(targets)
        scores = _of_part(hidden, targets, part, None, temperature, return_entropy)
        log_probs = scores.score - scores.log_sum
        chosen = losses.without_unknown(log_probs, targets, part.vocab_size)
        return (chosen, scores.log_sum - scores.mean) if return_entropy else chosen
    log_probs = _scores(hidden, weight, None, temperature).log_softmax(-1)
    chosen = losses.without_unknown(_at_targets(log_probs, targets), targets, weight.shape[0])
    return (chosen, -(log_probs.exp() * log_probs).sum(-1)) if return_entropy else chosen
