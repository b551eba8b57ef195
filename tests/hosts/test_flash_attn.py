"""flash-attn's functions: its signatures, and what their arguments mean."""

import inspect

import pytest
import torch
from budget import assert_call

from gqa_kernels import flash_attn, reference

OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# Those of flash-attn 2.8.3.
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {OPTIONS})",
    "flash_attn_kvpacked_func": f"(q, kv, {OPTIONS})",
    "flash_attn_qkvpacked_func": f"(qkv, {OPTIONS})",
    "flash_attn_varlen_func": f"(q, k, v, {BOUNDS}, {OPTIONS}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {BOUNDS}, {OPTIONS})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {OPTIONS})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)"
    ),
}

# Gradients in bfloat16: where a query sees one key, the gradient of eager's softmax is exactly 0,
# and flash attention's a float32 rounding.
BFLOAT16 = torch.bfloat16
SLOPES = torch.tensor([0.5, 0.125])
# Options, and the reference's that mean the same.
MEANINGS = {
    "plain": ({}, {}),
    "causal": ({"causal": True, "deterministic": True}, {"causal": True}),
    "left": (
        {"window_size": [5, -1], "softmax_scale": 0.4},
        {"window": (5, None), "softmax_scale": 0.4},
    ),
    "both": ({"window_size": (7, 2), "softcap": 1.5}, {"window": (7, 2), "softcap": 1.5}),
    "causal-window": ({"causal": True, "window_size": (4, 4)}, {"window": (4, 0)}),
    "alibi": (
        {"window_size": (-3, 0), "alibi_slopes": SLOPES},
        {"causal": True, "alibi_slopes": SLOPES},
    ),
}
EVERY_MEANING = pytest.mark.parametrize(
    ("options", "meaning"), MEANINGS.values(), ids=MEANINGS.keys()
)


@pytest.fixture
def bounds(device):
    def make(*lengths):
        return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    return make


def placed(options, device):
    return {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}


def assert_means(function, options, expected, meaning, tensors):
    """The same outputs, lse and gradients, within the error budget, as the reference's."""
    device = tensors["q"].device
    options, meaning = placed(options, device), placed(meaning, device)

    def actual(**tensors):
        out, lse, dropout_mask = function(**tensors, return_attn_probs=True, **options)
        assert dropout_mask.shape == (0,) and dropout_mask.dtype == out.dtype
        return out, lse

    def reference(**tensors):
        return expected(**tensors, return_lse=True, **meaning)

    assert_call(actual, reference, tensors, ("q", "k", "v"))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_names():
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)
    assert flash_attn.__version__ == "2.8.3"


@EVERY_MEANING
def test_dense(options, meaning, draw):
    """More queries than keys: alignment shows."""
    shapes = {"q": (1, 33, 2, 16), "k": (1, 20, 1, 16), "v": (1, 20, 1, 16)}
    tensors = {name: draw(*shape, dtype=BFLOAT16) for name, shape in shapes.items()}
    assert_means(flash_attn.flash_attn_func, options, reference.flash_attention, meaning, tensors)


@EVERY_MEANING
def test_varlen(options, meaning, draw, bounds):
    """Both ways round, an empty sequence, and a row that belongs to none."""
    shapes = {"q": (22, 2, 16), "k": (20, 1, 16), "v": (20, 1, 16)}
    tensors = {name: draw(*shape, dtype=BFLOAT16) for name, shape in shapes.items()}
    cu_seqlens = {"cu_seqlens_q": bounds(5, 0, 16), "cu_seqlens_kv": bounds(9, 4, 7)}

    def function(q, k, v, **options):
        return flash_attn.flash_attn_varlen_func(q, k, v, *cu_seqlens.values(), 16, 9, **options)

    def expected(q, k, v, **meaning):
        return reference.flash_attention_varlen(q, k, v, **cu_seqlens, **meaning)

    assert_means(function, options, expected, meaning, tensors)


@pytest.mark.parametrize("headdim", (59, 12, 1))
def test_headdims_that_are_no_multiple_of_8(headdim, draw, bounds):
    options, meaning = MEANINGS["causal-window" if headdim == 59 else "alibi"]
    shapes = {"q": (1, 9, 2, headdim), "k": (1, 7, 1, headdim), "v": (1, 7, 1, headdim)}
    tensors = {name: draw(*shape, dtype=BFLOAT16) for name, shape in shapes.items()}
    assert_means(flash_attn.flash_attn_func, options, reference.flash_attention, meaning, tensors)

    def one(q, k, v, **options):
        lengths = bounds(9), bounds(7), 9, 7
        out = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *lengths, **options)
        return (out[0][None], out[1][None], out[2]) if isinstance(out, tuple) else out[None]

    dense = flash_attn.flash_attn_func(**tensors, causal=True)
    assert dense.shape == tensors["q"].shape
    assert torch.equal(one(**tensors, causal=True), dense)
    assert_means(one, {"causal": True}, reference.flash_attention, {"causal": True}, tensors)


def test_slopes_per_sequence(draw, bounds, device):
    slopes = torch.stack([SLOPES, SLOPES.flip(0)])
    options = {"causal": True, "alibi_slopes": slopes}
    shapes = {"q": (2, 8, 2, 16), "k": (2, 8, 1, 16), "v": (2, 8, 1, 16)}
    tensors = {name: draw(*shape, dtype=BFLOAT16) for name, shape in shapes.items()}
    assert_means(flash_attn.flash_attn_func, options, reference.flash_attention, options, tensors)

    dense = flash_attn.flash_attn_func(**tensors, **placed(options, device))
    cu_seqlens = bounds(8, 8)
    packed = flash_attn.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in tensors.values()), cu_seqlens, cu_seqlens, 8, 8,
        **placed(options, device),
    )  # fmt: skip
    assert torch.equal(dense.flatten(0, 1), packed)


def test_shapes(draw, bounds):
    q, k = draw(2, 5, 4, 8), draw(2, 7, 2, 8)
    assert flash_attn.flash_attn_func(q, k, k).shape == q.shape
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 5) and lse.dtype == torch.float32
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q[0], k[0], k[0], bounds(5), bounds(7), 5, 7, return_attn_probs=True
    )
    assert out.shape == (5, 4, 8) and lse.shape == (4, 5) and lse.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "packed" in name])
def test_packed_tensors_give_the_bits_of_separate_ones(name, draw, bounds, monkeypatch):
    dense = "varlen" not in name
    qkv = draw(2, 9, 3, 2, 16) if dense else draw(18, 3, 2, 16)
    separate = [x.contiguous() for x in qkv.unbind(-3)]
    cu_seqlens, options = bounds(4, 14), {"causal": True, "softcap": 2.0}
    lengths = () if dense else (cu_seqlens, cu_seqlens, 14, 14)
    if "qkv" in name:
        packed = [qkv]
        arguments = () if dense else (cu_seqlens, 14)
    else:
        packed = [separate[0], torch.stack(separate[1:], dim=-3)]
        arguments = lengths

    def run(function, tensors, *arguments):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*leaves, *arguments, **options)
        return leaves, out, torch.autograd.grad(out, leaves, torch.ones_like(out))

    seen = []
    for op in ("flash_attention", "flash_attention_varlen"):
        original = getattr(flash_attn.attention, op)

        def noted(q, k, v, *args, original=original, **kwargs):
            seen.append((q, k, v))
            return original(q, k, v, *args, **kwargs)

        monkeypatch.setattr(flash_attn.attention, op, noted)
    leaves, out, grads = run(getattr(flash_attn, name), packed, *arguments)
    storages = {x.untyped_storage().data_ptr() for x in leaves}
    assert {x.untyped_storage().data_ptr() for x in seen[0]} == storages  # nothing was copied

    unpacked = getattr(flash_attn, f"flash_attn{'' if dense else '_varlen'}_func")
    _, expected, (dq, dk, dv) = run(unpacked, separate, *lengths)
    assert torch.equal(out, expected)
    if "qkv" in name:
        assert torch.equal(grads[0], torch.stack((dq, dk, dv), dim=-3))
    else:
        assert torch.equal(grads[0], dq)
        assert torch.equal(grads[1], torch.stack((dk, dv), dim=-3))


@pytest.mark.parametrize("headdim", (16, 12))
def test_compiles_whole(headdim, draw, bounds):
    torch._dynamo.reset()
    qkv, cu_seqlens = draw(12, 3, 2, headdim).requires_grad_(), bounds(4, 8)

    def function(qkv):
        return flash_attn.flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, 8, window_size=(3, -1), softcap=2.0, return_attn_probs=True
        )

    eager = function(qkv)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(qkv)
    for a, b in zip(eager, compiled, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    grads = [torch.autograd.grad(out.sum(), qkv)[0] for out, *_ in (eager, compiled)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: expected 0.0; got 0.1"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive number, or 0.0 .* got -1.0"),
        ({"softcap": None}, TypeError, "softcap: expected a number"),
        ({"window_size": 4}, TypeError, r"window_size: expected \(left, right\); got 4"),
        ({"window_size": (4, None)}, TypeError, "window_size: expected a whole number"),
        ({"window_size": (4, 1.0)}, TypeError, "window_size: expected a whole number; got float"),
        ({"deterministic": 2}, TypeError, "deterministic: expected a bool"),
        ({"return_attn_probs": None}, TypeError, "return_attn_probs: expected a bool"),
        ({"causal": 2}, TypeError, "causal: expected a bool"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale: expected a positive finite"),
        ({"alibi_slopes": SLOPES[:1]}, ValueError, r"alibi_slopes: expected shape \[2\]"),
    ),
)
def test_refused_options(options, error, message, draw, bounds):
    q = draw(3, 2, 16)
    options = placed(options, q.device)
    with pytest.raises(error, match=message):
        flash_attn.flash_attn_func(q[None], q[None], q[None], **options)
    with pytest.raises(error, match=message):
        flash_attn.flash_attn_varlen_func(q, q, q, bounds(3), bounds(3), 3, 3, **options)


def test_longest_lengths_are_whatever_callers_pass(draw, bounds):
    q, cu_seqlens = draw(3, 4, 16), bounds(3)
    expected = flash_attn.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 3, 3)
    for longest in (1, None, cu_seqlens.diff().max()):
        out = flash_attn.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest)
        assert torch.equal(out, expected)


# --- Pages -------------------------------------------------------------------------------------


def in_pages(draw, bounds, page_size, headdim):
    """Sequences of more keys than queries, of fewer, and empty ones, in shuffled pages; NaN
    wherever no key is."""
    lengths_q, lengths_k = (5, 0, 20, 3), (9, 4, 22, 1)
    order, used = torch.randperm(13).tolist(), [-(-n // page_size) for n in lengths_k]
    table = torch.full((4, 6), 99, dtype=torch.int32)
    q, features = draw(sum(lengths_q), 4, headdim), (2, headdim)
    k, v = (torch.full((13, page_size, *features), torch.nan) for _ in range(2))
    for row, length, count in zip(table, lengths_k, used, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
        for x in (k, v):
            keys = torch.full((count * page_size, *features), torch.nan)
            keys[:length] = draw(length, *features).cpu()
            x[row[:count].long()] = keys.view(count, page_size, *features)
    k, v, table = (x.to(q.device) for x in (k, v, table))
    return {"q": q, "k": k, "v": v}, bounds(*lengths_q), bounds(*lengths_k), table


@pytest.fixture
def paged(draw, bounds):
    return in_pages(draw, bounds, 4, 16)


def gathered(pages, cu_seqlens_k, table):
    """The keys of all sequences, one after another."""
    rows = [pages[row.clamp(max=12).long()].flatten(0, 1) for row in table]
    lengths = cu_seqlens_k.diff().tolist()
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@EVERY_MEANING
def test_varlen_reads_pages(options, meaning, dtype, paged, device):
    assert_reads_pages(options, meaning, dtype, paged, device)


@pytest.mark.parametrize(("page_size", "headdim"), ((5, 16), (12, 20), (4, 3)))
def test_varlen_reads_pages_of_any_shape(page_size, headdim, draw, bounds, device):
    pages = in_pages(draw, bounds, page_size, headdim)
    assert_reads_pages(*MEANINGS["both"], torch.bfloat16, pages, device)


def assert_reads_pages(options, meaning, dtype, pages, device):
    inputs, bounds_q, bounds_k, table = pages
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if "alibi_slopes" in options:
        slopes = {"alibi_slopes": SLOPES.repeat(2).to(device)}
        options, meaning = options | slopes, meaning | slopes

    def ours(q, k, v):
        # Only differences of the keys' bounds count.
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, bounds_q, bounds_k + 7, 20, 22,
            block_table=table, return_attn_probs=True, **options,
        )  # fmt: skip
        return out, lse

    def theirs(q, k, v):
        k, v = (gathered(x, bounds_k, table) for x in (k, v))
        return reference.flash_attention_varlen(
            q, k, v, bounds_q, bounds_k, return_lse=True, **meaning
        )

    assert_call(ours, theirs, inputs)


def test_wrong_pages(paged):
    inputs, bounds_q, bounds_k, table = paged

    def call(bounds_k=bounds_k, table=table, **changes):
        tensors = (inputs | changes).values()
        return flash_attn.flash_attn_varlen_func(
            *tensors, bounds_q, bounds_k, 20, 22, block_table=table
        )

    for changes, error, message in (
        ({"table": table.long()}, TypeError, "block_table: expected dtype int32"),
        ({"table": table[:2]}, ValueError, r"block_table: expected shape \[4, max_pages\]"),
        ({"bounds_k": bounds_k[:3]}, ValueError, r"cu_seqlens_k: expected shape \[5\]; got \[3\]"),
        ({"k": inputs["k"].flatten(0, 1)}, ValueError, r"k: expected shape \[num_pages, page_size"),
        ({"v": inputs["v"][:5]}, ValueError, r"v: expected shape \[13, 4, 2, 16\]"),
        ({"k": inputs["k"].half()}, TypeError, "k: expected q's dtype"),
        ({"q": inputs["q"].clone().requires_grad_()}, NotImplementedError, "q: expected inputs w"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call(**changes)


def test_refused_tensors(draw, bounds):
    q, cu_seqlens = draw(3, 4, 16), bounds(3)
    with pytest.raises(TypeError, match=r"kv: expected a torch\.Tensor; got tuple"):
        flash_attn.flash_attn_kvpacked_func(q[None], (q[None], q[None]))
    shape = r"qkv: expected shape \[batch, seqlen, 3, nheads, headdim\]; got \[1, 3, 2, 4, 16\]"
    with pytest.raises(ValueError, match=shape):
        flash_attn.flash_attn_qkvpacked_func(draw(1, 3, 2, 4, 16))
    with pytest.raises(ValueError, match=r"kv: expected shape \[total_k, 2, nheads_k, headdim\]"):
        flash_attn.flash_attn_varlen_kvpacked_func(
            q, draw(1, 3, 2, 4, 16), cu_seqlens, cu_seqlens, 3, 3
        )
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 256; got 257"):
        flash_attn.flash_attn_qkvpacked_func(draw(1, 3, 3, 1, 257))
    with pytest.raises(ValueError, match=r"^k: expected shape \[\*, \*, \*, 12\]; got \[.*, 13\]"):
        flash_attn.flash_attn_func(draw(1, 3, 4, 12), draw(1, 3, 4, 13), draw(1, 3, 4, 12))
