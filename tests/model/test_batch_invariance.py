"""What has the same bits: a sequence alone, and beside any others, in any cache.

PyTorch's matrix products are not part of that: they may sum a row in another order beside other
rows. Here each row is multiplied for itself, and so that only the kernels' own order is seen, the
interpreter multiplies each row of a tile for itself too.
"""

import numpy as np
import pytest
import torch
from combinations import long
from small_llama import lively, random_tokens, right_padded, small_config
from torch import Tensor

from gqa_kernels import get_backend, interpreter
from gqa_kernels.ops.glu import swiglu
from gqa_kernels.ops.norm import add_rms_norm
from gqa_kernels.ops.rope import apply_rope
from gqa_kernels.runtime import configs
from llama2 import Llama2
from llama2.cache.kv_cache import KVCache
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.decoding.decode_batch import DecodeBatch
from llama2.generate import Generator
from llama2.requests import Request
from llama2.serving import _Server, serve

CONFIG = small_config(num_q_heads=2, num_kv_heads=1)
NEW = 3  # tokens of each sequence that are decoded one by one


class _RowByRow:
    """NumPy, but in a matrix product a row adds its terms in order, wherever it stands."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def matmul(a, b, dtype):
        a, b = (np.ascontiguousarray(x, dtype=dtype) for x in (a, b))
        return (a[:, :, None] * b[None]).sum(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = [weight.mv(row.clone()) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(*x.shape[:-1], len(weight))


@pytest.fixture(autouse=True)
def _row_by_row(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    if interpreter.is_enabled():
        from triton.runtime import interpreter as triton_interpreter

        monkeypatch.setattr(triton_interpreter, "np", _RowByRow())


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """The longest sequence grows from one split to two; a cache's capacity would make it one."""
    tiles = tuple(config._replace(block_n=16) for config in configs.DECODE_TILES)
    monkeypatch.setattr(configs, "DECODE_TILES", tiles)
    monkeypatch.setattr(configs, "DECODE_CHUNK", 16)
    monkeypatch.setattr(configs, "DECODE_MAX_SPLITS", 2)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model(device) -> Llama2:
    return lively(CONFIG, device, get_backend("triton"))


def sequences(device) -> list[Tensor]:
    """Prompts of 14, 5 and 1 tokens and NEW more."""
    return [random_tokens(device, length + NEW) for length in (14, 5, 1)]


def make_paged(dtype: torch.dtype, device, **sizes) -> PagedKVCache:
    cache = PagedKVCache(CONFIG, dtype=dtype, device=device, **sizes)
    poison(cache)
    return cache


def make_cache(batch: int, capacity: int, dtype: torch.dtype, device) -> KVCache:
    cache = KVCache(CONFIG, batch, capacity, dtype=dtype, device=device)
    poison(cache)
    return cache


def poison(cache: KVCache | PagedKVCache) -> None:
    for stored in cache.stored:
        if stored is not None and stored.dtype != torch.int8:
            stored.fill_(float("nan"))


def alone(model: Llama2, tokens: Tensor, cache_dtype: torch.dtype) -> Tensor:
    """Logits `[len(tokens), vocab_size]`, the last NEW tokens one by one."""
    cache = make_cache(1, len(tokens), cache_dtype, tokens.device)
    parts = [tokens[:-NEW], *tokens[-NEW:].split(1)]
    return torch.cat([model(part[None], cache)[0] for part in parts])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(a.isfinite().all()) and torch.equal(a, b)


# --- A sequence beside others ----------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", [torch.float32, long(torch.float8_e4m3fn)], ids=str)
def test_a_row_of_a_ragged_batch(cache_dtype, model, device):
    tokens = sequences(device)
    prompts, num_valid = right_padded([x[:-NEW] for x in tokens])
    cache = make_cache(3, 64, cache_dtype, device)
    first = model(prompts, cache, num_valid)
    later = [model(torch.stack([x[-i] for x in tokens])[:, None], cache) for i in (3, 2, 1)]
    later = torch.cat(later, dim=1)
    for row, x in enumerate(tokens):
        together = torch.cat([first[row, : num_valid[row]], later[row]])
        assert same_bits(together, alone(model, x, cache_dtype))


@pytest.mark.parametrize(
    ("cache_dtype", "page_size"), [long(torch.float32, 32), (torch.int8, 4)], ids=str
)
def test_a_row_in_pages(cache_dtype, page_size, model, device):
    """Admitted in another order, in pages that others had before, beside one that waits."""
    tokens = sequences(device)
    sizes = {"num_pages": 128 // page_size + 4, "page_size": page_size, "max_batch": 5}
    cache = make_paged(cache_dtype, device, **sizes)
    before = [cache.admit([token] * 3) for token in (1, 2)]
    logits = [[] for _ in tokens]
    rows = {}
    for index in (2, 0, 1):
        rows[index] = cache.admit(tokens[index][:-NEW].tolist())
        batch = cache.prefill(rows[index])
        logits[index].append(model(batch.tokens, batch)[0])
        if before:
            cache.free(before.pop(0))
    cache.admit([3] * 2)
    for step in range(NEW):
        for index, row in rows.items():
            cache.extend(row, [int(tokens[index][step - NEW])])
        batch = cache.decode(list(rows.values()))
        out = model(batch.tokens, batch)
        for index, row in rows.items():
            logits[index].append(out[row])
        if step == 0:
            cache.free(rows.pop(1))
    for index in rows:
        assert same_bits(torch.cat(logits[index]), alone(model, tokens[index], cache_dtype))


def test_generated_beside_rows_that_stop(model, device, monkeypatch):
    prompts = [x[:4].tolist() for x in sequences(device)]
    states, draw = [], DecodeBatch._draw

    def recorded(batch, last, greedy):
        states.append(last.clone())
        draw(batch, last, greedy)

    monkeypatch.setattr(DecodeBatch, "_draw", recorded)
    generator = Generator(model, capture=False)
    found = []
    for index, prompt in enumerate(prompts):
        found.append(generator.generate([prompt], max_new_tokens=4)[0])
        if index == 0:
            wanted = [state[0] for state in states]
    states.clear()
    stop = [found[1][1], found[2][2]]
    together = generator.generate(prompts, max_new_tokens=4, stop_ids=stop)
    assert together[0] == found[0] and len(together[1]) < 4 and len(together[2]) < 4
    assert same_bits(torch.stack([state[0] for state in states]), torch.stack(wanted))


def test_served_beside_what_is_preempted(model, device, monkeypatch):
    """What is preempted is prefilled anew when it comes back, where it was decoded before: only
    until then its bits are those of a run without."""
    requests = [Request([10 * i, 1, 2], new) for i, new in enumerate((8, 3, 6))]
    states: dict[int, list[Tensor]] = {}
    preempted: dict[int, int] = {}
    draw, preempt = _Server._draw, _Server._preempt

    def recorded(server):
        draw(server)
        for running in server.running:
            states.setdefault(running.index, []).append(server.decoder.states[running.row].clone())

    def counted(server):
        preempted.setdefault(server.running[-1].index, len(server.running[-1].new))
        preempt(server)

    monkeypatch.setattr(_Server, "_draw", recorded)
    monkeypatch.setattr(_Server, "_preempt", counted)
    sizes = {"page_size": 4, "max_batch": 3}
    wanted = []
    for request in requests:
        states.clear()
        list(serve(model, [request], cache=make_paged(torch.float32, device, num_pages=3, **sizes)))
        wanted.append(torch.stack(states[0]))
    assert not preempted
    states.clear()
    list(serve(model, requests, cache=make_paged(torch.float32, device, num_pages=4, **sizes)))
    assert preempted and 0 not in preempted
    for index, single in enumerate(wanted):
        until = preempted.get(index, len(single))
        assert same_bits(torch.stack(states[index])[:until], single[:until])


@pytest.fixture
def served_alone_and_together(device, monkeypatch):
    """Returns the states of each request by a function of the model and requests: (served alone,
    served together)."""
    states: dict[int, list[Tensor]] = {}
    draw = _Server._draw

    def recorded(server):
        draw(server)
        for running in server.running:
            states.setdefault(running.index, []).append(server.decoder.states[running.row].clone())

    def served(model, requests, **settings) -> list[Tensor]:
        states.clear()
        sizes = {"page_size": 4, "max_batch": 3, "num_pages": 12}
        cache = make_paged(torch.float32, device, **sizes)
        list(serve(model, requests, cache=cache, **settings))
        return [torch.stack(states[index]) for index in range(len(requests))]

    monkeypatch.setattr(_Server, "_draw", recorded)
    return lambda model, requests, **settings: [
        (*served(model, [request], **settings), together)
        for request, together in zip(requests, served(model, requests, **settings), strict=True)
    ]


@pytest.mark.parametrize("length", [3, 4])
def test_served_as_a_fork(length, model, served_alone_and_together):
    """Requests of one prompt, whose last page of 4 tokens they share in part or whole."""
    requests = [Request([*range(length)], 4, 1.5, seed=seed) for seed in range(3)]
    for alone, together in served_alone_and_together(model, requests):
        assert same_bits(together, alone)


def test_served_beside_chunks_of_a_prompt(model, served_alone_and_together):
    """The chunks go through the model in one batch with the latest tokens of other requests."""
    requests = [Request([7, 8, 9], 5), Request([4], 3), Request([*range(20)], 1)]
    states = served_alone_and_together(model, requests, prefill_budget=6)
    for alone, together in states[:2]:  # the third begins with a smaller chunk than alone
        assert same_bits(together, alone)


# --- One sequence, cut into calls -------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 16])
def test_new_tokens_together_are_those_one_by_one(count, model, device):
    """Up to 16 go through decode_attention. Not so in a quantised cache, where a tile's weights are
    scaled by the largest scale that it holds, a later token's too."""
    if count == 16 and device.type == "cuda":
        pytest.skip("a taller tile may be multiplied by another instruction")
    tokens, logits = random_tokens(device, 19), []
    for step in (1, count):
        cache = make_cache(1, 19, torch.float32, device)
        model(tokens[None, :2], cache)
        parts = tokens[2:].split(step)
        logits.append(torch.cat([model(part[None], cache)[0] for part in parts]))
    assert same_bits(*logits)


def test_long_parts_have_the_bits_of_other_long_parts(model, device):
    """More than 16 tokens after others go through prefill_attention, in pages or not."""
    tokens = random_tokens(device, 44)
    cache = make_cache(1, 50, torch.float32, device)
    whole = torch.cat([model(part[None], cache)[0] for part in tokens.split([5, 39])])
    logits = []
    cache = make_paged(torch.float32, device, num_pages=20, page_size=4, max_batch=1)
    row = cache.admit(tokens[:5].tolist())
    for part in (tokens[5:22], tokens[22:], tokens[:0]):
        batch = cache.prefill(row)
        logits.append(model(batch.tokens, batch)[0])
        cache.extend(row, part.tolist())
    assert same_bits(torch.cat(logits), whole)


# --- Rows of the ops whose own tests do not say so ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "op",
    [
        lambda x, y, weight: swiglu(x, y),
        lambda x, y, weight: torch.cat(add_rms_norm(x, y, weight), -1),
    ],
    ids=["swiglu", "add_rms_norm"],
)
def test_a_row(op, dtype, draw):
    x, y, weight = (draw(*shape, 1100, dtype=dtype) for shape in ((7,), (7,), ()))
    together = op(x, y, weight)
    for row in range(7):
        assert torch.equal(op(x[row : row + 1], y[row : row + 1], weight)[0], together[row])


def test_a_rotated_token(draw, device):
    q, k, cos, sin = draw(2, 3, 4, 16), draw(2, 3, 2, 16), draw(9, 8), draw(9, 8)
    positions = torch.tensor([[0, 4, 8], [7, 1, 4]], device=device)
    together = torch.cat(apply_rope(q, k, cos, sin, positions), 2)
    for b in range(2):
        for t in range(3):
            at = slice(b, b + 1), slice(t, t + 1)
            single = torch.cat(apply_rope(q[at], k[at], cos, sin, positions[at]), 2)
            assert torch.equal(single[0, 0], together[b, t])
