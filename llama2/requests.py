"""What `serve` takes and gives: requests and results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.decoding.sampling import check_sampling
from llama2.generate import as_stop_ids, check_tokens
from llama2.model import Llama2


@dataclass(frozen=True)
class Request:
    """A prompt of token ids to continue; the other settings are as in `generate`.

    The random numbers depend only on the seed; None uses a new one.

    Attributes:
        stop: called after each new token with all new tokens; the request ends when it returns
            True.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: Iterable[int] = ()
    stop: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", as_stop_ids(self.stop_ids))


@dataclass(frozen=True)
class Result:
    """The new tokens of request number `index`; the last one is the stop token if there was one.

    Attributes:
        error: why the request ended early: the model's logits are NaN or infinite. Otherwise None.
    """

    index: int
    request: Request
    tokens: list[int]
    error: str | None = None

    @property
    def finish_reason(self) -> str:
        """ "stop" after a stop token, "length" after max_new_tokens, "error"."""
        if self.error is not None:
            return "error"
        stopped = bool(self.tokens) and self.tokens[-1] in self.request.stop_ids
        return "stop" if stopped else "length"


def seed_of(seed: int | None, *place: int) -> int | None:
    """Returns a seed for one of many requests, which differs between places and is the same in a
    resumed run. None stays None.

    Args:
        place: ints of at least 0.
    """
    if seed is None:
        return None
    return int(np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)[0])


def check_request(model: Llama2, cache: PagedKVCache, request: Request) -> None:
    """Checks that `serve` can finish a request.

    Raises:
        TypeError: `request` is not a Request.
        ValueError: as `generate`, or its tokens need more pages than the cache has.
    """
    if not isinstance(request, Request):
        raise TypeError(f"request: expected a Request; got a {type(request).__name__}")
    check_tokens(model.config, [request.prompt], request.max_new_tokens, request.stop_ids)
    check_sampling(request.temperature, request.top_p, request.seed)
    if request.max_new_tokens == 0:
        return
    # The last new token is never an input, so it needs no place in the cache.
    num_tokens = len(request.prompt) + request.max_new_tokens - 1
    pages = cache.pages_for(num_tokens)
    if pages > cache.num_pages:
        raise ValueError(
            f"num_pages: expected at least {pages} pages of {cache.page_size} for "
            f"{len(request.prompt)} + {request.max_new_tokens} tokens; got {cache.num_pages}"
        )
    if num_tokens > cache.max_seq_len:
        raise ValueError(
            f"max_seq_len: expected a cache for at least {num_tokens} tokens; got "
            f"{cache.max_seq_len}"
        )
