"""Token generation for ragged batches, with one key/value cache and CUDA graphs of decode steps."""

import functools
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llama2.cache.kv_cache import KVCache
from llama2.config import ModelConfig
from llama2.decoding.decode_batch import DecodeBatch
from llama2.decoding.graphs import can_capture, on_gpu
from llama2.decoding.sampling import check_sampling, is_whole, uniform_draws
from llama2.decoding.weights import addresses, in_own_dtype
from llama2.model import Llama2

# On a GPU sizes are rounded up, so that calls of similar sizes reuse the cache and the graphs.
_CAPACITY_UNIT = 256
_BATCH_UNIT = 8


def generate(
    model: Llama2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Continues every prompt, on the model's device and in its dtype, also under torch.autocast.

    A `Generator` does the same and reuses its cache and CUDA graphs from call to call.

    Args:
        prompts: token ids of any lengths; a model expects BOS first (`Tokenizer.encode`).
        max_new_tokens: most tokens to add to each prompt; 0 adds none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples from the smallest set of likeliest tokens whose probabilities sum to this.
        stop_ids: tokens that end their sequence, usually `[tokenizer.eos_id]`.
        seed: the random numbers of prompt i depend only on the seed and i, not on the rest of the
            batch or the device. None uses a new seed for every call.
    Returns:
        The new tokens of each prompt. A stopped sequence ends with its stop token; one that reached
        `max_new_tokens` does not.
    Raises:
        ValueError: there is no prompt, or one is empty; a token or stop id is outside the
            vocabulary; a prompt plus `max_new_tokens` exceeds `max_seq_len`; the temperature is
            negative or not finite; top_p is outside (0, 1]; the seed is negative.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    return Generator(model).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        seed=seed,
    )


def stream(
    model: Llama2, prompts: Sequence[Sequence[int]], **settings: Any
) -> Iterator[tuple[int, int]]:
    """Yields the tokens of `generate`, with its settings, one at a time: (index of the prompt, new
    token), step by step.

    The call itself checks the arguments, before the first token is requested.
    """
    return Generator(model).stream(prompts, **settings)


class Generator:
    """Continues prompts with one model and reuses its buffers from call to call.

    It keeps its cache between calls and, on a GPU, the CUDA graphs of its decode steps: one per
    batch size (rounded up to 1, 2, 4 or a multiple of 8) and kind of sampling (greedy or not). A
    step is run once, captured once and then replayed, without separate launches, allocations or
    waits for the device; replays give the same tokens. A call that needs a longer cache or more
    rows, or that comes after the model's parameters have moved or its layers have changed, makes a
    new cache and new graphs. Use it from one thread and one CUDA stream at a time. Copies and
    pickles do not include the caches.

    Args:
        cache_dtype: dtype of the cache; None means the model's. float8_e4m3fn and int8 quantise the
            cache, which takes at most half the memory and the reads (`KVCache`).
        capture: whether steps are captured. None captures on a GPU, unless a module of the model
            has forward hooks, which a replay would not call (tensor parallelism uses such hooks).
        vocab_size: ids from this one on are never sampled; for a tokenizer with fewer ids than the
            model. None means the model's.
    Raises:
        ValueError: `capture` without a GPU or with a model that has hooks; a vocab_size that is not
            positive or exceeds the model's.
        TypeError: raised by `generate` and `stream`: cache_dtype is none of these.
    """

    def __init__(
        self,
        model: Llama2,
        *,
        cache_dtype: torch.dtype | None = None,
        capture: bool | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.model, self._cache_dtype, self._capture = model, cache_dtype, capture
        self._vocab_size = drawn_ids(model.config, vocab_size)
        self._lock = threading.Lock()  # held while a token is computed
        self._cache: KVCache | None = None
        self._batches: dict[int, DecodeBatch] = {}  # by their number of rows
        self._made_for: list[object] = []
        self._calls = itertools.count()
        self._current = -1  # the call that uses the cache
        can_capture(model, capture)

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy or pickle with the same settings, its own lock and no caches."""
        settings = {"cache_dtype": self._cache_dtype, "capture": self._capture}
        settings["vocab_size"] = self._vocab_size
        return functools.partial(type(self), **settings), (self.model,)

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
        """See the function `generate`."""
        steps = self.stream(prompts, **settings)
        continuations: list[list[int]] = [[] for _ in prompts]
        for index, token in steps:
            continuations[index].append(token)
        return continuations

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
    ) -> Iterator[tuple[int, int]]:
        """See the function `stream`. One call at a time uses the cache: requesting more tokens of
        an earlier call raises RuntimeError, as does a request while another thread's is running."""
        stop_ids = as_stop_ids(stop_ids)
        check_tokens(self.model.config, prompts, max_new_tokens, stop_ids)
        check_sampling(temperature, top_p, seed)
        prompts = [list(prompt) for prompt in prompts]  # a copy, so that they stay as checked
        return self._alone(
            self._stream(prompts, max_new_tokens, temperature, top_p, stop_ids, seed)
        )

    def _alone(self, steps: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yields the same tokens; raises RuntimeError if two threads request one at the same
        time."""
        while True:
            if not self._lock.acquire(blocking=False):
                raise RuntimeError(
                    "stream: expected one thread at a time on a Generator; got a second one"
                )
            try:
                with in_own_dtype(self.model):
                    step = next(steps, None)
            finally:
                self._lock.release()
            if step is None:
                return
            yield step

    @torch.inference_mode()
    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: frozenset[int],
        seed: int | None,
    ) -> Iterator[tuple[int, int]]:
        if max_new_tokens == 0:
            return
        self._current = call = next(self._calls)
        # The last new token is never an input, so it needs no place in the cache.
        batch = self._batch(len(prompts), max(map(len, prompts)) + max_new_tokens - 1)
        draws = [uniform_draws(seed, index, max_new_tokens) for index in range(len(prompts))]
        uniform = torch.from_numpy(np.stack(draws))
        steps = batch.run(prompts, uniform, temperature, top_p, list(stop_ids))
        running = list(range(len(prompts)))
        for step, tokens in enumerate(steps):
            for index in running:
                if tokens[index] < 0:
                    raise FloatingPointError(
                        f"model: expected finite logits; got NaN or infinity for prompts[{index}] "
                        f"at new token {step} in {self.model.lm_head.weight.dtype}"
                    )
                yield index, tokens[index]
                if self._current != call:
                    raise RuntimeError(
                        "stream: expected the latest call on a Generator; got an earlier one"
                    )
            running = [index for index in running if tokens[index] not in stop_ids]
            if not running:
                return

    def _batch(self, rows: int, capacity: int) -> DecodeBatch:
        model, weight = self.model, self.model.lm_head.weight
        if on_gpu(model):
            model.fuse_projections()  # may move parameters, so before their addresses are recorded
            rows = rounded_batch(rows)
            units = -(-capacity // _CAPACITY_UNIT)
            capacity = min(units * _CAPACITY_UNIT, model.config.max_seq_len)
        captures = can_capture(model, self._capture)
        made_for = [captures, model.cache_config, *addresses(model)]
        if self._made_for != made_for:
            self._made_for, self._cache = made_for, None
        held = (0, 0)
        if self._cache is not None:
            held = len(self._cache.seq_lens), self._cache.capacity
        needed = max(rows, held[0]), max(capacity, held[1])
        if needed != held:
            self._batches, self._cache = {}, None  # first, to free their memory
            settings = {"dtype": self._cache_dtype or weight.dtype, "device": weight.device}
            self._cache = KVCache(model.cache_config, *needed, **settings)
        if rows not in self._batches:
            self._batches[rows] = DecodeBatch(
                model, self._cache.first(rows), self._vocab_size, capture=captures
            )
        return self._batches[rows]


def drawn_ids(config: ModelConfig, vocab_size: int | None) -> int:
    """Returns how many of the model's ids may be sampled."""
    if vocab_size is None:
        return config.vocab_size
    if not is_whole(vocab_size) or not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(
            f"vocab_size: expected from 1 to the model's {config.vocab_size}; got {vocab_size!r}"
        )
    return vocab_size


def rounded_batch(batch: int) -> int:
    """Rounds a batch size up to 1, 2, 4 or a multiple of 8."""
    if batch <= 4:
        return 1 << (batch - 1).bit_length()
    return -(-batch // _BATCH_UNIT) * _BATCH_UNIT


def check_tokens(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
) -> None:
    _check_count(max_new_tokens)
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one; got none")
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise ValueError(f"{name}: expected a list of token ids; got a {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"{name}: expected at least one token (BOS); got none")
        for token in prompt:
            _check_id(name, token, config.vocab_size)
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"{name}: expected at most max_seq_len ({config.max_seq_len}) tokens with "
                f"max_new_tokens; got {len(prompt)} + {max_new_tokens}"
            )
    for stop_id in stop_ids:
        _check_id("stop_ids", stop_id, config.vocab_size)


def check_settings(
    *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None
) -> None:
    """Raises ValueError for settings that `generate` refuses."""
    _check_count(max_new_tokens)
    check_sampling(temperature, top_p, seed)


def _check_count(max_new_tokens: int) -> None:
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an int of at least 0; got {max_new_tokens!r}")


def as_stop_ids(stop_ids: Iterable[int]) -> frozenset[int]:
    try:
        return frozenset(stop_ids)
    except TypeError as error:
        raise TypeError(f"stop_ids: expected ids, such as [2]; got {stop_ids!r:.60}") from error


def _check_id(name: str, token: int, vocab_size: int) -> None:
    if not is_whole(token) or not 0 <= token < vocab_size:
        raise ValueError(f"{name}: expected token ids in [0, {vocab_size}); got {token!r}")
