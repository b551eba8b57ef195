"""How many pages a cache needs for the sequences at hand, and how many fit in memory."""

from collections.abc import Sequence

import torch

from llama2.accounting import kv_bytes_per_token
from llama2.config import ModelConfig
from llama2.placement import free_bytes


def page_bytes(config: ModelConfig, dtype: torch.dtype, page_size: int) -> int:
    """Keys and values of the tokens of a page, in all layers."""
    return kv_bytes_per_token(config, dtype.itemsize) * page_size


def fitting_pages(
    config: ModelConfig,
    lengths: Sequence[int],
    *,
    max_batch: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Pages that `max_batch` of the longest sequences fill, at most those that fit in half of the
    free memory, of which there may be none.

    Args:
        lengths: tokens of the sequences, their new ones included; the model's max_seq_len at most
            counts.
    """
    longest = sorted(min(length, config.max_seq_len) for length in lengths)[-max_batch:]
    wanted = sum(-(-max(length, 1) // page_size) for length in longest)
    fitting = int(free_bytes(device) / 2 / page_bytes(config, dtype, page_size))
    return min(max(wanted, 1), fitting)
