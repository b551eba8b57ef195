"""Targets of a loss: the next token everywhere except where padding or packing excludes it."""

import torch
from torch import Tensor

from gqa_kernels.positions import packed_positions
from gqa_kernels.runtime import arguments

IGNORED = -100  # a target without a loss


def check_ids(tokens: Tensor, vocab_size: int) -> None:
    """Checks the ids of tokens on the CPU; on a GPU the check would have to wait for the device.

    Raises:
        TypeError: the tokens are not ints.
        ValueError: one is outside [0, vocab_size).
    """
    if torch.compiler.is_compiling() or type(tokens) is not Tensor or tokens.device.type != "cpu":
        return
    arguments.tensor("tokens", tokens, dtypes=arguments.INTS)
    if tokens.numel() and not (
        (least := tokens.min()) >= 0 and (most := tokens.max()) < vocab_size
    ):
        wrong = least if least < 0 else most
        raise ValueError(f"tokens: expected ids in [0, {vocab_size}); got {wrong.item()}")


def positions_of(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns the positions of packed tokens; tokens after the last sequence have position 0."""
    if tokens.shape[0] != 1:
        raise ValueError(f"tokens: expected [1, total] with cu_seqlens; got {list(tokens.shape)}")
    return packed_positions(cu_seqlens, tokens.shape[1])


def targets_of(tokens: Tensor, num_valid: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the token to predict at each place except the last, or IGNORED; see `Llama2.loss`."""
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens: expected [batch, seq_len + 1] with seq_len ≥ 1; got {list(tokens.shape)}"
        )
    batch, columns = tokens.shape
    targets = tokens[:, 1:].long()
    if cu_seqlens is not None:
        if num_valid is not None:
            raise ValueError("num_valid: expected none with cu_seqlens; got both")
        ignored = positions_of(tokens, cu_seqlens)[:, 1:] == 0
        targets = targets.masked_fill(ignored, IGNORED)
    elif num_valid is not None:
        arguments.tensor("num_valid", num_valid, shape=(batch,), dtypes=arguments.INTS)
        column = torch.arange(1, columns, device=tokens.device)
        targets = targets.masked_fill(column >= num_valid[:, None], IGNORED)
    return targets


def count_predictions(
    tokens: Tensor, *, num_valid: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Returns how many tokens `Llama2.loss` of these arguments predicts, int64, on their device."""
    return (targets_of(tokens, num_valid, cu_seqlens) != IGNORED).sum()


def divisor(targets: Tensor, num_predictions: Tensor | float | None) -> Tensor | float:
    """Returns the number that divides the sum of the losses."""
    if num_predictions is None:
        return (targets != IGNORED).sum()
    if isinstance(num_predictions, Tensor) and num_predictions.dim():
        got = list(num_predictions.shape)
        raise ValueError(f"num_predictions: expected a scalar; got shape {got}")
    return num_predictions
