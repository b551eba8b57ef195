"""The loss of hidden states under the projection onto the vocabulary, without storing the
logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gqa_kernels.runtime import arguments
from llama2.targets import IGNORED


def check_targets(head: nn.Module, tokens: Tensor, targets: Tensor | None, reduction: str) -> None:
    """Checks the arguments of `Llama2.forward`; see there for the errors."""
    if targets is None:
        if reduction != "none":
            raise ValueError(f"targets: expected a tensor with reduction {reduction!r}; got None")
        return
    arguments.tensor("targets", targets, dtypes=arguments.INTS, shape=tuple(tokens.shape))
    check_head(head)


def check_head(head: nn.Module) -> None:
    """Raises NotImplementedError unless the head is a plain nn.Linear without a bias."""
    if type(head).forward is not nn.Linear.forward or head.bias is not None:
        raise NotImplementedError(
            "lm_head: expected a plain torch.nn.Linear without a bias, as the loss does not "
            f"compute logits; got {head}"
        )


def head_loss(
    linear_cross_entropy: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
) -> Tensor:
    """Calls `linear_cross_entropy`; under autocast in autocast's dtype, like the projection."""
    hidden, weight = _in_autocast_dtype(hidden, weight)
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction=reduction)


def head_log_probs(
    token_log_probs: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Calls `token_log_probs` with the entropy; under autocast as `head_loss`."""
    hidden, weight = _in_autocast_dtype(hidden, weight)
    return token_log_probs(hidden, weight, targets, temperature=temperature, return_entropy=True)


def _in_autocast_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight
