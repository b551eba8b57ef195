"""The loss of hidden states by the projection onto the vocabulary, which itself makes no logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gqa_kernels.runtime import arguments
from llama2.targets import IGNORED


def check_targets(head: nn.Module, tokens: Tensor, targets: Tensor | None, reduction: str) -> None:
    """Raises unless `Llama2.forward` can give what it is asked for; see there."""
    if targets is None:
        if reduction != "none":
            raise ValueError(f"targets: expected some with reduction {reduction!r}; got None")
        return
    arguments.tensor("targets", targets, dtypes=arguments.INTS, shape=tuple(tokens.shape))
    check_head(head)


def check_head(head: nn.Module) -> None:
    """Raises NotImplementedError for a head that is more than its weight."""
    if type(head).forward is not nn.Linear.forward or head.bias is not None:
        raise NotImplementedError(
            "lm_head: expected torch.nn.Linear's forward and no bias, where the loss makes no "
            f"logits; got {head}"
        )


def head_loss(
    linear_cross_entropy: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
) -> Tensor:
    """`linear_cross_entropy`, under autocast in its dtype, as the projection would be."""
    hidden, weight = _in_autocast_dtype(hidden, weight)
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction=reduction)


def head_log_probs(
    token_log_probs: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` with the entropy, under autocast as `head_loss`."""
    hidden, weight = _in_autocast_dtype(hidden, weight)
    return token_log_probs(hidden, weight, targets, temperature=temperature, return_entropy=True)


def _in_autocast_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight
