"""Batched losses of continuations of texts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from llama2.head import head_loss
from llama2.model import Llama2

_MOST_LOGITS = 2**24  # logits at once when the likeliest tokens are computed


class Window(NamedTuple):
    """Inputs, and `targets` that follow the last len(targets) inputs."""

    inputs: tuple[int, ...]
    targets: list[int]


class Score(NamedTuple):
    """The score of window number `index`: −log p of its targets in nats and, if requested, the
    model's likeliest tokens in their places."""

    index: int
    losses: list[float]
    likeliest: list[int]


@torch.inference_mode()
def scores(
    model: Llama2,
    windows: Sequence[Window],
    *,
    batch_size: int,
    greedy: bool,
    show_progress: bool = True,
) -> Iterator[Score]:
    """Yields the scores of all windows, the longest first.

    Windows are packed, not padded, and only states that predict targets are projected onto the
    vocabulary. Windows with the same inputs, as for answers of one letter, go through the model
    once.

    Args:
        batch_size: distinct inputs per call.
        greedy: whether to compute the likeliest tokens, which takes a second projection.
    Raises:
        ValueError: a window has more inputs than the model's max_seq_len.
        FloatingPointError: the model computes NaN.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for index, window in enumerate(windows):
        if len(window.inputs) > model.config.max_seq_len:  # packed, its states would be NaN
            raise ValueError(
                f"windows[{index}]: expected at most max_seq_len ({model.config.max_seq_len}) "
                f"inputs; got {len(window.inputs)}"
            )
        same.setdefault(window.inputs, []).append(index)
    groups = sorted(same.values(), key=lambda group: -len(windows[group[0]].inputs))
    hidden = None if show_progress else True  # None: shown on a terminal only
    with tqdm(total=len(windows), desc="log-likelihoods", disable=hidden) as progress:
        for begin in range(0, len(groups), batch_size):
            indices = [index for group in groups[begin : begin + batch_size] for index in group]
            states, targets = _states(model, [windows[index] for index in indices])
            losses = _losses(model, states, targets)
            likeliest = _likeliest(model, states) if greedy else []
            end = 0
            for index in indices:
                start, end = end, end + len(windows[index].targets)
                yield Score(index, losses[start:end], likeliest[start:end])
            progress.update(len(indices))


def _states(model: Llama2, windows: list[Window]) -> tuple[Tensor, Tensor]:
    """Returns (states `[num_targets, hidden_size]`, targets `[num_targets]` that they predict) of
    windows, in which those with the same inputs are adjacent."""
    tokens, bounds, places, targets = [], [0], [], []
    last = None
    for window in windows:
        if window.inputs != last:
            last = window.inputs
            tokens += last
            bounds.append(len(tokens))
        places += range(len(tokens) - len(window.targets), len(tokens))
        targets += window.targets
    device = model.lm_head.weight.device

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    states = model.hidden_states(tensor(tokens)[None], cu_seqlens=tensor(bounds))
    return states[0, tensor(places)], tensor(targets)


def _losses(model: Llama2, states: Tensor, targets: Tensor) -> list[float]:
    if not len(targets):
        return []
    op, weight = model.linear_cross_entropy, model.lm_head.weight
    losses = head_loss(op, states[None], weight, targets[None], "none")[0]
    if losses.isnan().any():
        raise FloatingPointError(
            f"model: expected finite log-likelihoods; got NaN in {states.dtype}"
        )
    return losses.tolist()


def _likeliest(model: Llama2, states: Tensor) -> list[int]:
    rows = max(_MOST_LOGITS // model.config.vocab_size, 1)
    return torch.cat([model.lm_head(part).argmax(-1) for part in states.split(rows)]).tolist()
