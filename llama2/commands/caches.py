"""The paged cache of commands that serve many prompts at once: options and size."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.cache_size import fitting_pages, page_bytes
from llama2.model import Llama2
from llama2.placement import free_bytes


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `make_cache` reads, except --kv-cache-dtype, which
    `add_generation_options` adds."""
    add = parser.add_argument
    add("--max-batch", type=int, default=16, metavar="N", help="most prompts at once; default: 16")
    add("--page-size", type=int, default=16, metavar="N", help="tokens per page; default: 16")
    add(
        "--num-pages",
        type=int,
        metavar="N",
        help="pages of the key/value cache; default: as many as --max-batch of the given prompts "
        "can fill, up to half of the free memory. With fewer pages, prompts wait for others to "
        "finish",
    )


def make_cache(
    arguments: argparse.Namespace, model: Llama2, lengths: Sequence[int]
) -> PagedKVCache:
    """Returns an empty cache for sequences of at most these lengths in tokens, new tokens included.

    Raises:
        ValueError: an option is wrong or needs more than the free memory.
    """
    weight, config = model.lm_head.weight, model.cache_config
    dtype = CACHE_DTYPES[arguments.kv_cache_dtype] or weight.dtype
    num_pages, page_size = arguments.num_pages, max(arguments.page_size, 1)
    size = page_bytes(config, dtype, page_size)
    if num_pages is None:
        num_pages = fitting_pages(
            config,
            lengths,
            max_batch=max(arguments.max_batch, 1),
            page_size=page_size,
            dtype=dtype,
            device=weight.device,
        )
        if num_pages < 1:
            raise ValueError(
                f"--num-pages: expected memory for a page of {size:,} bytes; got none. A smaller "
                "--page-size or --kv-cache-dtype fp8 needs less"
            )
    elif num_pages * size > (free := free_bytes(weight.device)):
        raise ValueError(
            f"--num-pages: expected at most the {free // size:,} pages of {size:,} bytes that fit "
            f"in the free memory; got {num_pages:,}"
        )
    # A decode step reads as many pages of every row as the longest sequence can have.
    longest = min(max(lengths, default=1), config.max_seq_len)
    return PagedKVCache(
        replace(config, max_seq_len=longest),
        num_pages=num_pages,
        page_size=arguments.page_size,
        # Every running prompt has at least one page, so more rows than pages would stay empty.
        max_batch=min(arguments.max_batch, max(len(lengths), 1), max(num_pages, 1)),
        dtype=dtype,
        device=weight.device,
    )
