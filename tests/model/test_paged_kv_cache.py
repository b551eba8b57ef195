"""Sequences in pages: what the model reads there, what they share, what is refused."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import assert_network
from small_llama import lively, random_tokens, small_config, twin
from torch import Tensor

from llama2 import Llama2
from llama2.cache.page_pool import OutOfPages
from llama2.cache.paged_kv_cache import PagedBatch, PagedKVCache

CONFIG = small_config()


@pytest.fixture
def model(device):
    return lively(CONFIG, device)


def make_cache(device, config=CONFIG, **sizes) -> PagedKVCache:
    """With NaN wherever nothing has been written."""
    sizes = {"num_pages": 12, "page_size": 4, "max_batch": 3} | sizes
    cache = PagedKVCache(config, dtype=torch.float32, device=device, **sizes)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


def poison_blank_pages(cache: PagedKVCache) -> None:
    for cached in (cache.keys, cache.values):
        cached[:, cache._pool._blank] = float("nan")


@torch.no_grad()
def run(model: Llama2, batch: PagedBatch) -> Tensor:
    return model(batch.tokens, batch)


def assert_as_alone(model: Llama2, logits: Tensor, tokens: list[int]) -> None:
    """`logits` `[n, vocab_size]` follow the last n of `tokens`, as in one forward of them all."""
    whole = torch.tensor([tokens], device=logits.device)

    @torch.no_grad()
    def alone(model: Llama2) -> Tensor:
        return model(whole)[0, -len(logits) :]

    assert_network(logits, model, alone, lambda model: alone(twin(model, dtype=torch.float64)))


def test_rows_that_are_not_in_use(device):
    cache = make_cache(device)
    row = cache.admit([1, 2])
    cache.free(row)
    calls = (cache.free, cache.fork, cache.prefill, cache.num_tokens)
    for call in (*calls, lambda row: cache.extend(row, [1]), lambda row: cache.decode([row])):
        with pytest.raises(ValueError, match=rf"row: expected one of \[\]; got {row}"):
            call(row)
    assert cache.num_free_pages == cache.num_pages


def tokens_of(cache: PagedKVCache, row: int) -> list[int]:
    return cache._ids[row, : cache.num_tokens(row)].tolist()


def snapshot(cache: PagedKVCache) -> tuple:
    """All that host and device know of who has what."""
    rows = {row: (tokens_of(cache, row), list(s.pages)) for row, s in cache._sequences.items()}
    references = [cache._pool.references(page) for page in range(cache.num_pages)]
    return rows, references, cache._table.tolist(), cache.num_free_pages, cache.num_free_rows


def check_pages(cache: PagedKVCache) -> None:
    """Every page is referred to by exactly those who have it; all others are free."""
    pages = [page for s in cache._sequences.values() for page in s.pages]
    references = [cache._pool.references(page) for page in range(cache.num_pages)]
    assert references == [pages.count(page) for page in range(cache.num_pages)]
    assert cache.num_free_pages == references.count(0)
    for row, s in cache._sequences.items():
        assert len(s.pages) == cache.pages_for(cache.num_tokens(row))
        assert cache._table[row].tolist() == s.pages + [-1] * (cache._table.shape[1] - len(s.pages))


# What the model reads.


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 3, 16, 20])
def test_prefill_and_decode_are_one_forward(chunk, page_size, model, device):
    tokens = random_tokens(device, 43).tolist()
    cache = make_cache(device, num_pages=48, page_size=page_size)
    other = cache.admit([5])  # so that the sequence is not the first, nor are its pages
    row = cache.admit(tokens[:3])
    logits = [run(model, cache.prefill(row))[0]]
    for start in range(3, 43, chunk):
        cache.extend(row, tokens[start : start + chunk])
        logits.append(run(model, cache.prefill(row))[0])
    assert cache.num_tokens(row) == 43 and cache.num_tokens(other) == 1
    assert_as_alone(model, torch.cat(logits), tokens)


@pytest.mark.parametrize("most", [3, 17])
def test_rows_of_different_pasts_decode_together(most, model, device):
    cache = make_cache(device, max_batch=5)
    tokens = {cache.admit(prompt): prompt for prompt in ([1, 2, 3], [4] * 9, [5, 6])}
    first, second, third = tokens
    run(model, cache.prefill(first))
    run(model, cache.prefill(second))
    new = {first: [7], second: [*range(8, 8 + most)]}
    for row, more in new.items():
        cache.extend(row, more)
        tokens[row] = tokens[row] + more
    batch = cache.decode(list(tokens))  # 1 and `most` new tokens, and a prompt of 2
    assert batch.tokens.shape == (5, most)
    logits = run(model, batch)
    for row, count in ((first, 1), (second, most), (third, 2)):
        assert_as_alone(model, logits[row, -count:], tokens[row])


@pytest.mark.parametrize("begins", [False, True])
def test_a_chunk_beside_rows_that_decode(begins, model, device):
    """The last token of one of these rows is known on the device alone."""
    cache = make_cache(device, max_batch=4, num_pages=24)
    tokens = {cache.admit(prompt): prompt for prompt in ([1, 2, 3], [4] * 9, [*range(10, 40)])}
    first, second, chunk = tokens
    for row, most in ((first, None), (second, None), (chunk, 7))[: 2 if begins else 3]:
        run(model, cache.prefill(row, most))
    cache.grow([second])
    cache.extend(first, [8])
    with pytest.raises(ValueError, match="row: expected one with known tokens"):
        cache.prefill(chunk, 21, decoding=[second, first]).tokens  # noqa: B018
    batch = cache.prefill(chunk, 21, decoding=[second, first])
    latest = torch.tensor([90, 91, 92, 93], device=device)
    whole = batch.tokens_with(latest)
    assert whole.shape == (1, 23)
    with torch.no_grad():
        logits = model(whole, batch)[0]
    end = 21 if begins else 28
    assert_as_alone(model, logits[:1], [*tokens[second], 90 + second])
    assert_as_alone(model, logits[1:2], [*tokens[first], 8])
    assert_as_alone(model, logits[2:], tokens[chunk][:end])
    assert cache.num_pending(chunk) == 30 - end
    assert cache.num_pending(first) == cache.num_pending(second) == 0
    cache.grow([second])
    for decoding in ([first], [chunk], [second, second]):  # without a pending token; the same rows
        with pytest.raises(ValueError, match="decoding: expected different rows but 2, with 1"):
            cache.prefill(chunk, decoding=decoding)


def test_a_step_says_where_tokens_go(device):
    cache = make_cache(device, max_batch=4)
    rows = [cache.admit(prompt) for prompt in ([1] * 6, [2] * 3, [3])]
    batch = cache.decode([rows[0], rows[2]])
    step = batch.reserve(4, 6)
    pages = cache._table[rows[0], :2].tolist()
    assert batch.tokens.tolist() == [[1] * 6, [0] * 6, [0, 0, 0, 0, 0, 3], [0] * 6]
    assert step.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0] * 6, [0] * 6, [0] * 6]
    wanted = [pages[0] * 4 + i for i in range(4)] + [pages[1] * 4, pages[1] * 4 + 1]
    alone = cache._table[rows[2], 0] * 4
    assert step.slots.tolist() == [wanted, [-1] * 6, [-1] * 5 + [alone], [-1] * 6]
    assert step.slots.dtype == torch.int64
    assert step.seq_lens.tolist() == [6, 0, 1, 0] == cache.seq_lens.tolist()
    assert step.block_table.tolist() == cache._table.tolist()
    assert cache.seq_lens.dtype == cache.block_table.dtype == torch.int32
    assert cache.keys.shape == cache.values.shape == (2, 12, 4, 2, 16)
    assert step.stored is cache.stored
    assert cache.block_table.shape == (4, 12)


def test_padding_and_idle_rows_write_nothing(model, device):
    cache = make_cache(device)
    row, idle = cache.admit([1, 2, 3]), cache.admit([4, 5])
    run(model, cache.decode([row]))
    page = cache._table[row, 0]
    written = ~cache.keys.isnan().all(-1).all(-1)  # [num_layers, num_pages, page_size]
    expected = torch.zeros_like(written)
    expected[:, page, :3] = True
    assert written.equal(expected)
    assert cache.prefill(idle).tokens.tolist() == [[4, 5]]


# What sequences share.


@pytest.mark.parametrize("length", [9, 12, 13, 40])
def test_a_common_beginning_is_shared_and_not_written_again(length, model, device):
    """Remainders of 1, 4, 5 and 32 tokens after two pages."""
    cache = make_cache(device, num_pages=16)
    prompt = random_tokens(device, 40).tolist()
    first = cache.admit(prompt[:11])
    run(model, cache.prefill(first))
    shared = cache._sequences[first].pages[:2]
    before = cache.keys[:, shared].clone(), cache.values[:, shared].clone()
    tokens = [*prompt[:8], *(96 - token for token in prompt[8:length])]
    free = cache.num_free_pages
    assert cache.pages_to_admit(tokens) == cache.pages_for(length) - 2
    second = cache.admit(tokens)
    assert cache._sequences[second].pages[:2] == shared
    assert free - cache.num_free_pages == cache.pages_for(length) - 2
    batch = cache.prefill(second)
    assert batch.tokens.tolist() == [tokens[8:]]
    assert_as_alone(model, run(model, batch)[0], tokens)
    assert before[0].equal(cache.keys[:, shared]) and before[1].equal(cache.values[:, shared])
    check_pages(cache)


def test_the_last_token_of_a_prompt_is_always_pending(model, device):
    cache = make_cache(device)
    for _ in range(2):
        row = cache.admit([1, 2, 3, 4, 5, 6, 7, 8])
        batch = cache.prefill(row)
        assert_as_alone(model, run(model, batch)[0, -1:], [1, 2, 3, 4, 5, 6, 7, 8])
    assert batch.tokens.tolist() == [[5, 6, 7, 8]]


def test_pending_pages_are_not_shared(model, device):
    cache = make_cache(device)
    first, second = cache.admit([1] * 9), cache.admit([1] * 9)
    assert not set(cache._sequences[first].pages) & set(cache._sequences[second].pages)
    assert_as_alone(model, run(model, cache.prefill(second))[0], [1] * 9)
    cache.free(first)  # which has written nothing
    assert cache._shared([1] * 9)[1] == cache._sequences[second].pages[:2]


def test_generated_tokens_are_shared_too(model, device):
    cache = make_cache(device)
    row = cache.admit([1, 2, 3])
    run(model, cache.prefill(row))
    for token in range(4, 10):
        cache.extend(row, [token])
        run(model, cache.decode([row]))
    cache.free(row)
    assert cache.num_free_pages == 12
    row = cache.admit(list(range(1, 12)))
    batch = cache.prefill(row)
    assert batch.tokens.tolist() == [[9, 10, 11]]
    assert_as_alone(model, run(model, batch)[0], list(range(1, 12)))


@pytest.mark.parametrize("length", [6, 8])
def test_a_fork_copies_what_it_would_write_to(length, model, device):
    """With a page that is full in part, and without one."""
    cache = make_cache(device)
    parent = cache.admit([*range(length)])
    run(model, cache.prefill(parent))
    free = cache.num_free_pages
    child = cache.fork(parent)
    assert cache.num_free_pages == free
    before = cache.keys[:, cache._sequences[parent].pages].clone()
    cache.extend(child, [50])
    assert cache.num_free_pages == free - 1
    of_child = run(model, cache.decode([child]))[child, -1:]
    assert before.nan_to_num(7).equal(cache.keys[:, cache._sequences[parent].pages].nan_to_num(7))
    cache.extend(parent, [60])
    assert cache.num_free_pages == free - 1 - (length == 8)  # alone again, it writes in place
    of_parent = run(model, cache.decode([parent]))[parent, -1:]
    assert_as_alone(model, of_child, [*range(length), 50])
    assert_as_alone(model, of_parent, [*range(length), 60])
    check_pages(cache)


def test_content_is_kept_until_pages_run_out(model, device):
    cache = make_cache(device, num_pages=4)
    row = cache.admit([1] * 9)
    run(model, cache.prefill(row))
    cache.free(row)
    poison_blank_pages(cache)
    assert cache.num_free_pages == 4 and cache.pages_to_admit([1] * 9) == 3
    other = cache.admit([2] * 9)  # takes the last page of the first prompt's run
    run(model, cache.prefill(other))
    cache.free(other)
    row = cache.admit([1] * 9)
    batch = cache.prefill(row)
    assert batch.tokens.shape == (1, 5)
    assert_as_alone(model, run(model, batch)[0], [1] * 9)


# Tokens that the device alone knows.


@torch.no_grad()
def test_growing_and_being_told_is_extending(model, device):
    """Also in that a page is found as soon as a token has filled it."""
    grown, extended = caches = [make_cache(device) for _ in range(2)]
    for cache in caches:
        for prompt in ([1, 2, 3], [4] * 4, [5] * 6):
            run(model, cache.prefill(cache.admit(prompt)))
    rows = np.array([0, 2])
    for step in range(6):
        tokens = [10 + step, 20 + step]
        grown.grow(rows)
        for row, token in zip(rows.tolist(), tokens, strict=True):
            extended.extend(row, [token])
        batch, expected = grown.decode(rows), extended.decode(rows)
        states = model.hidden_states(expected.tokens, batch)
        assert states[rows].equal(model.hidden_states(expected.tokens, expected)[rows])
        num_named = grown._pool.num_named
        grown.tell(rows, tokens)
        assert grown._pool.num_named - num_named == (step in (0, 1, 4, 5))
        check_pages(grown)
        assert snapshot(grown) == snapshot(extended)
    assert [len(cache._shared([1, 2, 3, *range(10, 16)])[1]) for cache in caches] == [2, 2]


def test_a_row_that_was_not_told_is_not_read(model, device):
    cache = make_cache(device)
    row = cache.admit([1, 2, 3])
    run(model, cache.prefill(row))
    with pytest.raises(ValueError, match=r"rows: expected rows that have grown; got \[0\]"):
        cache.tell([row], [4])
    cache.grow([row])
    for call in (
        lambda: cache.extend(row, [4]),
        lambda: cache.fork(row),
        lambda: cache.prefill(row).tokens,
        lambda: cache.decode([row]).tokens,
    ):
        with pytest.raises(ValueError, match="row: expected one with known tokens; got 0, 1"):
            call()
    cache.tell([row], [4])
    assert cache.prefill(row).tokens.tolist() == [[4]]
    cache.grow([row])
    cache.free(row)
    assert cache.num_free_pages == cache.num_pages and cache._pool.num_named == 0


def test_rows_grow_together_or_not_at_all(model, device):
    """Forks too: of those that share a page with room in it, all but one copy it."""
    cache = make_cache(device, num_pages=6, max_batch=4)
    rows = [cache.admit([1] * 6)]
    run(model, cache.prefill(rows[0]))
    rows += [cache.fork(rows[0]) for _ in range(2)]
    full = cache.admit([2] * 8)
    run(model, cache.prefill(full))
    state = snapshot(cache)
    with pytest.raises(OutOfPages, match="num_pages: expected 3 free pages; got 2"):
        cache.grow([*rows, full])
    assert snapshot(cache) == state
    shared = cache._sequences[rows[0]].pages[-1]
    cache.grow(rows)
    assert cache.num_free_pages == 0
    last = [cache._sequences[row].pages[-1] for row in rows]
    assert len(set(last)) == 3 and last[-1] == shared
    for page in last[:-1]:
        assert cache.keys[:, page, :2].equal(cache.keys[:, shared, :2])
    check_pages(cache)
    whole = make_cache(device, num_pages=1)
    row = whole.admit([1] * 4)
    with pytest.raises(ValueError, match="tokens: expected at most 0 more; got 1"):
        whole.grow([row])


# What is refused.


def test_running_out_of_pages_changes_nothing(model, device):
    cache = make_cache(device, num_pages=5)
    row = cache.admit([1] * 6)
    run(model, cache.prefill(row))
    other = cache.fork(row)
    state = snapshot(cache)
    with pytest.raises(OutOfPages, match="num_pages: expected 4 free pages; got 3"):
        cache.admit([1] * 20)  # shares one
    assert snapshot(cache) == state
    with pytest.raises(OutOfPages, match="num_pages: expected 4 free pages; got 3"):
        cache.extend(other, [2] * 13)  # and a copy
    assert snapshot(cache) == state
    cache.extend(other, [2] * 9)
    assert_as_alone(model, run(model, cache.prefill(other))[0], [1] * 6 + [2] * 9)
    check_pages(cache)


def test_content_that_is_about_to_be_shared_is_not_evicted(model, device):
    cache = make_cache(device, num_pages=3)
    row = cache.admit([1] * 9)
    run(model, cache.prefill(row))
    cache.free(row)
    with pytest.raises(OutOfPages, match="expected 2 free pages; got 1"):
        replace_max(cache).admit([*[1] * 8, *[2] * 8])
    assert cache.num_free_pages == 3 and len(cache._shared([1] * 9)[1]) == 2


def replace_max(cache: PagedKVCache) -> PagedKVCache:
    """The cache, with its own check of lengths out of the way."""
    cache.max_seq_len = 1000
    return cache


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_pages": 0}, "num_pages: expected at least 1; got 0"),
        ({"max_batch": 0}, "max_batch: expected at least 1; got 0"),
        ({"page_size": 0}, "page_size: expected a power of two; got 0"),
        ({"page_size": 12}, "page_size: expected a power of two; got 12"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message, device):
    with pytest.raises(ValueError, match=message):
        make_cache(device, **sizes)


def test_impossible_rows_are_refused(model, device):
    cache = make_cache(device, max_batch=2)
    for tokens in ([], [1] * 49):
        with pytest.raises(ValueError, match="tokens: expected from 1 to 48; got"):
            cache.admit(tokens)
    with pytest.raises(ValueError, match="tokens: expected from 1 to 128; got 129"):
        make_cache(device, num_pages=40).admit([1] * 129)
    row = cache.admit([1] * 20)
    with pytest.raises(ValueError, match="row: expected no pending tokens; got 20"):
        cache.fork(row)
    run(model, cache.prefill(row))
    for make in (lambda: cache.decode([row]), lambda: cache.decode([]), lambda: cache.prefill(row)):
        with pytest.raises(ValueError, match="rows: expected at least 1 pending token; got 0"):
            make()
    with pytest.raises(ValueError, match="tokens: expected at most 28 more; got 29"):
        cache.extend(row, [1] * 29)
    cache.fork(row)
    for refused in (lambda: cache.admit([1]), lambda: cache.fork(row)):
        with pytest.raises(ValueError, match="max_batch: expected a free row; got 2 sequences"):
            refused()
    check_pages(cache)


@torch.no_grad()
def test_a_batch_is_for_one_call_at_once(model, device):
    cache = make_cache(device)
    first, second = cache.admit([1, 2]), cache.admit([3, 4])
    stale = cache.prefill(first)
    batch = cache.prefill(second)
    with pytest.raises(ValueError, match="cache: expected the latest batch"):
        run(model, stale)
    with pytest.raises(ValueError, match=r"tokens: expected those of the batch, \[1, 2\]"):
        model(batch.tokens[:, :1], batch)
    with pytest.raises(ValueError, match="num_valid: expected only with an empty cache"):
        model(batch.tokens, batch, torch.tensor([2], device=device))
    run(model, batch)
    with pytest.raises(ValueError, match="cache: expected the latest batch"):
        run(model, batch)
    for change in (lambda: cache.extend(first, [9]), lambda: cache.free(second)):
        batch = cache.prefill(first)
        change()
        with pytest.raises(ValueError, match="cache: expected the latest batch"):
            run(model, batch)
    other = make_cache(device, replace(CONFIG, num_kv_heads=1))
    other.admit([1])
    with pytest.raises(ValueError, match="cache: expected 2 key/value heads"):
        run(model, other.prefill(0))


def test_a_page_is_shared_when_it_is_written(model, device):
    """A sequence that begins like an incomplete one shares only what has been computed of it."""
    prompt = random_tokens(device, 20).tolist()
    cache = make_cache(device, max_batch=3)
    first = cache.admit(prompt)
    logits = []
    for count in (3, 1, 2):
        num_full = sum(map(len, logits)) // 4
        assert cache._shared(prompt)[1] == cache._sequences[first].pages[:num_full]
        logits.append(run(model, cache.prefill(first, count))[0])
    second = cache.admit(prompt)
    assert (cache.num_pending(first), cache.num_pending(second)) == (14, 16)
    with pytest.raises(ValueError, match="row: expected no pending tokens; got 14"):
        cache.fork(first)
    with pytest.raises(ValueError, match="most: expected an int of at least 1; got 0"):
        cache.prefill(first, 0)
    assert_as_alone(model, run(model, cache.prefill(second))[0], prompt)
    logits.append(run(model, cache.prefill(first, 99))[0])
    assert_as_alone(model, torch.cat(logits), prompt)
    check_pages(cache)


# Soak.


def random_use(cache: PagedKVCache, rng: random.Random, count: int, compute) -> dict[str, int]:
    """`count` random admissions, growths, forks and endings, and how many of each succeeded.

    `compute(tokens by row)` sends pending tokens through a model, or pretends to.
    """
    tokens: dict[int, list[int]] = {}
    done = dict.fromkeys(("admit", "extend", "fork", "free", "refused", "shared"), 0)
    actions = ("admit", "extend", "fork", "free")
    while sum(done[action] for action in actions) < count:
        action = rng.choice([*actions, "extend"])
        state = snapshot(cache)
        try:
            if action == "admit" and cache.num_free_rows:
                prompt = [7] * rng.randrange(20) + [rng.randrange(2) for _ in range(5)]
                row = cache.admit(prompt)
                done["shared"] += cache._num_cached[row] > 0
                tokens[row] = prompt
            elif action == "extend" and tokens:
                row = rng.choice(list(tokens))
                more = [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
                if len(tokens[row]) + len(more) > cache.max_seq_len:
                    continue
                cache.extend(row, more)
                tokens[row] = tokens[row] + more
            elif action == "fork" and tokens and cache.num_free_rows:
                row = rng.choice(list(tokens))
                tokens[cache.fork(row)] = tokens[row]
            elif action == "free" and tokens:
                row = rng.choice(list(tokens))
                cache.free(row)
                del tokens[row]
            else:
                continue
        except OutOfPages:
            done["refused"] += 1
            assert snapshot(cache) == state
            continue
        done[action] += 1
        check_pages(cache)
        compute(tokens)
    for row in tokens:
        cache.free(row)
    assert cache.num_free_pages == cache.num_pages and cache.num_free_rows == cache.max_batch
    return done


def pending_rows(cache: PagedKVCache) -> list[int]:
    return [row for row in cache._sequences if cache._num_cached[row] < cache.num_tokens(row)]


def test_two_thousand_random_uses_leak_no_page():
    """On tensors without values, where whoever reads one raises."""
    cache = make_cache("meta", num_pages=40, max_batch=8)

    def pretend(tokens: dict[int, list[int]]) -> None:
        for row in pending_rows(cache):
            batch = cache.prefill(row)
            s = cache._sequences[row]
            first = cache._num_cached[row] // cache.page_size
            written = s.pages[first:]
            assert [cache._pool.references(page) for page in written] == [1] * len(written)
            batch.reserve(*batch.tokens.shape)
            batch.advance(batch.tokens.shape[1])

    done = random_use(cache, random.Random(0), 2000, pretend)
    assert min(done.values()) > 50, done


def test_random_use_through_the_model(model, device):
    cache, rng = make_cache(device, num_pages=20, max_batch=5), random.Random(1)

    def compute(tokens: dict[int, list[int]]) -> None:
        poison_blank_pages(cache)
        for row in pending_rows(cache):
            batch = cache.prefill(row) if rng.random() < 0.5 else cache.decode([row])
            logits = run(model, batch)
            assert_as_alone(model, logits[0 if len(logits) == 1 else row, -1:], tokens[row])

    done = random_use(cache, rng, 100, compute)
    assert min(done.values()) > 0, done
