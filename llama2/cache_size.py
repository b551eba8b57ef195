"""The number of cache pages that given sequences need and that fit in memory."""

from collections.abc import Sequence

import torch

from llama2.accounting import kv_bytes_per_token
from llama2.config import ModelConfig
from llama2.placement import free_bytes


def page_bytes(config: ModelConfig, dtype: torch.dtype, page_size: int) -> int:
    """Returns the bytes of the keys and values of one page, in all layers."""
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
    """Returns the number of pages that the `max_batch` longest sequences fill, limited to half of
    the free memory; it can be 0.

    Args:
        lengths: tokens per sequence, new tokens included; each counts as at most max_seq_len.
    """
    longest = sorted(min(length, config.max_seq_len) for length in lengths)[-max_batch:]
    wanted = sum(-(-max(length, 1) // page_size) for length in longest)
    fitting = int(free_bytes(device) / 2 / page_bytes(config, dtype, page_size))
    return min(max(wanted, 1), fitting)
