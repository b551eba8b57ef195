"""A batch of sequences on a contiguous cache: its state on the device and its decode step.

A step reads and writes tensors at fixed addresses and never synchronises, so that on a GPU it can
be captured once and replayed. The device also ends rows, at a stop token or when logits are not
finite. Ended rows, and rows without a prompt, attend to nothing and write nothing.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llama2.cache.kv_cache import CacheStep, KVCache
from llama2.cache.transfer import host_tokens, to_host
from llama2.decoding.graphs import Step
from llama2.decoding.sampling import in_float32, sample
from llama2.model import Llama2


class Batch:
    """What `DecodeBatch` and `SpeculativeBatch` share: which rows go on, how they are sampled, and
    steps.

    Args:
        cache: the rows' keys and values; nothing else may write to it.
        vocab_size: only ids below it are sampled.
        capture: whether steps are captured in CUDA graphs. The model's parameters must then keep
            their addresses.
    """

    def __init__(self, model: Llama2, cache: KVCache, vocab_size: int, *, capture: bool) -> None:
        self.stored, self._cache, self._model = cache.stored, cache, model
        self._vocab_size = vocab_size
        batch, config = len(cache.seq_lens), model.config
        self._device = device = cache.seq_lens.device
        self._ahead = 1 if device.type == "cuda" else 0  # steps enqueued before one is read
        self._rows = torch.arange(batch, device=device)
        self._running = torch.zeros(batch, dtype=torch.bool, device=device)
        self._temperature = torch.zeros(batch, dtype=torch.float32, device=device)
        self._top_p = torch.ones(batch, dtype=torch.float32, device=device)
        self._is_stop = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        self._steps = {greedy: Step(capture=capture) for greedy in (True, False)}

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns the prompts on the device, right-padded, and the number of tokens of each."""
        longest = max(map(len, prompts))
        tokens = [[*p, *[0] * (longest - len(p))] for p in prompts]
        num_valid = [len(p) for p in prompts]
        return tuple(torch.tensor(x, device=self._device) for x in (tokens, num_valid))

    def _begin(
        self,
        tokens: Tensor,
        num_valid: Tensor,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
    ) -> Tensor:
        """Returns the states of the last token of every row, `[batch, hidden_size]`."""
        device, count = self._device, len(tokens)
        self._running.copy_(self._rows < count)
        self._temperature.fill_(in_float32(temperature))
        self._top_p.fill_(top_p)
        self._is_stop.zero_()
        self._is_stop[torch.tensor(stop_ids, dtype=torch.int64, device=device)] = True
        states = self._model.hidden_states(tokens, self._cache.first(count), num_valid)
        last = states.new_zeros(len(self._rows), states.shape[-1])
        last[:count] = states[self._rows[:count], num_valid - 1]
        return last

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        if self._device.type == "cuda":
            return torch.cuda.device(self._device)
        return contextlib.nullcontext()

    def _fetch(self, values: Tensor, host: Tensor) -> Callable[[], np.ndarray]:
        """Enqueues the copy of the rows' values to `host`, `[number of prompts, …]`, and returns a
        function that waits for it."""
        with self._on_device():
            return to_host(values[: len(host)], host)


class DecodeBatch(Batch):
    """Continues batches of up to as many prompts as `cache` has rows; arguments as for `Batch`."""

    def __init__(self, model: Llama2, cache: KVCache, vocab_size: int, *, capture: bool) -> None:
        super().__init__(model, cache, vocab_size, capture=capture)
        batch, longest, device = len(cache.seq_lens), model.config.max_seq_len, self._device
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._num_drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(longest, batch, dtype=torch.int64, device=device)
        self._uniform = torch.zeros(batch, longest, dtype=torch.float32, device=device)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        uniform: Tensor,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of all rows, step by step, a list of one token for each row; −1 for
        a row whose logits are not finite.

        On a GPU, a step is enqueued before the host waits for the tokens of the previous one, so
        that the GPU never idles.

        Args:
            uniform: float32 `[number of prompts, steps]` on the CPU, the random numbers of
                `sample`.
        """
        num_steps, greedy = uniform.shape[1], temperature == 0
        with self._on_device():
            self._num_drawn.zero_()
            self._uniform[: len(prompts), :num_steps] = uniform.to(self._device)
            last = self._begin(*self._padded(prompts), temperature, top_p, stop_ids)
            self._draw(last, greedy)
        host = host_tokens(num_steps, len(prompts), device=self._device)
        fetched = deque([self._fetch(self._drawn[0], host[0])])
        for index in range(1, num_steps):
            if len(fetched) > self._ahead:
                yield fetched.popleft()()[:, None].tolist()
            with self._on_device():
                self._steps[greedy](lambda: self._step(greedy))
            fetched.append(self._fetch(self._drawn[index], host[index]))
        while fetched:
            yield fetched.popleft()()[:, None].tolist()

    def _step(self, greedy: bool) -> None:
        self._draw(self._model.hidden_states(self._tokens[:, None], self)[:, 0], greedy)

    def _draw(self, last: Tensor, greedy: bool) -> None:
        uniform = self._uniform.index_select(1, self._num_drawn)[:, 0]
        temperature = 0.0 if greedy else self._temperature
        logits = self._model.lm_head(last)[:, : self._vocab_size]
        drawn = sample(self._model.sample_tokens, logits, uniform, temperature, self._top_p)
        self._drawn.index_copy_(0, self._num_drawn, drawn[None])
        self._num_drawn += 1
        self._tokens.copy_(drawn.clamp(min=0))
        self._running &= (drawn >= 0) & ~self._is_stop[self._tokens]

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step of the running rows' tokens; part of the `Cache` interface."""
        lengths, running = self._cache.seq_lens, self._running
        slots = torch.where(running, self._rows * self._cache.capacity + lengths, -1)
        seq_lens = torch.where(running, lengths + 1, 0)
        return CacheStep(self.stored, lengths[:, None], slots[:, None], seq_lens)

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        self._cache.seq_lens += self._running
