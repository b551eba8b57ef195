"""The backend "torch": the op table, as for the kernels, and what is peculiar to it."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from budget import SEED, assert_call, assert_ok

from gqa_kernels import native, reference
from gqa_kernels.accuracy import measure, run
from gqa_kernels.spec import IN_PLACE_OPS, OPS, STRUCTURES, optimizer
from gqa_kernels.spec.optimizer import on_copies

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def without_lse(spec):
    """The spec on this backend, without return_lse, which the reference computes."""

    def make_inputs(*context):
        inputs = spec.make_inputs(*context)
        inputs.pop("return_lse", None)
        return inputs

    kernel = getattr(native, spec.name)
    kernel = on_copies(kernel) if spec in optimizer.IN_PLACE_OPS else kernel
    return replace(spec, kernel=kernel, make_inputs=make_inputs)


# Those that are the reference's are not measured beside themselves.
SPECS = [
    without_lse(spec)
    for spec in (*OPS, *IN_PLACE_OPS)
    if getattr(native, spec.name) is not getattr(reference, spec.name)
]
DELEGATED = {"window", "softcap", "sinks", "alibi", "padded", "documents"}


def own_cases(spec):
    """The test cases that the backend computes itself."""
    names = DELEGATED if spec.name == "prefill_attention" else DELEGATED | {"cache_dtype"}
    return [c for c in spec.test_cases() if not any(c.sizes.get(name) for name in names)]


TABLE = [
    pytest.param(spec, case, id=f"{spec.name}-{case}") for spec in SPECS for case in own_cases(spec)
]
DIFFERENTIABLE = [pytest.param(spec, id=spec.name) for spec in SPECS if spec.wrt]


@pytest.mark.covering(1, each="spec")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), TABLE)
def test_within_budget(spec, case, dtype, device):
    assert_ok(measure(spec, case, dtype, device, SEED))


@pytest.mark.covering(1)
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "normal"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_inputs_with_structure(spec, structure, device):
    """A small case of each op in one dtype; case and dtype vary with the structure."""
    index = list(STRUCTURES).index(structure)
    cases = own_cases(spec)
    case = replace(cases[index % len(cases)], structure=structure)
    assert_ok(measure(spec, case, DTYPES[index % len(DTYPES)], device, SEED))


def test_the_names_and_signatures_are_the_references():
    assert set(native.__all__) == {spec.name for spec in (*OPS, *IN_PLACE_OPS)}
    for name in native.__all__:
        ours = inspect.signature(getattr(native, name))
        assert ours == inspect.signature(getattr(reference, name)), name


def views(x):
    """The same values in rows with gaps, and with features that are not contiguous."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 8 : 8 + x.shape[-1]] = x
    yield wide[..., 8 : 8 + x.shape[-1]]
    yield x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("view", (0, 1), ids=("strided", "transposed"))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_strided_views_give_the_same_and_are_not_written(spec, view, device, generator):
    inputs = spec.make_inputs(spec.test_cases()[0], torch.bfloat16, device, generator)
    written = ("k_cache", "v_cache") if spec.name == "rope_append_kv" else ()
    viewed, untouched = dict(inputs), {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():
            viewed[name] = list(views(x))[view]
            untouched[name] = viewed[name].clone()
    ours, theirs = spec.kernel(**viewed), spec.reference(**inputs)
    pairs = (
        [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
    )
    pairs += [(viewed[name], inputs[name]) for name in written]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, equal_nan=True)
    for name in untouched.keys() - set(written):
        torch.testing.assert_close(viewed[name], untouched[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_gradients_repeat_their_bits_and_stand_alone(spec, device, generator):
    inputs = spec.make_inputs(spec.test_cases()[0], torch.float32, device, generator)
    together, again = (run(spec.kernel, inputs, spec.wrt) for _ in range(2))
    for what, value in together.items():
        assert torch.equal(value, again[what])
    for name in spec.wrt if len(together) == 1 + len(spec.wrt) else ():  # ops with one output
        assert torch.equal(run(spec.kernel, inputs, (name,))[f"d {name}"], together[f"d {name}"])
    with torch.no_grad():
        out = spec.kernel(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    assert all(torch.equal(x, together[f"output {i}"]) for i, x in enumerate(out))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_float64_is_computed_in_float64(spec, device, generator):
    case = spec.test_cases()[0]
    inputs = spec.make_inputs(case, torch.float64, device, generator)
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    ours, theirs = spec.kernel(**inputs), spec.reference(**copies)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- Attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", ((9, 4), (3, 0), (0, 5), (0, 0)))
def test_queries_that_see_no_key_give_nothing(lengths, draw):
    q, k, v = (draw(2, n, h, 16) for n, h in zip((*lengths, lengths[1]), (4, 2, 2), strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = native.flash_attention(*leaves, causal=True)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    blind = max(0, lengths[0] - lengths[1])
    assert (out[:, :blind] == 0).all() and (grads[0][:, :blind] == 0).all()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_no_dtype(dtype, draw, device):
    q = draw(1, 5, 2, 16, dtype=dtype)
    expected = native.flash_attention(q, q, q, causal=True)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(native.flash_attention(q, q, q, causal=True), expected)


def test_packed_sequences_have_the_bits_of_each_alone(draw, device):
    q, k = draw(50, 4, 16), draw(50, 2, 16)
    bounds = [0, 20, 20, 47]
    cu_seqlens = torch.tensor(bounds, device=device)
    packed = native.flash_attention_varlen(q, k, k, cu_seqlens, cu_seqlens, causal=True)
    for first, end in ((0, 20), (20, 47)):
        rows = q[None, first:end], k[None, first:end], k[None, first:end]
        assert torch.equal(packed[first:end], native.flash_attention(*rows, causal=True)[0])
    assert (packed[47:] == 0).all()


# --- Caches ------------------------------------------------------------------------------------


def decode_inputs(lengths, draw, device, *, seq_len_q=1, pages=None):
    """Caches of 24 entries, NaN where nothing is to be read; with `pages` in pages of 4."""
    batch = len(lengths)
    caches = [draw(batch, 24, 2, 16) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(lengths):
            cache[row, max(length, 0) :] = math.nan
    inputs = {"q": draw(batch, seq_len_q, 6, 16), "seq_lens": torch.tensor(lengths, device=device)}
    if pages:
        table = torch.randperm(batch * 6, device=device).view(batch, 6)
        paged = [cache.unflatten(1, (6, 4)).flatten(0, 1) for cache in caches]
        caches = [x.new_full(x.shape, math.nan).index_copy(0, table.flatten(), x) for x in paged]
        inputs["block_table"] = table.to(torch.int32)
        for row, length in enumerate(lengths):
            inputs["block_table"][row, -(-max(length, 0) // 4) :] = -7
    return inputs | {"k_cache": caches[0], "v_cache": caches[1]}


@pytest.mark.parametrize("pages", (False, True), ids=("contiguous", "pages"))
@pytest.mark.parametrize("bounds", ([0, 3, 6, 9], [0, 0, 9, 9], [0, 1, 2, 7], [0, 20, 20, 20]))
@pytest.mark.parametrize("lengths", ([24, 9, 3], [7, 2, 12], [99, -3, 4]))
def test_any_prefill(lengths, bounds, pages, draw, device):
    inputs = decode_inputs(lengths, draw, device, pages=pages)
    inputs["q"] = draw(9, 6, 16)
    inputs["cu_seqlens_q"] = torch.tensor(bounds, device=device)
    assert_call(native.prefill_attention, reference.prefill_attention, inputs)


@pytest.mark.parametrize("pages", (False, True), ids=("contiguous", "pages"))
@pytest.mark.parametrize("seq_len_q", (1, 3))
@pytest.mark.parametrize(
    "lengths", ([9, 9, 9], [24, 3, 12], [7, 0, 7], [5, 0, 23], [1, 2, 17], [0, 0, 0], [99, -3, 4])
)
def test_any_lengths(lengths, seq_len_q, pages, draw, device):
    inputs = decode_inputs(lengths, draw, device, seq_len_q=seq_len_q, pages=pages)
    before = {name: x.clone() for name, x in inputs.items()}
    assert_call(native.decode_attention, reference.decode_attention, inputs)
    for name, x in inputs.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("page", (-1, 1 << 30))
def test_a_page_that_is_not_there_hides_its_keys(page, draw, device):
    inputs = decode_inputs([24, 9], draw, device, pages=True)
    inputs["block_table"][0, 2] = page
    assert_call(native.decode_attention, reference.decode_attention, inputs)


def test_a_whole_cache_of_zero_pages_or_sequences(draw, device):
    q, cache = draw(2, 1, 4, 16), draw(0, 4, 2, 16)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    lengths = torch.tensor([3, 5], device=device)
    assert (native.decode_attention(q, cache, cache, lengths, block_table=table) == 0).all()
    assert native.decode_attention(q[:0], cache, cache, lengths[:0]).shape == (0, 1, 4, 16)


def test_too_many_new_tokens_are_refused_as_by_the_reference(draw, device):
    q, cache, lengths = draw(1, 17, 2, 16), draw(1, 40, 2, 16), torch.tensor([20], device=device)
    for ops in (native, reference):
        with pytest.raises(NotImplementedError, match="q: expected a seq_len_q of 1 to 16; got 17"):
            ops.decode_attention(q, cache, cache, lengths)


@pytest.mark.parametrize("slots", ([3, -1, 9, 1], [-1] * 4, [0, 1, 2, 400], [15, 14, -7, 16]))
@pytest.mark.parametrize("contiguous", (True, False))
def test_slots_that_are_not_there_are_not_written(slots, contiguous, draw, device):
    def call(ops):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(2, 2, h, 8, generator=generator).to(device) for h in (4, 2, 2))
        store = torch.randn(2, 4, 8, 2, 8, generator=generator).to(device)
        caches = store if contiguous else store[:, :, ::2]
        angles = torch.randn(2, 5, 4, generator=generator).to(device)
        positions = torch.tensor([[0, 4], [2, 7]], device=device)  # the last is not in the table
        where = torch.tensor(slots, device=device).view(2, 2)
        return *ops.rope_append_kv(q, k, v, *caches, *angles, positions, where), store

    for ours, theirs in zip(call(native), call(reference), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("position", (-1, 5))
def test_a_position_outside_of_the_table_is_nan_in_its_row(position, draw, device):
    q, angles = draw(2, 3, 2, 8), draw(2, 5, 4)
    positions = torch.tensor([[0, 1, 2], [3, position, 4]], device=device)
    rotated, _ = native.apply_rope(q, q, *angles, positions)
    assert rotated.isnan().all((-2, -1)).nonzero().tolist() == [[1, 1]]
    assert rotated.isnan().sum() == 16


@pytest.mark.parametrize("positions", ([[0, 1]], [[-1, 7]], None))
def test_a_table_without_rows_gives_nan(positions, draw, device):
    q, angles = draw(1, 2, 2, 8), draw(2, 0, 4)
    positions = None if positions is None else torch.tensor(positions, device=device)
    for rotated in native.apply_rope(q, q, *angles, positions):
        assert rotated.shape == q.shape and rotated.isnan().all()


# --- The loss ----------------------------------------------------------------------------------


def test_ignored_rows_are_not_read_and_unknown_targets_are_nan(draw, device):
    hidden, weight = draw(200, 16), draw(300, 16).requires_grad_()
    targets = torch.arange(200, device=device)
    targets[::3] = -100
    hidden[::3] = math.nan
    hidden.requires_grad_()
    loss = native.linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][::3] == 0).all() and (grads[0][1::3] != 0).any()
    targets[1] = 300
    assert native.linear_cross_entropy(hidden, weight, targets).isnan()
    assert native.linear_cross_entropy(
        hidden[::3], weight, targets[::3]
    ).isnan()  # the mean over no rows


@pytest.mark.parametrize("count", (0, 3))
def test_a_mean_of_no_rows_has_no_gradient(count, draw, device):
    leaves = draw(count, 16).requires_grad_(), draw(30, 16).requires_grad_()
    targets = torch.full((count,), -100, device=device)
    for ops in (native, reference):
        loss = ops.linear_cross_entropy(*leaves, targets)
        assert loss.isnan() and all((x == 0).all() for x in torch.autograd.grad(loss, leaves))


def test_a_second_derivative_of_the_loss_raises(draw, device):
    hidden, weight = draw(5, 16).requires_grad_(), draw(30, 16).requires_grad_()
    loss = native.linear_cross_entropy(hidden, weight, torch.arange(5, device=device))
    grads = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    assert all(
        x.equal(y) for x, y in zip(grads, torch.autograd.grad(loss, (hidden, weight)), strict=True)
    )
    for grad, leaf in ((grads[0], hidden), (grads[1], hidden), (grads[0], weight)):
        with pytest.raises(NotImplementedError, match="expected first derivatives only; got a sec"):
            torch.autograd.grad(loss + grad.square().sum(), leaf, retain_graph=True)


def test_chunks_add_up_and_large_scores_do_not_overflow(draw, device, monkeypatch):
    monkeypatch.setattr(native.losses, "_LOGITS", 0)
    monkeypatch.setattr(native.losses, "_MIN_ROWS", 7)
    inputs = {"hidden": 50.0 * draw(4, 10, 16), "weight": draw(300, 16)}
    inputs["targets"] = torch.randint(300, (4, 10), generator=torch.Generator().manual_seed(0))
    inputs["targets"] = inputs["targets"].to(device)
    calls = (native.linear_cross_entropy, reference.linear_cross_entropy)
    assert_call(*calls, inputs, ("hidden", "weight"))
    assert_call(*calls, inputs | {"num_predictions": 3.0}, ("hidden", "weight"))


def test_a_compiled_call_is_the_call(draw):
    """While a compiler traces, no op reads a tensor's values."""
    q, cache = draw(2, 1, 4, 16), draw(2, 20, 2, 16)
    for lengths in ([7, 7], [3, 20]):
        given = (q, cache, cache, torch.tensor(lengths, device=q.device))
        compiled = torch.compile(native.decode_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), native.decode_attention(*given))
