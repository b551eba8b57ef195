"""decode_attention over paged caches and quantised ones, and in one launch."""

import math

import pytest
import torch
from budget import assert_call
from program_order import Backwards

from gqa_kernels import reference
from gqa_kernels.ops.cache import counters, decode
from gqa_kernels.ops.cache.decode import decode_attention
from gqa_kernels.runtime import configs
from gqa_kernels.spec.cache import quantized

CHUNK = configs.DECODE_CHUNK
NOWHERE = 1 << 30  # an entry of a block table that must not be read
QUANTIZED = (torch.float8_e4m3fn, torch.int8)


def spoilt(shape, dtype=torch.float32):
    """What must never be read: NaN, or the int8 that is furthest off."""
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(shape, math.nan if dtype.is_floating_point else -128, dtype=dtype)


def spoil_beyond(x, lengths):
    """A copy of `[batch, max_seq_len, …]` that is spoilt beyond each length."""
    x = x.clone()
    raw = torch.uint8 if x.element_size() == 1 else x.dtype
    for row, length in zip(x, lengths, strict=True):
        row.view(raw)[length:] = spoilt((), x.dtype).to(x.device).view(raw)
    return x


def shuffled_pages(caches, lengths, page_size, generator):
    """`[batch, max_seq_len, …]` dealt out to pages in random order, among free pages that are
    spoilt, and the block table, which points nowhere beyond a length."""
    batch, capacity = next(iter(caches.values())).shape[:2]
    max_pages = capacity // page_size
    num_pages = batch * max_pages + 3
    order = torch.randperm(num_pages, generator=generator)[: batch * max_pages]
    paged = {}
    for name, x in caches.items():
        raw = torch.uint8 if x.element_size() == 1 else x.dtype
        pages = spoilt((num_pages, page_size, *x.shape[2:]), x.dtype).to(x.device)
        pages.view(raw)[order.to(x.device)] = x.view(raw).reshape(-1, *pages.shape[1:])
        paged[name] = pages
    table = order.view(batch, max_pages).to(torch.int32)
    for row, length in zip(table, lengths, strict=True):
        row[-(-length // page_size) :] = NOWHERE
    return paged | {"block_table": table.to(x.device)}


def assert_within_budget(inputs):
    inputs = inputs | {"return_lse": True}
    assert_call(decode_attention, reference.decode_attention, inputs)


@pytest.fixture
def small_chunks(monkeypatch):
    """Many splits of few keys."""
    monkeypatch.setattr(configs, "DECODE_CHUNK", 64)


# --- Pages -----------------------------------------------------------------------------------


@pytest.fixture
def make(draw, device):
    """(q, contiguous caches, seq_lens) of some lengths."""

    def make(lengths, capacity, *, heads=(4, 2), head_dim=16, seq_len_q=1, dtype=torch.float32):
        batch = len(lengths)
        shape = (batch, capacity, heads[1], head_dim)
        caches = {f"{x}_cache": spoil_beyond(draw(*shape, dtype=dtype), lengths) for x in "kv"}
        q = draw(batch, seq_len_q, heads[0], head_dim, dtype=dtype)
        return q, caches, torch.tensor(lengths, dtype=torch.int32, device=device)

    return make


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    (
        (1, torch.bfloat16),
        (4, torch.float32),
        (16, torch.bfloat16),
        (32, torch.float32),
        (64, torch.bfloat16),
        (128, torch.float16),
    ),
)
def test_pages_have_the_bits_of_a_contiguous_cache(page_size, dtype, make, generator):
    """Lengths around a page and around a chunk; NaN in every slot that belongs to no key."""
    lengths = [0, page_size - 1, page_size, page_size + 1, CHUNK + 1, 384]
    q, caches, seq_lens = make(lengths, 384, heads=(2, 1), dtype=dtype)
    wanted = decode_attention(q, **caches, seq_lens=seq_lens)
    paged = shuffled_pages(caches, lengths, page_size, generator)
    assert torch.equal(decode_attention(q, **paged, seq_lens=seq_lens), wanted)
    assert torch.equal(wanted[0], torch.zeros_like(wanted[0]))
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens})


@pytest.mark.parametrize("group_size", (1, 3, 7, 8, 64))
def test_groups(group_size, make, generator, small_chunks):
    lengths = [200, 65, 3]
    q, caches, seq_lens = make(lengths, 256, heads=(group_size, 1), head_dim=32)
    paged = shuffled_pages(caches, lengths, 16, generator)
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens})


@pytest.mark.parametrize("batch", (1, 2, 33))
def test_batches(batch, make, generator):
    lengths = [(7 * i) % 41 for i in range(batch)]
    q, caches, seq_lens = make(lengths, 48, heads=(2, 1))
    paged = shuffled_pages(caches, lengths, 16, generator)
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens})


def test_a_page_that_there_is_not_hides_its_keys(make, generator):
    lengths = [60, 64]
    q, caches, seq_lens = make(lengths, 64)
    paged = shuffled_pages(caches, lengths, 16, generator)
    num_pages = len(paged["k_cache"])
    wanted_mask = torch.ones(2, 64, dtype=torch.bool, device=q.device)
    for row, column, entry in ((0, 1, -1), (0, 3, num_pages), (1, 0, NOWHERE), (1, 2, -(2**31))):
        paged["block_table"][row, column] = entry
        wanted_mask[row, 16 * column : 16 * (column + 1)] = False
    out = decode_attention(q, **paged, seq_lens=seq_lens)
    wanted = decode_attention(q, **caches, seq_lens=seq_lens, key_mask=wanted_mask)
    assert torch.equal(out, wanted)
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens})
    paged["block_table"].fill_(num_pages)
    blind = decode_attention(q, **paged, seq_lens=seq_lens)
    assert torch.equal(blind, torch.zeros_like(q))


def test_large_pages_that_there_are_not(make, generator):
    """One index per tile: as where there is one per key."""
    lengths = [256]
    q, caches, seq_lens = make(lengths, 256)
    paged = shuffled_pages(caches, lengths, 128, generator)
    paged["block_table"][0, 0] = -1
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens})


@pytest.mark.parametrize("page_size", (4, 16))
def test_shared_pages_and_a_strided_table(page_size, make, generator):
    """Two sequences with the same first page; a table that is a slice of a larger one."""
    lengths = [40, 25]
    q, caches, seq_lens = make(lengths, 48)
    caches = {name: torch.stack((x[0], x[0])) for name, x in caches.items()}
    paged = shuffled_pages(caches, lengths, page_size, generator)
    table = torch.full((2, 2 * 48 // page_size + 2), NOWHERE, dtype=torch.int32, device=q.device)
    table[:, 1:-1:2] = paged["block_table"]
    table[1, 1] = table[0, 1]
    paged["block_table"] = table[:, 1:-1:2]
    out = decode_attention(q, **paged, seq_lens=seq_lens)
    assert torch.equal(out, decode_attention(q, **caches, seq_lens=seq_lens))


def test_limits_name_positions_not_slots(make, generator):
    lengths = [90, 33]
    q, caches, seq_lens = make(lengths, 96, seq_len_q=2)
    limits = {
        "key_ranges": torch.tensor([[[5, 80], [20, 90]], [[0, 33], [7, 8]]], device=q.device),
        "key_mask": torch.rand(2, 96, generator=generator).to(q.device) < 0.6,
    }
    paged = shuffled_pages(caches, lengths, 16, generator)
    out = decode_attention(q, **paged, seq_lens=seq_lens, **limits)
    assert torch.equal(out, decode_attention(q, **caches, seq_lens=seq_lens, **limits))
    assert_within_budget({"q": q, **paged, "seq_lens": seq_lens, **limits})


def test_pages_beyond_32_bits(draw, device):
    """A page times its stride needs more; only the pages that are touched exist."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 512, dtype=torch.float16, device=device)
    cache = storage.as_strided((3, 4, 1, 32), (apart, 32, 32, 1))
    cache.copy_(torch.randn(3, 4, 1, 32))
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    q = draw(1, 1, 2, 32, dtype=torch.float16)
    seq_lens = torch.tensor([7], dtype=torch.int32, device=device)
    out = decode_attention(q, cache, cache, seq_lens, block_table=table)
    small = cache.clone()
    assert torch.equal(out, decode_attention(q, small, small, seq_lens, block_table=table))


def test_no_pages(draw, device):
    q = draw(2, 1, 2, 16)
    seq_lens = torch.tensor([3, 0], dtype=torch.int32, device=device)
    for num_pages, max_pages in ((0, 2), (3, 0)):
        cache = draw(num_pages, 4, 1, 16)
        table = torch.zeros(2, max_pages, dtype=torch.int32, device=device)
        inputs = {"q": q, "k_cache": cache, "v_cache": cache, "seq_lens": seq_lens}
        out = decode_attention(**inputs, block_table=table)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(out, reference.decode_attention(**inputs, block_table=table))


# --- Splits ----------------------------------------------------------------------------------


def test_bits_depend_on_the_sequence_alone(make, generator, small_chunks, monkeypatch):
    """Alone and in a batch, in caches of any capacity and page size. The longest has chunks of
    three times the smallest, and would have others by any of the capacities."""
    monkeypatch.setattr(configs, "DECODE_MAX_SPLITS", 4)
    lengths = [577, 64, 300]
    q, caches, seq_lens = make(lengths, 640)
    together = decode_attention(q, **caches, seq_lens=seq_lens)
    for b, length in enumerate(lengths):
        alone = {name: x[b : b + 1] for name, x in caches.items()}
        q_b, seq_len = q[b : b + 1], seq_lens[b : b + 1]
        wider = {
            name: torch.cat((x, spoilt((1, 640, *x.shape[2:])).to(x)), 1)
            for name, x in alone.items()
        }
        tight = {name: x[:, :length] for name, x in alone.items()}
        paged = [shuffled_pages(wider, [length], page_size, generator) for page_size in (2, 256)]
        for held in (alone, wider, tight, *paged):
            out = decode_attention(q_b, **held, seq_lens=seq_len)
            assert torch.equal(out, together[b : b + 1])


@pytest.mark.parametrize("programs_per_sm", (1, 2, 5))
def test_fewer_programs_than_splits(programs_per_sm, make, small_chunks, monkeypatch):
    q, caches, seq_lens = make([577, 640, 64, 0], 640, heads=(2, 1))
    wanted = decode_attention(q, **caches, seq_lens=seq_lens)
    monkeypatch.setattr(configs, "DECODE_PROGRAMS_PER_SM", programs_per_sm)
    assert torch.equal(decode_attention(q, **caches, seq_lens=seq_lens), wanted)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CPU's matrix product rounds a row by its place"
)
def test_new_tokens_have_the_bits_of_one(make, small_chunks):
    """The last of several new tokens sees what a single one would."""
    q, caches, seq_lens = make([577, 130], 640, seq_len_q=4)
    out = decode_attention(q, **caches, seq_lens=seq_lens)
    alone = decode_attention(q[:, -1:], **caches, seq_lens=seq_lens)
    assert torch.equal(out[:, -1:], alone)


@pytest.mark.parametrize(("chunk", "most"), ((1024, 64), (64, 64), (64, 4), (128, 1)))
def test_any_number_of_splits(chunk, most, make, monkeypatch):
    """1, 10, 4 and 1 splits of the longest: as many as there may be at most."""
    monkeypatch.setattr(configs, "DECODE_CHUNK", chunk)
    monkeypatch.setattr(configs, "DECODE_MAX_SPLITS", most)
    q, caches, seq_lens = make([640, 321, 1], 640)
    assert_within_budget({"q": q, **caches, "seq_lens": seq_lens})


def test_queries_that_see_no_key_of_many_splits(make, small_chunks):
    q, caches, seq_lens = make([300, 200], 320, seq_len_q=2)
    ranges = torch.tensor([[[0, 300], [9, 9]], [[60, 61], [0, 200]]], device=q.device)
    out = decode_attention(q, **caches, seq_lens=seq_lens, key_ranges=ranges)
    assert torch.equal(out[0, 1], torch.zeros_like(out[0, 1]))
    assert_within_budget({"q": q, **caches, "seq_lens": seq_lens, "key_ranges": ranges})
    hidden = torch.zeros(2, 320, dtype=torch.bool, device=q.device)
    out = decode_attention(q, **caches, seq_lens=seq_lens, key_mask=hidden)
    assert torch.equal(out, torch.zeros_like(q))


def test_the_order_of_the_programs_does_not_show(make, small_chunks, monkeypatch, device):
    q, caches, seq_lens = make([577, 130, 640], 640, heads=(2, 1))
    wanted = decode_attention(q, **caches, seq_lens=seq_lens)
    assert torch.equal(decode_attention(q, **caches, seq_lens=seq_lens), wanted)
    if device.type == "cpu":
        backwards = Backwards(decode._launch_decode, monkeypatch)
        monkeypatch.setattr(decode, "_launch_decode", backwards)
        assert torch.equal(decode_attention(q, **caches, seq_lens=seq_lens), wanted)
        assert backwards.num_launches == 1


class WithoutTheLast:
    """Launches in the interpreter of whose programs for one tile of queries the last never runs."""

    def __init__(self, launch, monkeypatch):
        self.launch, self.monkeypatch = launch, monkeypatch

    def __call__(self, grid, **arguments):
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        set_grid_dim = builder.set_grid_dim
        self.monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_grid_dim(x, y + 1, z))
        self.launch((grid[0], grid[1] - 1), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's programs can be left out")
def test_nothing_is_combined_before_all_have_come(make, small_chunks, monkeypatch):
    q, caches, seq_lens = make([320, 30], 320)
    monkeypatch.setattr(counters, "_of_stream", {})
    cut = WithoutTheLast(decode._launch_decode, monkeypatch)
    monkeypatch.setattr(decode, "_launch_decode", cut)
    sevens = lambda x, **options: torch.empty_like(x, **options).fill_(7.0)  # noqa: E731
    monkeypatch.setattr(decode.torch, "empty_like", sevens)
    out = decode_attention(q, **caches, seq_lens=seq_lens)
    assert (out[0] == 7.0).all()  # as allocated
    assert (out[1] != 7.0).all()


def test_one_launch_leaves_its_counters_at_zero(make, small_chunks):
    q, caches, seq_lens = make([577, 130, 640, 5, 0], 640, heads=(8, 4))
    decode_attention(q, **caches, seq_lens=seq_lens)
    kept = list(counters._of_stream.values())
    assert kept and max(map(len, kept)) >= 5 * 4
    assert not any(x.any() for x in kept)


# --- Who may share counters ------------------------------------------------------------------


@pytest.fixture
def no_counters(monkeypatch):
    for name in ("_of_stream", "_reserves"):
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_in_graphs", [])
    monkeypatch.setattr(counters, "_RESERVE", 64)


def shares_memory(a, b):
    first, second = sorted((a, b), key=lambda x: x.data_ptr())
    return first.data_ptr() + 4 * len(first) > second.data_ptr()


def test_streams_have_counters_of_their_own(no_counters, device):
    mine, theirs = (counters._for_stream(10, device, stream) for stream in (1, 2))
    assert not shares_memory(mine, theirs)
    assert counters._for_stream(10, device, 1) is mine
    larger = counters._for_stream(len(mine) + 1, device, 1)
    assert len(larger) > len(mine) and not larger.any()
    assert counters._for_stream(10, device, 1) is larger


def test_no_two_captured_launches_share_counters(no_counters, device):
    """Nor one and a launch that is not captured; nor where the reserve is used up."""
    given = [counters._for_graph(5, device)]  # without a reserve
    for _ in range(3):
        counters._refill(device)
        given += [counters._for_graph(20, device) for _ in range(4)]
    given.append(counters._for_stream(20, device, 0))
    assert [len(x) for x in given[:5]] == [5, 20, 20, 20, 20]
    for i, a in enumerate(given):
        assert not a.any()
        assert not any(shares_memory(a, b) for b in given[:i])
    assert sum(len(x) for x in counters._in_graphs) == 2 * 64  # whose graphs may still run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_run_side_by_side(make):
    q, caches, seq_lens = make([4000, 700], 4096, heads=(8, 2))
    wanted = decode_attention(q, **caches, seq_lens=seq_lens)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(decode_attention(q, **caches, seq_lens=seq_lens))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        decode_attention(q, **caches, seq_lens=seq_lens)
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


# --- Quantised caches ------------------------------------------------------------------------


@pytest.fixture
def make_quantized(make, generator):
    """Inputs of a quantised cache, spoilt beyond the lengths: contiguous, or in pages."""

    def make_quantized(
        lengths, capacity, cache_dtype, *, per_token, page_size=None, size=1.0, **shapes
    ):
        q, caches, seq_lens = make([capacity] * len(lengths), capacity, **shapes)
        held = {}
        for side in "kv":
            stored, scale = quantized(
                size * caches[f"{side}_cache"], cache_dtype, per_token=per_token
            )
            held[f"{side}_cache"] = spoil_beyond(stored, lengths)
            held[f"{side}_scale"] = spoil_beyond(scale, lengths) if per_token else scale
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
        if page_size is not None:
            scales = {} if per_token else {f"{x}_scale": held.pop(f"{x}_scale") for x in "kv"}
            held = shuffled_pages(held, lengths, page_size, generator) | scales
        return {"q": q, **held, "seq_lens": seq_lens}

    return make_quantized


@pytest.mark.covering(2)
@pytest.mark.parametrize("page_size", (None, 8, 64))
@pytest.mark.parametrize("per_token", (False, True), ids=("per_head", "per_token"))
@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_quantized_within_budget(dtype, cache_dtype, per_token, page_size, make_quantized):
    """Of the cache as it is stored: converting it costs no accuracy."""
    inputs = make_quantized(
        [0, 1, 65], 128, cache_dtype, per_token=per_token, page_size=page_size, dtype=dtype
    )
    assert_within_budget(inputs)


@pytest.mark.parametrize("size", (2.0**-14, 2.0**6))
@pytest.mark.parametrize("per_token", (False, True), ids=("per_head", "per_token"))
def test_small_and_large_scales_in_float16(size, per_token, make_quantized):
    """A weight times a scale alone would be no number of float16."""
    inputs = make_quantized(
        [300], 320, torch.int8, per_token=per_token, size=size, dtype=torch.float16
    )
    assert_within_budget(inputs)


@pytest.mark.parametrize("per_token", (False, True), ids=("per_head", "per_token"))
def test_scales_of_zero_and_below(per_token, make_quantized):
    inputs = make_quantized([70], 80, torch.int8, per_token=per_token)
    inputs["k_scale"][..., 0] = inputs["v_scale"][..., 0] = 0.0
    inputs["k_scale"][..., 1] *= -1.0
    inputs["v_scale"][..., 1] *= -1.0
    assert_within_budget(inputs)
    assert torch.equal(
        decode_attention(**inputs)[:, :, :2], torch.zeros(1, 1, 2, 16).to(inputs["q"])
    )


@pytest.mark.parametrize("cache_dtype", QUANTIZED, ids=str)
def test_quantized_bits_do_not_depend_on_pages(
    cache_dtype, make_quantized, generator, small_chunks
):
    lengths = [300, 64, 0]
    inputs = make_quantized(lengths, 320, cache_dtype, per_token=True, dtype=torch.bfloat16)
    held = {name: inputs.pop(name) for name in ("k_cache", "v_cache", "k_scale", "v_scale")}
    wanted = decode_attention(**inputs, **held)
    for page_size in (4, 32, 64):
        paged = shuffled_pages(held, lengths, page_size, generator)
        assert torch.equal(decode_attention(**inputs, **paged), wanted)


def test_float8_nan_within_the_length_shows(make_quantized):
    inputs = make_quantized([20], 32, torch.float8_e4m3fn, per_token=False)
    inputs["v_cache"].view(torch.uint8)[0, 7, 0, 3] = 0xFF
    out = decode_attention(**inputs)
    assert out[0, 0, :2, 3].isnan().all()
    assert out.isnan().sum() == 2


# --- Arguments -------------------------------------------------------------------------------


def test_wrong_pages(draw, device):
    q, k = draw(2, 1, 2, 16), draw(5, 4, 1, 16)
    seq_lens = torch.ones(2, dtype=torch.int32, device=device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match=r"block_table: expected dtype int32; got torch.int64"):
        decode_attention(q, k, k, seq_lens, block_table=table.long())
    with pytest.raises(ValueError, match=r"block_table: expected shape \[2, max_pages\]"):
        decode_attention(q, k, k, seq_lens, block_table=table[:1])
    with pytest.raises(NotImplementedError, match="k_cache: expected a page_size that is a power"):
        decode_attention(q, k[:, :3], k[:, :3], seq_lens, block_table=table)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"key_mask: expected shape \[2, 12\]; got \[2, 5\]"):
        decode_attention(q, k, k, seq_lens, block_table=table, key_mask=mask)
    with pytest.raises(ValueError, match=r"k_cache: expected shape \[2, max_seq_len"):
        decode_attention(q, k, k, seq_lens)


def test_wrong_scales(draw, device):
    q, k, stored = draw(2, 1, 2, 16), draw(2, 4, 1, 16), torch.zeros(2, 4, 1, 16, dtype=torch.int8)
    stored = stored.to(device)
    seq_lens = torch.ones(2, dtype=torch.int32, device=device)
    one, each = torch.ones(1, device=device), torch.ones(2, 4, 1, device=device)

    def call(k_cache, v_cache, k_scale, v_scale):
        decode_attention(q, k_cache, v_cache, seq_lens, k_scale=k_scale, v_scale=v_scale)

    with pytest.raises(ValueError, match=r"v_scale: expected a tensor for caches of torch.int8"):
        call(stored, stored, one, None)
    with pytest.raises(ValueError, match="k_scale: expected None for caches of q's dtype"):
        call(k, k, one, one)
    with pytest.raises(TypeError, match=r"v_cache: expected k_cache's dtype torch.int8"):
        call(stored, k, one, one)
    with pytest.raises(TypeError, match="k_cache: expected dtype float32, float8_e4m3fn, int8"):
        call(stored.view(torch.uint8), stored, one, one)
    with pytest.raises(ValueError, match=r"k_scale: expected shape \[2, 4, 1\]; got \[2, 3, 1\]"):
        call(stored, stored, each[:, :3], each)
    with pytest.raises(ValueError, match=r"v_scale: expected the shape of k_scale"):
        call(stored, stored, each, one)
    with pytest.raises(TypeError, match=r"k_scale: expected dtype float32; got torch.float64"):
        call(stored, stored, one.double(), one)


def test_float8_where_the_gpu_has_none(draw, device, monkeypatch):
    from gqa_kernels.runtime import target

    old = target.current()._replace(arch="sm_80")
    monkeypatch.setattr(target, "current", lambda: old)
    cache = torch.zeros(1, 4, 1, 16, device=device).to(torch.float8_e4m3fn)
    q, one = draw(1, 1, 1, 16), torch.ones(1, device=device)
    seq_lens = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(NotImplementedError, match=r"k_cache: expected int8 .* on sm_80; got"):
        decode_attention(q, cache, cache, seq_lens, k_scale=one, v_scale=one)
