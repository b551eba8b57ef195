"""Token generation for ragged batches, with one key/value cache and CUDA graphs of decode steps."""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gqa_kernels.reference import MAX_NEW_TOKENS
from llama2.cache.kv_cache import CACHE_DTYPES, KVCache
from llama2.config import ModelConfig
from llama2.decoding.decode_batch import DecodeBatch
from llama2.decoding.drafters import Drafter, LookupDrafter, ModelDrafter
from llama2.decoding.graphs import can_capture, on_gpu
from llama2.decoding.sampling import check_sampling, is_whole, uniform_draws
from llama2.decoding.speculative_batch import SpeculativeBatch
from llama2.decoding.weights import addresses, in_own_dtype
from llama2.model import Llama2
from llama2.speculation import (
    DraftModel,
    PromptLookup,
    Speculation,
    Statistics,
    check_speculation,
)

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
    speculation: Speculation | None = None,
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
        speculation: a `PromptLookup` or a `DraftModel` that drafts tokens, of which a step accepts
            those that the model draws itself. The tokens are those without it, greedy and sampled,
            as far as matrix products round a row independently of the rows beside it.
    Returns:
        The new tokens of each prompt. A stopped sequence ends with its stop token; one that reached
        `max_new_tokens` does not.
    Raises:
        ValueError: there is no prompt, or one is empty; a token or stop id is outside the
            vocabulary; a prompt plus `max_new_tokens` exceeds `max_seq_len`; the temperature is
            negative or not finite; top_p is outside (0, 1]; the seed is negative.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    return Generator(model, speculation=speculation).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        seed=seed,
    )


def stream(
    model: Llama2,
    prompts: Sequence[Sequence[int]],
    *,
    speculation: Speculation | None = None,
    **settings: Any,
) -> Iterator[tuple[int, int]]:
    """Yields the tokens of `generate`, with its settings, one at a time: (index of the prompt, new
    token), step by step.

    The call itself checks the arguments, before the first token is requested.
    """
    return Generator(model, speculation=speculation).stream(prompts, **settings)


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
        speculation: as for `generate`. A draft model's cache is quantised like the model's, or has
            the draft model's own dtype.

    Attributes:
        statistics: of the latest call, so far, if it speculates; otherwise None.
    Raises:
        ValueError: `capture` without a GPU or with a model that has hooks; a vocab_size that is not
            positive or exceeds the model's; a draft model with another vocabulary or device.
            Raised by `generate` and `stream`: a prompt plus `max_new_tokens` exceeds the draft
            model's `max_seq_len`.
        TypeError: `speculation` is none of these. Raised by `generate` and `stream`: cache_dtype is
            none of these.
    """

    def __init__(
        self,
        model: Llama2,
        *,
        cache_dtype: torch.dtype | None = None,
        capture: bool | None = None,
        vocab_size: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        check_speculation(speculation, model)
        self.model, self._cache_dtype, self._capture = model, cache_dtype, capture
        self._vocab_size = drawn_ids(model.config, vocab_size)
        self._speculation = speculation
        self._draft = speculation.model if isinstance(speculation, DraftModel) else None
        self.statistics: Statistics | None = None
        self._lock = threading.Lock()  # held while a token is computed
        self._size = (0, 0)  # rows and capacity of the caches
        self._caches: list[KVCache] = []  # the model's, and the draft model's if there is one
        self._batches: dict[int, DecodeBatch | SpeculativeBatch] = {}  # by their number of rows
        self._made_for: list[object] = []
        self._calls = itertools.count()
        self._current = -1  # the call that uses the cache
        self._captures()

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes a copy or pickle with the same settings, its own lock and no caches."""
        settings = {"cache_dtype": self._cache_dtype, "capture": self._capture}
        settings |= {"vocab_size": self._vocab_size, "speculation": self._speculation}
        return _made_again, (type(self), self.model, settings)

    @property
    def max_seq_len(self) -> int:
        """The most tokens of a prompt with its new ones: the model's or, if that is smaller, the
        draft model's `max_seq_len`."""
        return min(model.config.max_seq_len for model in self._models())

    def _models(self) -> list[Llama2]:
        return [self.model] if self._draft is None else [self.model, self._draft]

    def _captures(self) -> bool:
        return all([can_capture(model, self._capture) for model in self._models()])

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
        longest = max(map(len, prompts)) + max_new_tokens
        check_speculation(self._speculation, self.model, longest)  # models may have moved
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
        statistics = None if self._speculation is None else Statistics()
        self.statistics = statistics
        if max_new_tokens == 0:
            return
        self._current = call = next(self._calls)
        # The last new token is never an input, so it needs no place in the cache.
        batch = self._batch(len(prompts), max(map(len, prompts)) + max_new_tokens - 1)
        draws = [uniform_draws(seed, index, max_new_tokens) for index in range(len(prompts))]
        uniform = torch.from_numpy(np.stack(draws))
        steps = batch.run(prompts, uniform, temperature, top_p, list(stop_ids))
        counts = [0] * len(prompts)  # of new tokens
        running = list(range(len(prompts)))
        for step, new in enumerate(steps):
            if step > 0 and statistics is not None:
                statistics.num_steps += len(running)
                statistics.num_new_tokens += sum(len(new[index]) for index in running)
            for index in running:
                for token in new[index]:
                    if token < 0:
                        raise FloatingPointError(
                            "model: expected finite logits; got NaN or infinity for "
                            f"prompts[{index}] at new token {counts[index]} in "
                            f"{self.model.lm_head.weight.dtype}"
                        )
                    yield index, token
                    if self._current != call:
                        raise RuntimeError(
                            "stream: expected the latest call on a Generator; got an earlier one"
                        )
                    counts[index] += 1
            running = [
                index
                for index in running
                if counts[index] < max_new_tokens and not stop_ids.intersection(new[index][-1:])
            ]
            if not running:
                return

    def _batch(self, rows: int, capacity: int) -> DecodeBatch | SpeculativeBatch:
        models = self._models()
        if on_gpu(self.model):
            for model in models:  # it may move parameters, so before their addresses are recorded
                model.fuse_projections()
            rows = rounded_batch(rows)
            units = -(-capacity // _CAPACITY_UNIT)
            capacity = min(units * _CAPACITY_UNIT, self.model.config.max_seq_len)
        captures = self._captures()
        made_for = [captures]
        for model in models:
            made_for += [model.cache_config, *addresses(model)]
        if self._made_for != made_for:
            self._made_for, self._size = made_for, (0, 0)
        needed = max(rows, self._size[0]), max(capacity, self._size[1])
        if needed != self._size:
            self._batches, self._caches = {}, []  # first, to free their memory
            self._size = (0, 0)
            self._caches = [self._cache(model, *needed) for model in models]
            self._size = needed
        if rows not in self._batches:
            self._batches[rows] = self._new_batch(rows, captures)
        return self._batches[rows]

    def _cache(self, model: Llama2, rows: int, capacity: int) -> KVCache:
        """Returns a cache with room for what the last steps draft beyond the sequences' ends."""
        weight, config = model.lm_head.weight, model.cache_config
        if self._speculation is not None:
            capacity += MAX_NEW_TOKENS  # a multiple of 16, as Triton's binaries depend on that
            config = replace(config, max_seq_len=capacity)
        dtype = self._cache_dtype
        if dtype is None or (model is not self.model and dtype not in CACHE_DTYPES.values()):
            dtype = weight.dtype
        return KVCache(config, rows, capacity, dtype=dtype, device=weight.device)

    def _new_batch(self, rows: int, captures: bool) -> DecodeBatch | SpeculativeBatch:
        cache, *others = [cache.first(rows) for cache in self._caches]
        speculation, vocab_size = self._speculation, self._vocab_size
        if speculation is None:
            return DecodeBatch(self.model, cache, vocab_size, capture=captures)
        drafter: Drafter
        if isinstance(speculation, PromptLookup):
            drafter = LookupDrafter(speculation.num_tokens, speculation.max_ngram)
        else:
            drafter = ModelDrafter(speculation.model, others[0], vocab_size, speculation.num_tokens)
        return SpeculativeBatch(self.model, cache, vocab_size, drafter, capture=captures)


def _made_again(kind: type[Generator], model: Llama2, settings: dict[str, Any]) -> Generator:
    return kind(model, **settings)


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
