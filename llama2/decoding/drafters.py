"""Drafters of speculative decoding: state and work on the device, without a synchronisation."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama2.cache.kv_cache import CacheStep, KVCache
from llama2.decoding.sampling import sample
from llama2.model import Llama2

_NO_TOKEN = -1  # before the first token of a sequence


@dataclass(frozen=True)
class Rows:
    """The sequences of a batch, at fixed addresses.

    Attributes:
        tokens: int64 `[batch, longest]`, prompts and new tokens; what follows a sequence's last
            token is meaningless.
        last: int32 `[batch]`, the position of the sequence's last token; those before are in the
            model's cache.
        running: bool `[batch]`, the rows that go on; the others need no draft.
        uniform: float32 `[batch, longest]`, the uniform number of the token at each position.
        temperature, top_p: float32 `[batch]`.
    """

    tokens: Tensor
    last: Tensor
    running: Tensor
    uniform: Tensor
    temperature: Tensor
    top_p: Tensor

    def next_positions(self, num_tokens: int) -> Tensor:
        """Returns the positions of the last token and those after it, int64 `[batch, num_tokens]`;
        for a row that has ended, positions from 0."""
        offsets = torch.arange(num_tokens, device=self.last.device)
        return torch.where(self.running, self.last, 0)[:, None] + offsets


def cache_step(cache: KVCache, positions: Tensor, running: Tensor, max_seq_len: int) -> CacheStep:
    """Returns the step of tokens at consecutive positions, int64 `[batch, num_tokens]`. Rows that
    are not running write nothing and attend to nothing.

    Drafted tokens may have positions beyond a sequence's end and beyond `max_seq_len`, where the
    rotary table ends: these are rotated as its last position, and never accepted.
    """
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    slots = torch.where(running[:, None], rows * cache.capacity + positions, -1)
    seq_lens = torch.where(running, positions[:, -1] + 1, 0).to(torch.int32)
    return CacheStep(cache.stored, positions.clamp(max=max_seq_len - 1), slots, seq_lens)


class Drafter(Protocol):
    """Guesses the next tokens of sequences."""

    num_tokens: int

    def begin(self, prompts: Tensor, num_valid: Tensor) -> None:
        """Starts with new prompts, int64 `[count, longest]`, right-padded, in the first rows."""

    def draft(self, rows: Rows, greedy: bool) -> Tensor:
        """Returns int64 `[batch, num_tokens]`; −1 where there is no guess. `greedy` says that all
        temperatures are 0."""


class LookupDrafter:
    """See `PromptLookup`.

    A guess longer than what follows the chosen place goes on with the guess itself, so that a
    sequence that repeats itself with a short period is continued with that period.
    """

    def __init__(self, num_tokens: int, max_ngram: int) -> None:
        self.num_tokens, self._max_ngram = num_tokens, max_ngram

    def begin(self, prompts: Tensor, num_valid: Tensor) -> None:
        pass

    def draft(self, rows: Rows, greedy: bool) -> Tensor:
        tokens, last = rows.tokens, rows.last[:, None].long()
        width = min(self._max_ngram, tokens.shape[1])
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # Of the tokens up to each place, the last `width`, the latest first.
        ngrams = pad(tokens, (width - 1, 0), value=_NO_TOKEN).unfold(1, width, 1).flip(-1)
        own = ngrams.gather(1, last[:, :, None].expand(-1, -1, width))
        num_equal = (ngrams == own).cumprod(-1).sum(-1)
        score = torch.where(places < last, num_equal * len(places) + places, -1)
        place = score.argmax(-1, keepdim=True)
        period = (last - place).clamp(min=1)  # a row without a prompt has no earlier place
        offsets = torch.arange(self.num_tokens, device=tokens.device)
        return tokens.gather(1, place + 1 + offsets % period)


class ModelDrafter:
    """See `DraftModel`. It is the cache that its model uses, too.

    Each draft begins with the last two tokens of a sequence: the last but one has no entry in the
    cache if it was the last guess of the previous draft, and otherwise gets the same entry again.

    Args:
        cache: of the draft model, with the rows and the capacity of the model's.
        vocab_size: only ids below it are drafted.
    """

    def __init__(self, model: Llama2, cache: KVCache, vocab_size: int, num_tokens: int) -> None:
        self.num_tokens, self.stored = num_tokens, cache.stored
        self._model, self._cache, self._vocab_size = model, cache, vocab_size

    def begin(self, prompts: Tensor, num_valid: Tensor) -> None:
        self._model.hidden_states(prompts, self._cache.first(len(prompts)), num_valid)

    def draft(self, rows: Rows, greedy: bool) -> Tensor:
        self._running = rows.running
        self._positions = (rows.next_positions(2) - 1).clamp(min=0)
        tokens, drafts = rows.tokens.gather(1, self._positions), []
        for _ in range(self.num_tokens):
            states = self._model.hidden_states(tokens, self)[:, -1]
            self._positions = self._positions[:, -1:] + 1
            logits = self._model.lm_head(states)[:, : self._vocab_size]
            uniform = rows.uniform.gather(1, self._positions)[:, 0]
            temperature = 0.0 if greedy else rows.temperature
            drawn = sample(self._model.sample_tokens, logits, uniform, temperature, rows.top_p)
            drafts.append(drawn)
            tokens = drawn.clamp(min=0)[:, None]
        return torch.stack(drafts, dim=1)

    def reserve(self, batch: int, num_tokens: int) -> CacheStep:
        """Returns the step at the present positions; part of the `Cache` interface."""
        max_seq_len = self._model.config.max_seq_len
        return cache_step(self._cache, self._positions, self._running, max_seq_len)

    def advance(self, num_tokens: int, valid: Tensor | None = None) -> None:
        """Does nothing: `draft` counts the positions."""
