"""Continuous batching: requests join and leave the batch between any two steps.

Yu et al. 2022 (Orca, OSDI). Pages and preemption as in Kwon et al. 2023, arXiv:2309.06180; prompts
in chunks as in Agrawal et al. 2024, arXiv:2403.02310.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from llama2.cache.page_pool import OutOfPages
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.decoding.graphs import can_capture, on_gpu
from llama2.decoding.paged_decode import PagedDecode
from llama2.decoding.sampling import is_whole, uniform_draws
from llama2.decoding.weights import fingerprint, in_own_dtype
from llama2.generate import drawn_ids
from llama2.model import Llama2
from llama2.requests import Request, Result, check_request

DEFAULT_PREFILL_BUDGET = 512  # tokens of prompts per step
_NO_TOKEN = -2  # pads stop_ids; −1 marks a token sampled from logits that are not finite


@dataclass(eq=False)
class _Running:
    index: int
    request: Request
    uniform: np.ndarray  # float32 [max_new_tokens], the random numbers of `sample`
    new: list[int] = field(default_factory=list)
    row: int = -1
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.new]


def serve(
    model: Llama2,
    requests: Iterable[Request],
    *,
    cache: PagedKVCache,
    max_batch: int | None = None,
    capture: bool | None = None,
    vocab_size: int | None = None,
    prefill_budget: int | None = DEFAULT_PREFILL_BUDGET,
) -> Iterator[Result]:
    """Continues every request, on the model's device and in its dtype, also under torch.autocast;
    yields results in the order in which they finish.

    A step adds one token to each running request. It also prefills at most `prefill_budget` tokens
    of prompts, one prompt after another, and adds the first token to each request whose prompt is
    then complete; a longer prompt continues in the next steps, in one batch with the running
    requests. Between two tokens of a running request, the model therefore computes at most
    `prefill_budget` tokens of other prompts, however long they are.

    Requests are admitted in order, when a row and pages are free. Requests with the same prompt
    that start in the same step share its prefill. Other requests share full pages with earlier
    requests that have the same prefix, as far as these have been computed. When pages run out, the
    request admitted last is preempted: it frees its pages and later resumes from its tokens. Greedy
    tokens are those of `generate`, up to rounding differences between batch sizes and between
    chunks; in a quantised cache, all but the first chunk of a prompt attend to quantised keys and
    values. Sampled tokens use the random numbers of `generate` for the request alone, with the
    request's seed.

    Args:
        requests: read one at a time, when there is room.
        cache: of the model's `cache_config`, dtype and device, empty or not. The requests' rows are
            freed when the iterator ends, fails or is closed. Pages of an earlier call are reused if
            it had the same weights: `serve` reads the weights once to compare them, and they must
            not change before the iterator ends.
        max_batch: most requests at once; None means the cache's number of rows.
        capture: whether decode steps are captured in CUDA graphs, as in `Generator`.
        vocab_size: as in `Generator`.
        prefill_budget: most tokens of prompts per step; 0 or None prefills every prompt at once.
    Raises:
        ValueError: on the call: `max_batch` is outside [1, cache.max_batch], sequences of the cache
            are in use, or `prefill_budget` is not such an int; later: `check_request` refuses a
            request.
    """
    most = cache.max_batch if max_batch is None else max_batch
    if not is_whole(most) or not 1 <= most <= cache.max_batch:
        raise ValueError(
            f"max_batch: expected an int from 1 to the cache's {cache.max_batch}; got {most!r}"
        )
    if cache.num_free_rows < cache.max_batch:
        raise ValueError(
            f"cache: expected no sequences in use; got {cache.max_batch - cache.num_free_rows}"
        )
    if prefill_budget is not None and (not is_whole(prefill_budget) or prefill_budget < 0):
        raise ValueError(
            f"prefill_budget: expected an int of at least 0, or None; got {prefill_budget!r}"
        )
    drawn = drawn_ids(model.config, vocab_size)
    budget = prefill_budget or sys.maxsize
    return _Server(model, cache, most, budget, can_capture(model, capture), drawn).run(requests)


class _Server:
    """The state of one call of `serve`: running and waiting requests, and the work of a step.

    Attributes:
        prefilling: the request admitted last, while its prompt is incomplete; it is not in
            `running`.
        budget_left: how many tokens of prompts the present step may still compute.
        ahead: whether the model's next step is enqueued before the host reads the last step's
            tokens, so that the GPU works while the host plans. A request that ends at a stop token
            then goes through one step more than needed.
    """

    def __init__(
        self,
        model: Llama2,
        cache: PagedKVCache,
        max_batch: int,
        prefill_budget: int,
        capture: bool,
        vocab_size: int,
    ) -> None:
        self.model, self.cache, self.max_batch = model, cache, max_batch
        self.prefill_budget = self.budget_left = prefill_budget
        self.decoder = PagedDecode(model, cache, vocab_size, capture=capture)
        self.ahead = on_gpu(model)
        self.running: list[_Running] = []  # in the order of admission
        self.prefilling: _Running | None = None
        self.waiting: deque[_Running] = deque()  # read or preempted; the first is admitted first
        self.done: list[_Running] = []
        self._rows = np.empty(0, dtype=np.int64)  # of `running`
        self._drawn: Callable[[], np.ndarray] | None = None  # the last sampled tokens, until read
        # By row: the last token that was read; max_new_tokens; stop_ids; whether it has a `stop`.
        self._tokens = np.zeros(cache.max_batch, dtype=np.int64)
        self._limits = np.zeros(cache.max_batch, dtype=np.int64)
        self._stop_ids = np.full((cache.max_batch, 0), _NO_TOKEN, dtype=np.int64)
        self._is_asked = np.zeros(cache.max_batch, dtype=bool)

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        incoming = self._read(requests)
        self.cache.computed_with(self.model.cache_config, fingerprint(self.model))
        try:
            while True:
                self.budget_left = self.prefill_budget
                if self.ahead:
                    self._decode()
                self._collect()
                for finished in self.done:
                    yield Result(finished.index, finished.request, finished.new, finished.error)
                self.done.clear()
                if not self.ahead:
                    self._decode()
                self.cache.tell(self._rows, self._tokens[self._rows])
                self._prefill(incoming)
                if self.running:
                    self._draw()
                elif self.prefilling is None and not self.done:
                    return
        finally:
            for request in self.running:
                self.cache.free(request.row)
            if self.prefilling is not None:
                self.cache.free(self.prefilling.row)

    def _read(self, requests: Iterable[Request]) -> Iterator[_Running]:
        for index, request in enumerate(requests):
            try:
                check_request(self.model, self.cache, request)
            except ValueError as error:
                raise ValueError(f"requests[{index}]: {error}") from error
            uniform = uniform_draws(request.seed, 0, request.max_new_tokens)  # as of one prompt
            yield _Running(index, request, uniform)

    def _decode(self) -> None:
        """Passes the last token of every request that needs another one through the model, with
        the next chunk of `prefilling` if there is one. When pages run out, it collects tokens so
        that requests can end, and preempts the request admitted last."""
        while True:
            has_more = self.decoder.num_drawn[self._rows] < self._limits[self._rows]
            rows = self._rows[has_more]
            if not len(rows):
                return
            try:
                self.cache.grow(rows)
                break
            except OutOfPages:
                if self._drawn is not None:
                    self._collect()
                else:
                    self._preempt()
        if self.prefilling is not None:
            self._compute(rows)
            return
        with in_own_dtype(self.model):
            self.decoder.decode(self.cache.decode(rows))

    def _preempt(self) -> None:
        youngest, self.prefilling = self.prefilling, None
        if youngest is None:
            youngest = self.running.pop()
            self._rows = self._rows[:-1]
        self.cache.free(youngest.row)
        self.waiting.appendleft(youngest)

    def _prefill(self, incoming: Iterator[_Running]) -> None:
        """Computes what is left of the step's budget: tokens of `prefilling`, then of the requests
        that it admits in order until one does not fit."""
        started: dict[tuple[int, ...], int] = {}  # rows by tokens
        while self.prefilling is not None or self._admit(incoming, started):
            row = self.prefilling.row
            if self.cache.num_pending(row):  # none of a fork
                if self.budget_left:
                    self._compute()
                if self.cache.num_pending(row):
                    return
            started[tuple(self.prefilling.tokens)] = row
            self._begin()

    def _admit(self, incoming: Iterator[_Running], started: dict[tuple[int, ...], int]) -> bool:
        """Admits the next request, as `prefilling`, if it fits and the step has tokens left for it.
        Returns whether it did.

        A request with the same tokens as another that starts in the same step is a fork of it,
        which needs no tokens and takes no page yet. One free page per running request is kept for
        growth: a fork copies its last page there, if that page is not full, and a preempted request
        would otherwise be admitted at once and preempted again.
        """
        if len(self.running) == self.max_batch:
            return False
        if not self.waiting:
            self.waiting.extend(islice(incoming, 1))
            if not self.waiting:
                return False
        request = self.waiting[0]
        if request.request.max_new_tokens == 0:
            self.done.append(self.waiting.popleft())
            return False  # to yield its result before more are read
        tokens = tuple(request.tokens)
        leader = started.get(tokens)
        if leader is None and not self.budget_left:
            return False
        pages = self.cache.pages_to_admit(tokens) if leader is None else 0
        if self.running and pages + len(self.running) > self.cache.num_free_pages:
            return False
        request.row = self.cache.admit(tokens) if leader is None else self.cache.fork(leader)
        self.prefilling = self.waiting.popleft()
        if leader is not None:
            self.decoder.states[request.row] = self.decoder.states[leader]
        return True

    def _compute(self, decoding: Sequence[int] | np.ndarray = ()) -> None:
        """Passes the next chunk of `prefilling` through the model, in one batch with the latest
        tokens of the rows `decoding`."""
        row = self.prefilling.row
        count = min(self.cache.num_pending(row), self.budget_left)
        self.budget_left -= count
        with in_own_dtype(self.model):
            self.decoder.compute(self.cache.prefill(row, count, decoding=decoding))

    def _begin(self) -> None:
        """Makes `prefilling` a running request."""
        running, self.prefilling = self.prefilling, None
        self.running.append(running)
        row, request = running.row, running.request
        self._rows = np.append(self._rows, row)
        self._limits[row], self._is_asked[row] = request.max_new_tokens, request.stop is not None
        if (more := len(request.stop_ids) - self._stop_ids.shape[1]) > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, more)), constant_values=_NO_TOKEN)
        self._stop_ids[row] = _NO_TOKEN
        self._stop_ids[row, : len(request.stop_ids)] = [*request.stop_ids]
        self.decoder.begin(
            row, len(running.new), running.uniform, request.temperature, request.top_p
        )

    def _draw(self) -> None:
        """Samples a token for every running request; `_collect` reads it."""
        with in_own_dtype(self.model):
            self._drawn = self.decoder.draw(self._rows)

    def _collect(self) -> None:
        """Reads the tokens that were sampled last and ends finished requests."""
        if self._drawn is None:
            return
        self._tokens, self._drawn = self._drawn().copy(), None
        rows, tokens = self._rows, self._tokens[self._rows]
        for running, token in zip(self.running, tokens.tolist(), strict=True):
            running.new.append(token)
        is_broken = tokens < 0
        has_ended = is_broken | (self._stop_ids[rows] == tokens[:, None]).any(axis=1)
        for index in (self._is_asked[rows] & ~has_ended).nonzero()[0].tolist():
            running = self.running[index]
            has_ended[index] = running.request.stop(running.new)
        has_ended |= self.decoder.num_drawn[rows] >= self._limits[rows]
        if has_ended.any():
            self._end(has_ended, is_broken)

    def _end(self, has_ended: np.ndarray, is_broken: np.ndarray) -> None:
        for index in has_ended.nonzero()[0].tolist():
            running = self.running[index]
            self.cache.free(running.row)
            if is_broken[index]:
                del running.new[-1]
                running.error = (
                    f"model: expected finite logits; got NaN or infinity at new token "
                    f"{len(running.new)} in {self.decoder.states.dtype}"
                )
                self.cache.forget()  # no other request may reuse its pages
            self.done.append(running)
        left = (~has_ended).nonzero()[0]
        self.running = [self.running[index] for index in left.tolist()]
        self._rows = self._rows[left]
