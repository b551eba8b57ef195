"""Bits that a model needs per byte of unseen text, which is comparable between tokenizers.

Each window starts without context, so the results are upper bounds of those of a sliding window.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama2.model import Llama2


@torch.no_grad()
def bits_per_byte(
    model: Llama2, stream: np.ndarray, num_bytes: int, *, seq_len: int, batch_size: int = 16
) -> float:
    """Returns Σ −log₂ p(token) / num_bytes of a stream of ids.

    Every id of `stream` except the first is predicted once, in windows of `seq_len`.

    Args:
        stream: integer token ids `[num_tokens]`.
        num_bytes: bytes of the text in UTF-8.
    """
    num_windows = (len(stream) - 1) // seq_len
    whole = np.arange(num_windows)[:, None] * seq_len + np.arange(seq_len + 1)
    batches = [stream[whole[i : i + batch_size]] for i in range(0, num_windows, batch_size)]
    tail = stream[num_windows * seq_len :]
    if len(tail) > 1:
        batches.append(tail[None])
    nats = 0.0
    for windows in tqdm(batches, desc="held out", unit="batch", leave=False):
        nats += _nats(model, windows).sum().item()
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def bits_per_document(
    model: Llama2, documents_tokens: Sequence[np.ndarray], seq_len: int, batch_size: int = 16
) -> list[float]:
    """Returns Σ −log₂ p(token) of each document.

    Every id of a document except its first is predicted once, in windows of `seq_len` that contain
    only this document. Windows of equal length are computed in batches of at most `batch_size`; the
    size of a batch changes a sum only in the last digits.

    Args:
        documents_tokens: integer ids `[num_tokens]` of each document, usually from BOS to EOS; for
            fewer than two ids the sum is 0.
        seq_len: predicted tokens per window, at most the model's `max_seq_len`.
    """
    windows: defaultdict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for number, tokens in enumerate(documents_tokens):
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            windows[len(window)].append((number, window))
    batches = [
        same_length[start : start + batch_size]
        for same_length in windows.values()
        for start in range(0, len(same_length), batch_size)
    ]
    bits = [0.0] * len(documents_tokens)
    for batch in tqdm(batches, desc="held out", unit="batch", leave=False):
        stacked = np.stack([window for _, window in batch])
        for (number, _), value in zip(batch, _nats(model, stacked).tolist(), strict=True):
            bits[number] += value / math.log(2)
    return bits


def _nats(model: Llama2, windows: np.ndarray) -> Tensor:
    """Returns Σ −log p over each row's ids `[batch, seq_len + 1]` except the first, in float64."""
    tokens = torch.from_numpy(windows.astype(np.int64)).to(next(model.parameters()).device)
    return model.token_losses(tokens[:, :-1], tokens[:, 1:]).double().sum(1)
