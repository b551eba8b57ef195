"""Decode steps on a paged cache, with tensors at fixed addresses, so that a CUDA graph can replay
them.

The sampled tokens stay on the device, where the next step reads them; it can be enqueued before the
host knows them.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llama2.cache.kv_cache import CacheStep
from llama2.cache.paged_kv_cache import PagedBatch, PagedKVCache
from llama2.cache.transfer import host_tokens, to_device, to_host
from llama2.decoding.graphs import Step, on_gpu
from llama2.decoding.sampling import in_float32, sample
from llama2.model import Llama2


class PagedDecode:
    """Decodes the latest token of each row and samples ids below `vocab_size` from the rows'
    states.

    Attributes:
        states: `[max_batch, hidden_size]`, of each row's last token.
        num_drawn: int64 `[max_batch]` on the host, the number of tokens sampled for each row.
    """

    def __init__(
        self, model: Llama2, cache: PagedKVCache, vocab_size: int, *, capture: bool
    ) -> None:
        if on_gpu(model):
            model.fuse_projections()
        self.stored, self._model, self._vocab_size = cache.stored, model, vocab_size
        weight, rows = model.lm_head.weight, cache.max_batch
        device = weight.device
        settings = {"dtype": weight.dtype, "device": device}
        self.states = torch.zeros(rows, model.config.hidden_size, **settings)
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._places = torch.zeros(2, rows, 1, dtype=torch.int64, device=device)
        self._where: CacheStep | None = None
        self._settings = torch.zeros(3, rows, dtype=torch.float32, device=device)
        self._drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self._on_host = host_tokens(rows, device=device)
        # By row: the uniform numbers of all its tokens; then uniform, temperature and top_p of the
        # next.
        self._uniform = np.zeros((rows, model.config.max_seq_len), dtype=np.float32)
        self._next = np.zeros(self._settings.shape, dtype=np.float32)
        self.num_drawn = np.zeros(rows, dtype=np.int64)
        self._decode = Step(capture=capture)
        self._draw = {greedy: Step(capture=capture) for greedy in (True, False)}

    def begin(
        self, row: int, num_drawn: int, uniform: np.ndarray, temperature: float, top_p: float
    ) -> None:
        """Sets the sampling of a row, whose state is in `states`.

        Args:
            uniform: float32 `[max_new_tokens]`, a uniform number per token; the first `num_drawn`
                have been used.
        """
        self.num_drawn[row] = num_drawn
        self._uniform[row, : len(uniform)] = uniform
        self._next[1:, row] = in_float32(temperature), top_p

    def decode(self, batch: PagedBatch) -> None:
        """Decodes the latest token of each row of the batch and writes its state to `states`."""
        where = batch.reserve(*self._tokens.shape)
        if self._where is None:
            positions, slots = self._places
            self._where = where._replace(positions=positions, slots=slots)
        self._places.copy_(batch.positions_and_slots)
        self._decode(self._run_model)
        batch.advance(1)

    def compute(self, batch: PagedBatch) -> None:
        """Passes a batch of `prefill` through the model and writes the state of each row's last
        token to `states`. It is not captured, as its shape changes from step to step."""
        tokens = batch.tokens_with(self._tokens[:, 0])
        states = self._model.hidden_states(tokens, batch)[0]
        rows, last = to_device(np.stack([batch.rows, batch.last]), states.device)
        self.states[rows] = states[last]

    def draw(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Samples a token for each of `rows`. Returns a function that waits for the device and
        returns the tokens of all rows, −1 where logits are not finite; call it before the next
        `draw`.
        """
        greedy = not self._next[1, rows].any()
        if not greedy:
            self._next[0, rows] = self._uniform[rows, self.num_drawn[rows]]
            self._settings.copy_(to_device(self._next, self._settings.device))
        self.num_drawn[rows] += 1
        self._draw[greedy](lambda: self._sample(greedy))
        return to_host(self._drawn, self._on_host)

    def _run_model(self) -> None:
        self.states.copy_(self._model.hidden_states(self._tokens, self)[:, 0])

    def _sample(self, greedy: bool) -> None:
        uniform, temperature, top_p = self._settings
        logits = self._model.lm_head(self.states)[:, : self._vocab_size]
        settings = (uniform, 0.0 if greedy else temperature, top_p)
        self._drawn.copy_(sample(self._model.sample_tokens, logits, *settings))
        self._tokens.copy_(self._drawn.clamp(min=0)[:, None])

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step of the batch's tokens, with the lengths and block table of the cache;
        part of the `Cache` interface."""
        return self._where

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Does nothing: a replay does not call it, and `decode` counts the tokens."""
