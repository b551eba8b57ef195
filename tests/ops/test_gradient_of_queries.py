"""dq where keys and values have a mean: the biases of projections and the outlier channels of real
models. An error of delta is multiplied by the mean of the keys that a query sees."""

import pytest
import torch
from budget import assert_call

import gqa_kernels
from gqa_kernels import reference
from gqa_kernels.flash_attn import flash_attn_func
from gqa_kernels.ops import attention
from gqa_kernels.ops.attention import backward

OFFSETS = (0.0, 1.0, 2.0, 4.0, 10.0)  # in standard deviations
DRIFTS = pytest.mark.parametrize("drift", (0.0, 0.5), ids=("constant", "drifting"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
FORMS = {
    "all keys": {},
    "causal": {"causal": True},
    "a window": {"causal": True, "window": (20, None)},
    "a window to both sides": {"window": (9, 5)},
    "a soft cap": {"causal": True, "softcap": 20.0},
    "sinks": {"causal": True, "sinks": (4,)},
    "slopes": {"causal": True, "alibi_slopes": (4,)},
    "padding": {"causal": True, "key_mask": 7},
    "documents": {"causal": True, "key_ranges": 16},
}


@pytest.fixture
def draw(device, generator):
    """(q, k, v) of 48 queries and 64 keys; k and v have a mean, of one vector per head, which is
    multiplied by 1 − drift at the first key and by 1 + drift at the last."""

    def make(offset, drift, dtype, heads=(4, 2)):
        def normals(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        ramp = 1.0 + drift * torch.linspace(-1.0, 1.0, 64)[:, None, None]
        q = normals(1, 48, heads[0], 64)
        k, v = (
            normals(1, 64, heads[1], 64) + offset * ramp * normals(heads[1], 64) for _ in range(2)
        )
        return {"q": q.to(device, dtype), "k": k.to(device, dtype), "v": v.to(device, dtype)}

    return make


def options_of(form, device, generator):
    """The arguments of a form; sizes stand for tensors."""
    options = dict(FORMS[form])
    if "sinks" in options:
        options["sinks"] = torch.randn(4, generator=generator).to(device)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    if "key_mask" in options:
        options["key_mask"] = (torch.arange(64, device=device) >= options["key_mask"])[None]
    if "key_ranges" in options:
        first = (torch.arange(48, device=device) + 16) // options["key_ranges"] * 16
        options["key_ranges"] = torch.stack((first, first + 16), -1)[None]
    return options


def assert_attention(inputs):
    wrt = [name for name in ("q", "k", "v", "sinks") if name in inputs]
    assert_call(gqa_kernels.flash_attention, reference.flash_attention, inputs, tuple(wrt))


@pytest.mark.covering(2)
@DRIFTS
@DTYPES
@pytest.mark.parametrize("offset", OFFSETS)
def test_offsets(offset, dtype, drift, draw):
    assert_attention({**draw(offset, drift, dtype), "causal": True})


@pytest.mark.covering(1)
@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_every_mask_form(form, dtype, draw, device, generator):
    drift = 0.5 if dtype == torch.bfloat16 else 0.0
    assert_attention({**draw(10.0, drift, dtype), **options_of(form, device, generator)})


@pytest.mark.parametrize("heads", ((4, 4), (4, 1)), ids=("mha", "mqa"))
def test_other_groups(heads, draw):
    assert_attention({**draw(10.0, 0.5, torch.bfloat16, heads), "causal": True})


@DTYPES
def test_packed_sequences(dtype, draw, device):
    inputs = {name: x[0, :48] for name, x in draw(10.0, 0.5, dtype).items()}
    bounds = torch.tensor([0, 5, 5, 31, 48], device=device, dtype=torch.int32)
    inputs |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "causal": True}
    assert_call(
        gqa_kernels.flash_attention_varlen,
        reference.flash_attention_varlen,
        inputs,
        ("q", "k", "v"),
    )


def test_scores_of_a_thousand(draw):
    """float32: weights are computed again from lse, whose rounding must not be theirs three times
    over."""
    inputs = draw(0.0, 0.0, torch.float32)
    inputs["q"][..., 3::16] *= 30.0
    inputs["k"][..., 3::16] *= 30.0
    assert_attention(inputs)


@pytest.mark.covering(1)
@DTYPES
@pytest.mark.parametrize("seed", (19, 20, 21))
def test_one_token_among_many_of_another(seed, dtype, device):
    """Equal weights are all rounded in one direction: their rounded sum is as far from the sum as
    it can be."""
    generator = torch.Generator().manual_seed(seed)

    def normals(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    which = torch.ones(64, dtype=torch.long)
    which[-1] = 0
    k, v = ((normals(2, 32) + 3.0 * normals(32))[which][None, :, None] for _ in range(2))
    q = normals(1, 4, 1, 32)
    assert_attention({name: x.to(device, dtype) for name, x in (("q", q), ("k", k), ("v", v))})


@DTYPES
def test_an_infinite_output(dtype, device):
    """Gradients have the special values of float32's."""

    def grads(dtype):
        q, k, v = (torch.ones(1, rows, 1, 8, device=device, dtype=dtype) for rows in (1, 2, 2))
        v[0, 1, 0, 0] = torch.inf
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = gqa_kernels.flash_attention(*leaves)
        return [grad.float() for grad in torch.autograd.grad(out, leaves, torch.ones_like(out))]

    for ours, wanted in zip(grads(dtype), grads(torch.float32), strict=True):
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("name", ("flash_attn_func", "scaled_dot_product_attention"))
def test_other_peoples_names(name, draw):
    inputs = draw(10.0, 0.0, torch.bfloat16)

    def heads_first(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = gqa_kernels.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2)

    function = heads_first if name == "scaled_dot_product_attention" else flash_attn_func

    def call(q, k, v):
        return function(q, k, v)

    assert_call(call, reference.flash_attention, inputs, ("q", "k", "v"))


def test_a_pass_without_gradients_keeps_nothing_more(draw, monkeypatch):
    inputs = draw(0.0, 0.0, torch.bfloat16)
    kept = []
    real = attention.launch_forward

    def spy(call, *, need_lse, need_residue):
        kept.append(need_residue)
        return real(call, need_lse=need_lse, need_residue=need_residue)

    monkeypatch.setattr(attention, "launch_forward", spy)
    plain = gqa_kernels.flash_attention(**inputs)
    inputs["k"].requires_grad_()
    recorded = gqa_kernels.flash_attention(**inputs)
    compiled = torch.compile(gqa_kernels.flash_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), plain)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), plain)
    assert torch.equal(plain, recorded)
    assert kept == [False, True, True, False]


def test_one_byte_per_element_is_saved(draw):
    inputs = draw(0.0, 0.0, torch.bfloat16)
    inputs["q"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = gqa_kernels.flash_attention(**inputs)
    (residue,) = [x for x in saved if x.dtype == torch.int8]
    assert residue.shape == out.shape


def test_what_was_not_kept_is_computed_again(draw):
    """As by the ops of torch.library, called without need_residue."""
    inputs = draw(10.0, 0.0, torch.bfloat16)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = gqa_kernels.flash_attention(**inputs)
    cotangent = torch.ones_like(out)
    expected = torch.autograd.grad(out, leaves, cotangent)
    nothing = (None,) * 10
    out, _, residue = torch.ops.gqa_kernels.flash_attention(*leaves, *nothing, False)
    assert residue.numel() == 0
    for grad, wanted in zip(torch.autograd.grad(out, leaves, cotangent), expected, strict=True):
        assert torch.equal(grad, wanted)


def test_the_cure_is_needed(draw, monkeypatch):
    """Without it dq leaves its budget: these inputs can tell."""

    def rounded_alone(*arguments):
        *arguments, _ = arguments
        return prepare(*arguments, None)

    prepare = backward._prepare
    monkeypatch.setattr(backward, "_prepare", rounded_alone)
    with pytest.raises(AssertionError, match="d q: error"):
        assert_attention({**draw(4.0, 0.0, torch.bfloat16), "causal": True})


def test_jit_trace_takes_what_requires_a_gradient(draw):
    """Its own check calls the function where autograd is off, and compares the graphs."""
    inputs = draw(0.0, 0.0, torch.bfloat16)
    leaves = [x.requires_grad_() for x in inputs.values()]
    traced = torch.jit.trace(lambda q, k, v: gqa_kernels.flash_attention(q, k, v), tuple(leaves))
    plain = gqa_kernels.flash_attention(*leaves)
    assert torch.equal(traced(*leaves), plain)
    cotangent = torch.ones_like(plain)
    expected = torch.autograd.grad(plain, leaves, cotangent)
    for grad, wanted in zip(
        torch.autograd.grad(traced(*leaves), leaves, cotangent), expected, strict=True
    ):
        assert torch.equal(grad, wanted)
