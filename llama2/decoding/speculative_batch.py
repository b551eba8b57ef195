"""A batch of sequences that are decoded speculatively, as `llama2.speculation` describes.

A step reads and writes tensors at fixed addresses and never synchronises, drafts and
acceptance included, and it computes the same number of tokens for every row. Rows accept different
numbers of them: each advances by its own, and the keys and values of its rejected tokens, which lie
beyond its length, are overwritten by the next step.

Attention multiplies the values of later drafted tokens by 0, which gives NaN if they are not
finite. So a row with logits that are not finite takes another step, which guesses its last token
again, whose values are finite if the row's are, and accepts no guess. That step decides whether the
row ends.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama2.cache.kv_cache import CacheStep, KVCache
from llama2.cache.transfer import host_tokens
from llama2.decoding.decode_batch import Batch
from llama2.decoding.drafters import Drafter, Rows, cache_step
from llama2.decoding.sampling import sample
from llama2.model import Llama2

_NO_TOKEN = -2  # where a step gave a row no more tokens; −1 means that logits are not finite


class SpeculativeBatch(Batch):
    """Continues batches of up to as many prompts as `cache` has rows; arguments as for `Batch`.

    Args:
        cache: longer by at least the drafter's num_tokens than the sequences, whose last steps
            draft tokens beyond their ends.
    """

    def __init__(
        self, model: Llama2, cache: KVCache, vocab_size: int, drafter: Drafter, *, capture: bool
    ) -> None:
        super().__init__(model, cache, vocab_size, capture=capture)
        self._drafter, self._width = drafter, drafter.num_tokens + 1
        batch, longest, device = len(cache.seq_lens), cache.capacity + 1, self._device
        self._places = torch.arange(self._width, device=device)
        self._new = torch.zeros(batch, self._width, dtype=torch.int64, device=device)
        # Rows whose next draw accepts no draft, so that they end if its logits are not finite.
        self._accepts_none = torch.zeros(batch, dtype=torch.bool, device=device)
        self._end = torch.zeros(batch, dtype=torch.int64, device=device)  # the most tokens of a row
        self._sequences = Rows(
            tokens=torch.zeros(batch, longest, dtype=torch.int64, device=device),
            last=cache.seq_lens,
            running=self._running,
            uniform=torch.zeros(batch, longest, dtype=torch.float32, device=device),
            temperature=self._temperature,
            top_p=self._top_p,
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        uniform: Tensor,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
    ) -> Iterator[list[list[int]]]:
        """Yields the new tokens of all rows, step by step: of a running row usually one or more, of
        another none. −1 ends a row whose logits are not finite.

        On a GPU, a step is enqueued before the host waits for the tokens of the previous one.

        Args:
            uniform: float32 `[number of prompts, max_new_tokens]` on the CPU, the random numbers of
                `sample`.
        """
        greedy, in_flight = temperature == 0, deque()
        with self._on_device():
            self._first(prompts, uniform, temperature, top_p, stop_ids, greedy)
        shape = self._ahead + 1, len(prompts), self._width
        buffers = host_tokens(*shape, device=self._device)
        in_flight.append(self._fetch(self._new, buffers[0]))
        num_steps, remaining = 1, [uniform.shape[1]] * len(prompts)
        while in_flight or any(remaining):
            # A step in flight gives a running row at least one token, but for a repeated one.
            if len(in_flight) <= self._ahead and max(remaining) > len(in_flight):
                with self._on_device():
                    self._steps[greedy](lambda: self._step(greedy))
                in_flight.append(self._fetch(self._new, buffers[num_steps % len(buffers)]))
                num_steps += 1
                continue
            tokens = in_flight.popleft()().tolist()
            new = [[token for token in row if token != _NO_TOKEN] for row in tokens]
            for row, added in enumerate(new):
                ended = added and (added[-1] < 0 or added[-1] in stop_ids)
                remaining[row] = 0 if ended else remaining[row] - len(added)
            yield new

    def _first(
        self,
        prompts: Sequence[Sequence[int]],
        uniform: Tensor,
        temperature: float,
        top_p: float,
        stop_ids: Sequence[int],
        greedy: bool,
    ) -> None:
        """Computes the prompts and draws the first new token of each."""
        tokens, num_valid = self._padded(prompts)
        count, rows = len(prompts), self._sequences
        self._accepts_none.fill_(True)
        self._end[:count] = num_valid + uniform.shape[1]
        places = num_valid[:, None] + torch.arange(uniform.shape[1], device=self._device)
        rows.uniform[:count].scatter_(1, places, uniform.to(self._device))
        rows.tokens[:count, : tokens.shape[1]] = tokens
        last = self._begin(tokens, num_valid, temperature, top_p, stop_ids)
        self._drafter.begin(tokens, num_valid)
        positions = self._cache.seq_lens[:, None].long()
        self._draw(last[:, None], positions, positions[:, :0], greedy)

    def _step(self, greedy: bool) -> None:
        rows = self._sequences
        self._positions = rows.next_positions(self._width)
        last = rows.tokens.gather(1, self._positions[:, :1])
        drafts = torch.where(self._accepts_none[:, None], last, self._drafter.draft(rows, greedy))
        states = self._model.hidden_states(torch.cat([last, drafts.clamp(min=0)], 1), self)
        rows.last.add_(self._draw(states, self._positions + 1, drafts, greedy))

    def _draw(self, states: Tensor, positions: Tensor, drafts: Tensor, greedy: bool) -> Tensor:
        """Draws tokens, and keeps those up to the first that differs from its draft or ends its
        row.

        Args:
            states: `[batch, count, hidden_size]`, of the tokens before those that are drawn.
            positions: int64 `[batch, count]`, of the tokens that are drawn.
            drafts: int64 `[batch, count − 1]`.
        Returns:
            int64 `[batch]`, how many tokens are kept; 0 of a row that had ended, or whose next step
            repeats this one.
        """
        rows, count = self._sequences, positions.shape[1]
        logits = self._model.lm_head(states)[..., : self._vocab_size].flatten(0, 1)
        uniform = rows.uniform.gather(1, positions).flatten()
        temperature, top_p = (
            setting[:, None].expand(-1, count).flatten()
            for setting in (rows.temperature, rows.top_p)
        )
        settings = uniform, 0.0 if greedy else temperature, top_p
        drawn = sample(self._model.sample_tokens, logits, *settings).view_as(positions)
        ids = drawn.clamp(min=0)
        ends = (drawn < 0) | self._is_stop[ids] | (positions + 1 >= self._end[:, None])
        accepts = ~self._accepts_none[:, None]
        accepted = (drafts == drawn[:, :-1]) & ~ends[:, :-1] & accepts
        kept = pad(accepted.cumprod(1), (1, 0), value=1).bool() & self._running[:, None]
        doubtful = kept & (drawn < 0) & accepts
        kept &= ~doubtful
        self._accepts_none.copy_(doubtful.any(1))
        rows.tokens.scatter_(1, positions, ids)  # of the rejected ones too, beyond the row's end
        self._new.fill_(_NO_TOKEN)
        self._new[:, :count] = torch.where(kept, drawn, _NO_TOKEN)
        self._running &= ~(kept & ends).any(1)
        return kept.sum(1)

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step at the present positions; part of the `Cache` interface."""
        max_seq_len = self._model.config.max_seq_len
        return cache_step(self._cache, self._positions, self._running, max_seq_len)

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Does nothing: how many tokens are kept is not known until they are drawn."""
