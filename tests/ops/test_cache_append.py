"""What is peculiar to rope_append_kv."""

import pytest
import torch
from quantisation import half_a_step

from gqa_kernels import reference
from gqa_kernels.nn import rope_table
from gqa_kernels.ops.cache.append import rope_append_kv
from gqa_kernels.ops.cache.decode import decode_attention
from gqa_kernels.ops.rope import apply_rope

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
QUANTIZED = pytest.mark.parametrize("cache_dtype", LARGEST, ids=("int8", "float8"))
PER_TOKEN = pytest.mark.parametrize("per_token", (False, True), ids=("heads", "tokens"))
NUM_PAGES, PAGE_SIZE = 5, 4


@pytest.fixture
def make(draw, device, generator):
    """Arguments by name: shuffled slots, a token to skip, caches full of NaN (int8: of −128)."""

    def make(
        batch=2,
        seq_len=3,
        heads=(6, 2),
        head_dim=40,
        dtype=torch.float32,
        cache_dtype=None,
        per_token=True,
        spread=1.0,
    ):
        num_q_heads, num_kv_heads = heads
        tokens, cache = (batch, seq_len), (NUM_PAGES, PAGE_SIZE, num_kv_heads)
        slots = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=generator)[: batch * seq_len]
        slots = slots.view(tokens).to(device)
        if batch and seq_len > 1:
            slots[-1, 1] = -1
        cos, sin = rope_table(head_dim, 12, device=device)
        arguments = {
            "q": draw(*tokens, num_q_heads, head_dim, dtype=dtype),
            "k": draw(*tokens, num_kv_heads, head_dim, dtype=dtype) * spread,
            "v": draw(*tokens, num_kv_heads, head_dim, dtype=dtype) * spread,
            "k_cache": poison(*cache, head_dim, dtype=cache_dtype or dtype, device=device),
            "v_cache": poison(*cache, head_dim, dtype=cache_dtype or dtype, device=device),
            "cos": cos,
            "sin": sin,
            "positions": torch.randint(0, 12, tokens, generator=generator).to(device),
            "slots": slots,
        }
        if cache_dtype is not None:
            for name in ("k_scale", "v_scale"):
                scale = (draw(num_kv_heads).abs() + 1.0) / LARGEST[cache_dtype]
                whole = poison(*cache, dtype=torch.float32, device=device)
                arguments[name] = whole if per_token else scale
        return arguments

    return make


def poison(*shape, dtype, device):
    value = -128 if dtype == torch.int8 else float("nan")
    return torch.full(shape, value, dtype=torch.float32, device=device).to(dtype)


def copied(arguments):
    return {k: x.clone() if torch.is_tensor(x) else x for k, x in arguments.items()}


def bits(x):
    return x.contiguous().view(torch.uint8)


def rows(arguments):
    """(token of the batch, its slot as an index of the caches) of the tokens that have one."""
    for token in torch.cartesian_prod(*map(torch.arange, arguments["slots"].shape)).tolist():
        slot = arguments["slots"][tuple(token)].item()
        if 0 <= slot < NUM_PAGES * PAGE_SIZE:
            yield tuple(token), divmod(slot, PAGE_SIZE)


def read_back(arguments, name):
    """The float32 values of a cache."""
    cache, scale = arguments[f"{name}_cache"].float(), arguments.get(f"{name}_scale")
    return cache if scale is None else cache * scale[..., None]


def assert_only_slots_changed(before, after):
    changed = torch.zeros(NUM_PAGES, PAGE_SIZE, dtype=torch.bool)
    for _, where in rows(before):
        changed[where] = True
    for name, x in before.items():
        if not torch.is_tensor(x):
            continue
        written = "cache" in name or ("scale" in name and x.dim() == 3)
        same = (lambda x: x[~changed]) if written else (lambda x: x)
        assert torch.equal(bits(same(x)), bits(same(after[name]))), name


# --- in the dtype of the model ---------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    (((4, 4), 16), ((6, 2), 40), ((9, 1), 8), ((10, 5), 256)),
    ids=("MHA", "GQA", "MQA", "widest"),
)
def test_it_is_apply_rope_and_an_assignment(heads, head_dim, interleaved, dtype, make):
    arguments = make(heads=heads, head_dim=head_dim, dtype=dtype)
    before = copied(arguments)
    outputs = rope_append_kv(**arguments, interleaved=interleaved)
    angles = (before[name] for name in ("cos", "sin", "positions"))
    wanted = apply_rope(before["q"], before["k"], *angles, interleaved=interleaved)
    for a, b in zip(outputs, wanted, strict=True):
        assert a.is_contiguous() and torch.equal(a, b)
    for token, where in rows(before):
        assert torch.equal(arguments["k_cache"][where], wanted[1][token])
        assert torch.equal(arguments["v_cache"][where], before["v"][token])
    assert_only_slots_changed(before, arguments)


@pytest.mark.parametrize("positions_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("slots_dtype", (torch.int32, torch.int64), ids=str)
def test_whole_numbers_of_both_widths_and_any_strides(positions_dtype, slots_dtype, make):
    arguments = make()
    wanted = copied(arguments)
    wanted_outputs = rope_append_kv(**wanted)
    for name, dtype in (("positions", positions_dtype), ("slots", slots_dtype)):
        wide = arguments[name].to(dtype).repeat_interleave(2, dim=1)
        arguments[name] = wide.t().contiguous().t()[:, ::2]
    outputs = rope_append_kv(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted_outputs, strict=True))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(bits(arguments[name]), bits(wanted[name]))


@pytest.mark.parametrize("slot", (-1, -2, -(2**62), NUM_PAGES * PAGE_SIZE, 2**32, 2**62 + 1))
def test_a_slot_outside_the_cache_writes_nothing(slot, make):
    arguments = make()
    arguments["slots"] = torch.full_like(arguments["slots"], slot)
    before = copied(arguments)
    outputs = rope_append_kv(**arguments)
    assert not any(output.isnan().any() for output in outputs)
    assert_only_slots_changed(before, arguments)


def test_the_first_and_the_last_slot(make):
    arguments = make(batch=1, seq_len=2)
    arguments["slots"] = torch.tensor(
        [[0, NUM_PAGES * PAGE_SIZE - 1]], device=arguments["q"].device
    )
    rope_append_kv(**arguments)
    assert torch.equal(arguments["v_cache"][0, 0], arguments["v"][0, 0])
    assert torch.equal(arguments["v_cache"][-1, -1], arguments["v"][0, 1])


def test_two_tokens_with_one_slot(make):
    """Either wins."""
    arguments = make(batch=2, seq_len=1)
    arguments["slots"][:] = 7
    rope_append_kv(**arguments)
    stored, v = arguments["v_cache"][1, 3], arguments["v"]
    assert ((stored == v[0, 0]) | (stored == v[1, 0])).all()


def test_views_of_a_fused_projection_and_of_a_cache_of_layers(make, draw):
    arguments = make()
    fused, layers = draw(2, 3, 10, 56), draw(NUM_PAGES, 2, 2, 2, PAGE_SIZE, 48)
    projections = fused[..., 8:48].split((6, 2, 2), dim=2)
    caches = layers.permute(1, 2, 0, 4, 3, 5)[..., :40]  # [layer, k or v, page, offset, head, …]
    arguments |= dict(zip(("q", "k", "v"), projections, strict=True))
    arguments |= {"k_cache": caches[1, 0], "v_cache": caches[1, 1]}
    dense, untouched = (
        copied(arguments),
        (fused.clone(), caches[0].clone(), layers[..., 40:].clone()),
    )
    assert not arguments["k_cache"].is_contiguous()
    outputs, wanted = rope_append_kv(**arguments), rope_append_kv(**dense)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(arguments[name], dense[name])
    for a, b in zip((fused, caches[0], layers[..., 40:]), untouched, strict=True):
        assert torch.equal(a, b)


def test_features_that_are_not_contiguous(make):
    arguments = make()
    wanted = copied(arguments)
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].transpose(1, 3).contiguous().transpose(1, 3)
    outputs, wanted_outputs = rope_append_kv(**arguments), rope_append_kv(**wanted)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted_outputs, strict=True))
    assert torch.equal(bits(arguments["v_cache"]), bits(wanted["v_cache"]))


def test_positions_outside_the_table_give_nan(make):
    arguments = make(batch=1, seq_len=3, head_dim=16)
    device = arguments["q"].device
    arguments["positions"] = torch.tensor([[-1, 11, 2**62 + 1]], device=device)
    arguments["slots"] = torch.tensor([[0, 1, 2]], device=device)
    rotated = rope_append_kv(**arguments)[1]
    assert rotated[0].isnan().all(dim=(1, 2)).tolist() == [True, False, True]
    stored = arguments["k_cache"][0]
    assert stored.isnan().all(dim=(1, 2)).tolist() == [True, False, True, True]
    assert torch.equal(arguments["v_cache"][0, :3], arguments["v"][0])


@pytest.mark.parametrize("sizes", ({"batch": 0}, {"seq_len": 0}), ids=str)
def test_no_tokens(sizes, make):
    arguments = make(**sizes)
    before = copied(arguments)
    outputs = rope_append_kv(**arguments)
    assert [x.shape for x in outputs] == [arguments["q"].shape, arguments["k"].shape]
    assert_only_slots_changed(before, arguments)


@pytest.mark.parametrize("shape", ((0, 4), (3, 0)))
def test_a_cache_without_slots(shape, make):
    arguments = make()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].new_empty(*shape, 2, 40)
    arguments["slots"] = arguments["slots"].clamp(max=2)
    assert not rope_append_kv(**arguments)[0].isnan().any()


def test_offsets_beyond_32_bits(make):
    """Strides of 31 bits whose multiples need more; only the pages that are touched exist."""
    apart = 2**30 + 64
    arguments = make(batch=1, seq_len=2, heads=(2, 1), head_dim=32, dtype=torch.float16)
    storage = torch.empty(2 * apart + 256, dtype=torch.float16, device=arguments["q"].device)
    for name in ("k_cache", "v_cache"):
        arguments[name] = storage.as_strided(
            (3, 2, 1, 32), (apart, 64, 64, 1), 32 * (name[0] == "v")
        )
    arguments["slots"] = torch.tensor([[5, 2]], device=storage.device)
    k = rope_append_kv(**arguments)[1]
    for token, where in enumerate(((2, 1), (1, 0))):
        assert torch.equal(arguments["k_cache"][where], k[0, token])
        assert torch.equal(arguments["v_cache"][where], arguments["v"][0, token])


def test_a_token_does_not_depend_on_the_others(make):
    together = make(cache_dtype=torch.int8)
    alone = copied(together)
    outputs = rope_append_kv(**together)
    for b in range(2):
        for t in range(3):
            one = {
                name: x[b : b + 1, t : t + 1]
                if name in ("q", "k", "v", "positions", "slots")
                else x
                for name, x in alone.items()
            }
            for whole, single in zip(outputs, rope_append_kv(**one), strict=True):
                assert torch.equal(whole[b, t], single[0, 0])
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert torch.equal(bits(together[name]), bits(alone[name]))


def test_decoding_reads_what_was_appended(make, draw, device):
    """Prompt and new token through the pages of a sequence, against a cache without pages."""
    arguments = make(batch=1, seq_len=7, heads=(4, 2), head_dim=16)
    block_table = torch.tensor([[3, 1]], device=device, dtype=torch.int32)
    positions = torch.arange(7, device=device)[None]
    arguments["positions"] = positions
    arguments["slots"] = block_table.long()[0, positions // PAGE_SIZE] * PAGE_SIZE + positions % 4
    q, k = rope_append_kv(**arguments)
    seq_lens = torch.tensor([7], device=device, dtype=torch.int32)
    caches = arguments["k_cache"], arguments["v_cache"]
    out = decode_attention(q[:, -1:], *caches, seq_lens, block_table=block_table)
    wanted = decode_attention(q[:, -1:], k, arguments["v"], seq_lens)
    torch.testing.assert_close(out, wanted)


# --- quantised -------------------------------------------------------------------------------


@PER_TOKEN
@QUANTIZED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_back_is_within_half_a_step(dtype, cache_dtype, per_token, make):
    arguments = make(dtype=dtype, cache_dtype=cache_dtype, per_token=per_token)
    if not per_token:  # large enough for all values
        largest = 8.0 / LARGEST[cache_dtype]
        arguments["k_scale"], arguments["v_scale"] = (
            torch.tensor(scales, device=arguments["q"].device) * largest
            for scales in ((1.0, 1.5), (2.0, 1.0))
        )
    before = copied(arguments)
    k = rope_append_kv(**arguments)[1]
    for name, x in (("k", k), ("v", before["v"])):
        for token, where in rows(before):
            stored, scale = arguments[f"{name}_cache"][where], arguments[f"{name}_scale"]
            scale = scale[where] if per_token else scale
            error = (read_back(arguments, name)[where] - x[token].float()).abs()
            assert (error <= half_a_step(stored, scale[:, None])).all()
    assert_only_slots_changed(before, arguments)


@QUANTIZED
@pytest.mark.parametrize("interleaved", (False, True))
def test_the_bits_are_those_of_the_reference(interleaved, cache_dtype, make):
    """Some values saturate."""
    arguments = make(dtype=torch.bfloat16, cache_dtype=cache_dtype, per_token=False, spread=3.0)
    arguments["sin"].zero_()  # no rotation: on a GPU its multiply-add rounds once, not twice
    wanted = copied(arguments)
    rope_append_kv(**arguments, interleaved=interleaved)
    reference.rope_append_kv(**wanted, interleaved=interleaved)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(bits(arguments[name]), bits(wanted[name]))
        assert (arguments[name].float().abs() == LARGEST[cache_dtype]).any()


@QUANTIZED
def test_a_scale_per_token_stores_as_that_scale_per_head(cache_dtype, make):
    arguments = make(cache_dtype=cache_dtype)
    rope_append_kv(**arguments)
    tokens = ("q", "k", "v", "positions", "slots")
    for (b, t), where in rows(arguments):
        alone = copied(arguments)
        alone |= {name: alone[name][b : b + 1, t : t + 1] for name in tokens}
        alone |= {name: alone[name][where] for name in ("k_scale", "v_scale")}
        for name in ("k_cache", "v_cache"):
            alone[name] = torch.zeros_like(alone[name])
        rope_append_kv(**alone)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(bits(alone[name][where]), bits(arguments[name][where]))


@QUANTIZED
def test_scales_per_token_take_the_largest_value(cache_dtype, make):
    arguments = make(cache_dtype=cache_dtype)
    before = copied(arguments)
    k = rope_append_kv(**arguments)[1]
    for name, x in (("k", k), ("v", before["v"])):
        for token, where in rows(before):
            largest = x[token].abs().amax(-1)
            wanted = largest / LARGEST[cache_dtype]
            torch.testing.assert_close(arguments[f"{name}_scale"][where], wanted, rtol=2e-7, atol=0)
            stored = arguments[f"{name}_cache"][where].float().abs().amax(-1)
            assert (stored == LARGEST[cache_dtype]).all()


def every_step(dtype):
    """All values of a dtype of the cache, the largest ones' sizes at most."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    values = codes.float()
    return codes[values.abs() <= LARGEST[dtype]]


@QUANTIZED
def test_every_value_and_every_tie(cache_dtype, make):
    """Values of the cache come back as they are; halves between two of them go to the even one,
    what is just beside a half to the nearer one."""
    values = every_step(cache_dtype).float().unique()
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(x)) for x in (torch.inf, -torch.inf)]
    x = torch.cat([values, ties, *beside, torch.tensor([1e-40, -1e-40, 460.0, -1e30])])
    x = torch.cat([x, x.new_zeros(-len(x) % 8)])
    for part in x.split(256):
        part = part.to(torch.float32)
        arguments = make(
            batch=1, seq_len=1, heads=(1, 1), head_dim=len(part), cache_dtype=cache_dtype,
            per_token=False,
        )  # fmt: skip
        arguments["v"] = part.view(1, 1, 1, -1).to(arguments["q"].device)
        arguments["v_scale"].fill_(1.0)
        rope_append_kv(**arguments)
        ((_, where),) = rows(arguments)
        stored = arguments["v_cache"][where][0].cpu()
        wanted = part.clamp(-LARGEST[cache_dtype], LARGEST[cache_dtype])
        wanted = (wanted.round() if cache_dtype == torch.int8 else wanted).to(cache_dtype)
        assert torch.equal(bits(stored), bits(wanted))


def test_a_tie_after_the_division_is_a_tie(make):
    """The product with a rounded 1 / scale is not: it falls to one side or the other."""
    arguments = make(
        batch=1, seq_len=1, heads=(1, 1), head_dim=128, cache_dtype=torch.int8, per_token=False
    )
    ((_, where),) = rows(arguments)
    ties = torch.arange(-64, 64) + 0.5
    for numerator in range(1999, 2048, 2):  # whose reciprocals round the most
        scale = numerator / 4096  # exact, and so are its products with halves
        arguments["v"] = (ties * scale).view(1, 1, 1, 128).to(arguments["q"].device)
        arguments["v_scale"].fill_(scale)
        rope_append_kv(**arguments)
        assert torch.equal(arguments["v_cache"][where][0].cpu(), ties.round().to(torch.int8))


@PER_TOKEN
@QUANTIZED
def test_zeros(cache_dtype, per_token, make):
    """A scale of 0 gives no NaN."""
    arguments = make(cache_dtype=cache_dtype, per_token=per_token)
    arguments["k"].zero_()
    arguments["v"].zero_()
    if not per_token:
        arguments["k_scale"].zero_()
    rope_append_kv(**arguments)
    for _, where in rows(arguments):
        for name in ("k", "v"):
            assert (read_back(arguments, name)[where] == 0).all()
            assert not per_token or (arguments[f"{name}_scale"][where] == 0).all()


@QUANTIZED
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_what_is_not_finite(value, cache_dtype, make):
    """Per token it makes its head NaN; per head it is stored as float8_e4m3fn or int8 can."""
    arguments = make(batch=1, seq_len=1, cache_dtype=cache_dtype)
    arguments["v"][0, 0, 1, 30] = value
    ((_, where),) = rows(arguments)
    rope_append_kv(**arguments)
    assert read_back(arguments, "v")[where].isnan().all(-1).tolist() == [False, True]
    arguments["k_scale"] = arguments["v_scale"] = torch.ones(2, device=arguments["v"].device)
    rope_append_kv(**arguments)
    wanted = torch.tensor(value).clamp(-LARGEST[cache_dtype], LARGEST[cache_dtype])
    if cache_dtype == torch.int8:
        wanted = wanted.nan_to_num(nan=0.0)
    stored = read_back(arguments, "v")[where][1, 30].cpu()
    torch.testing.assert_close(stored, wanted, rtol=0, atol=0, equal_nan=True)
    assert read_back(arguments, "v")[where].isnan().sum() == wanted.isnan().sum()


def test_strided_scales(make, draw):
    arguments = make(cache_dtype=torch.int8)
    wanted = copied(arguments)
    whole = draw(2, NUM_PAGES, 2, PAGE_SIZE)  # [k or v, page, head, offset]
    for index, name in enumerate(("k_scale", "v_scale")):
        view = whole[index].transpose(1, 2)
        arguments[name] = view.copy_(arguments[name])
    rope_append_kv(**arguments)
    rope_append_kv(**wanted)
    for name in ("k_scale", "v_scale", "k_cache", "v_cache"):
        assert torch.equal(bits(arguments[name]), bits(wanted[name]))


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    (
        ("k", lambda x: x[:, :2], ValueError, r"k: expected shape \[2, 3, num_kv_heads, 40\]"),
        ("k", lambda x: x.half(), TypeError, "k: expected q's dtype"),
        ("v", lambda x: x[..., :8], ValueError, r"v: expected shape \[2, 3, 2, 40\]; got"),
        ("v", lambda x: x.half(), TypeError, "v: expected q's dtype"),
        ("k_cache", lambda x: x.half(), TypeError, "k_cache: expected dtype float32, float8"),
        ("v_cache", lambda x: x.half(), TypeError, "v_cache: expected k_cache's dtype"),
        ("k_cache", lambda x: x[..., :8], ValueError, r"k_cache: expected shape \[num_pages, "),
        ("k_cache", lambda x: x[:, :, :1], ValueError, "k_cache: expected shape"),
        (
            "v_cache",
            lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
            ValueError,
            "v_cache: expected contiguous features",
        ),
        ("cos", lambda x: x.half(), TypeError, "cos: expected dtype float32"),
        ("sin", lambda x: x[:3], ValueError, r"sin: expected shape \[12, 20\]; got \[3, 20\]"),
        ("positions", lambda x: x.float(), TypeError, "positions: expected dtype int32, int64"),
        ("positions", lambda x: None, TypeError, "positions: expected a torch.Tensor"),
        ("slots", lambda x: x.float(), TypeError, "slots: expected dtype int32, int64"),
        ("slots", lambda x: x[:, :2], ValueError, r"slots: expected shape \[2, 3\]; got \[2, 2\]"),
        ("k_scale", lambda _: torch.ones(2), ValueError, "k_scale: expected None for caches of"),
        ("interleaved", lambda _: 1, TypeError, "interleaved: expected a bool; got int"),
    ),
)
def test_wrong_arguments(name, change, error, message, make):
    arguments = make()
    before = copied(arguments)
    changed = change(arguments.get(name))
    changed = changed.to(arguments["q"].device) if torch.is_tensor(changed) else changed
    with pytest.raises(error, match=message):
        rope_append_kv(**arguments | {name: changed})
    assert_only_slots_changed(
        before | {"slots": before["slots"].fill_(-1)}, arguments | {"slots": before["slots"]}
    )


def test_wrong_heads_and_scales(make):
    with pytest.raises(ValueError, match="q: expected a number of heads that is a multiple"):
        rope_append_kv(**make(heads=(3, 2)))
    with pytest.raises(NotImplementedError, match="q: expected a head_dim that is a multiple of 8"):
        rope_append_kv(**make(head_dim=12))
    arguments = make(cache_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"v_scale: expected a tensor for caches of torch\.int8"):
        rope_append_kv(**arguments | {"v_scale": None})
    with pytest.raises(ValueError, match=r"k_scale: expected shape \[2\]; got \[1\]"):
        rope_append_kv(**arguments | {"k_scale": arguments["k_scale"][0, 0, :1]})
    with pytest.raises(ValueError, match="v_scale: expected the shape of k_scale"):
        rope_append_kv(**arguments | {"v_scale": arguments["v_scale"][0, 0]})


@pytest.mark.parametrize("name", ("q", "k", "v", "k_cache", "v_cache", "cos"))
def test_a_gradient_is_refused(name, make):
    arguments = make()
    before = copied(arguments)
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match="q: expected inputs without a gradient"):
        rope_append_kv(**arguments)
    assert torch.equal(bits(arguments["v_cache"].detach()), bits(before["v_cache"]))
    with torch.no_grad():
        assert not rope_append_kv(**arguments)[0].requires_grad


def test_autograd_notices_the_write(make):
    """A cache that was saved for a gradient is not what it was."""
    arguments = make()
    leaf = torch.ones_like(arguments["v_cache"], requires_grad=True)
    product = (leaf * arguments["v_cache"]).sum()
    rope_append_kv(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(make):
    arguments = make()
    wanted = copied(arguments)
    rope_append_kv(**wanted)
    with torch.inference_mode():
        arguments = copied(arguments)
        rope_append_kv(**arguments)
        assert torch.equal(bits(arguments["v_cache"]), bits(wanted["v_cache"]))
