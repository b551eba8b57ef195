"""Steps of a batch in a paged cache, on tensors of fixed addresses, so that a GPU replays them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llama2.cache.kv_cache import CacheStep
from llama2.cache.paged_kv_cache import PagedBatch, PagedKVCache, to_device
from llama2.decoding.graphs import Step
from llama2.decoding.sampling import sample
from llama2.model import Llama2


class PagedDecode:
    """Decodes one token of each row, and draws ids below `vocab_size` from the states of rows.

    Attributes:
        states: `[max_batch, hidden_size]`, of each row's last token.
    """

    def __init__(
        self, model: Llama2, cache: PagedKVCache, vocab_size: int, *, capture: bool
    ) -> None:
        model.fuse_projections()
        self.stored, self._model, self._vocab_size = cache.stored, model, vocab_size
        weight, rows = model.lm_head.weight, cache.max_batch
        settings = {"dtype": weight.dtype, "device": weight.device}
        self.states = torch.zeros(rows, model.config.hidden_size, **settings)
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=weight.device)
        self._where: CacheStep | None = None
        self._settings = torch.zeros(
            3, rows, dtype=torch.float32, device=weight.device
        )  # uniform, temperature, top_p
        self._drawn = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._decode = Step(capture=capture)
        self._draw = {greedy: Step(capture=capture) for greedy in (True, False)}

    def decode(self, batch: PagedBatch) -> None:
        """Puts the states of a batch's tokens, one per row, into `states`."""
        where = batch.reserve(*self._tokens.shape)
        if self._where is None:
            own = {"positions": where.positions.clone(), "slots": where.slots.clone()}
            self._where = where._replace(**own)
        self._where.positions.copy_(where.positions)
        self._where.slots.copy_(where.slots)
        self._tokens.copy_(batch.tokens)
        self._decode(self._run_model)
        batch.advance(1)

    def draw(self, rows: Sequence[int], settings: np.ndarray) -> list[int]:
        """A token of each of `rows`, −1 where its logits are not finite. Waits for the device.

        Args:
            settings: float32 `[3, len(rows)]`: what `sample` draws by, temperatures and top_ps.
        """
        every = np.zeros(self._settings.shape, dtype=np.float32)
        every[:, rows] = settings
        self._settings.copy_(to_device(every, self._settings.device))
        greedy = not every[1].any()
        self._draw[greedy](lambda: self._sample(greedy))
        drawn = self._drawn.tolist()
        return [drawn[row] for row in rows]

    def _run_model(self) -> None:
        self.states.copy_(self._model.hidden_states(self._tokens, self)[:, 0])

    def _sample(self, greedy: bool) -> None:
        uniform, temperature, top_p = self._settings
        logits = self._model.lm_head(self.states)[:, : self._vocab_size]
        self._drawn.copy_(sample(logits, uniform, 0.0 if greedy else temperature, top_p))

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Where the batch's tokens go, as `Llama2` asks a cache. The lengths and the block table
        are the cache's own."""
        return self._where

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Nothing: a replay does not come here, `decode` counts."""
