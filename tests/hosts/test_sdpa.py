"""scaled_dot_product_attention beside torch's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from budget import assert_calls
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import gqa_kernels
from gqa_kernels import scaled_dot_product_attention

NAMES = ("query", "key", "value")
LENGTHS = ((1, 5), (9, 9), (40, 12), (12, 40))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def torchs(**inputs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(**inputs)


def assert_within_budget(*calls, **options):
    """One budget for all calls: a single short row says little about eager's error.

    Gradients in bfloat16 only: where a query sees one key, the gradient of eager's softmax is
    exactly 0, and flash attention's a float32 rounding.
    """
    wrt = NAMES if calls[0][0].dtype == torch.bfloat16 else ()
    inputs = [dict(zip(NAMES, call, strict=True)) | options for call in calls]
    assert_calls(scaled_dot_product_attention, torchs, inputs, wrt)


def test_signature():
    schema = torch.ops.aten.scaled_dot_product_attention.default._schema
    expected = [
        (
            x.name,
            x.kwarg_only,
            x.default_value if x.has_default_value() else inspect.Parameter.empty,
        )
        for x in schema.arguments
    ]
    parameters = inspect.signature(scaled_dot_product_attention).parameters.values()
    assert [(x.name, x.kind == x.KEYWORD_ONLY, x.default) for x in parameters] == expected
    assert "scaled_dot_product_attention" in dir(gqa_kernels)


def calls(draw, lengths, num_q_heads, num_kv_heads, dtype=torch.float32):
    result = []
    for seq_len_q, seq_len_kv in lengths:
        kv_shape = (1, num_kv_heads, seq_len_kv, 16)
        shapes = ((1, num_q_heads, seq_len_q, 16), kv_shape, kv_shape)
        result.append([draw(*shape, dtype=dtype) for shape in shapes])
    return result


@DTYPES
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_lengths(is_causal, dtype, draw):
    assert_within_budget(*calls(draw, LENGTHS, 2, 2, dtype), is_causal=is_causal)


def test_batches_and_grouped_heads(draw):
    shapes = (2, 4, 20, 16), (2, 2, 6, 16), (2, 2, 6, 16)
    query, key, value = (draw(*shape, dtype=torch.bfloat16) for shape in shapes)
    assert_within_budget((query, key, value), is_causal=True, enable_gqa=True, scale=0.7)


def test_three_dimensions(draw):
    """The first is the batch, or with grouped heads the heads."""
    shapes = (4, 20, 16), (4, 9, 16), (4, 9, 16)
    query, key, value = (draw(*shape, dtype=torch.bfloat16) for shape in shapes)
    assert_within_budget((query, key, value), is_causal=True)
    assert_within_budget((query, key[1:3], value[1:3]), is_causal=True, enable_gqa=True)


def test_one_query_sees_one_key(draw):
    query, key, value = draw(2, 2, 1, 16), draw(2, 2, 5, 16), draw(2, 2, 5, 16)
    out = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(out, value[:, :, :1])


def test_strides(draw):
    """Views of a projection are read in place; the output is one of [batch, seq_len, …]."""
    qkv = draw(1, 20, 6, 16, dtype=torch.bfloat16)
    views = qkv.transpose(1, 2).split(2, dim=1)
    assert_within_budget(views, is_causal=True)
    out = scaled_dot_product_attention(*views)
    assert out.shape == (1, 2, 20, 16) and out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, scaled_dot_product_attention(*(x.contiguous() for x in views)))


def test_keys_after_the_queries_never_matter(draw):
    query, key, value = draw(1, 2, 5, 16), draw(1, 2, 9, 16), draw(1, 2, 9, 16)
    short = scaled_dot_product_attention(query, key[:, :, :5], value[:, :, :5], is_causal=True)
    key[:, :, 5:] = value[:, :, 5:] = float("nan")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = scaled_dot_product_attention(*leaves, is_causal=True)
    assert torch.equal(out, short)
    for grad in torch.autograd.grad(out.sum(), leaves)[1:]:
        assert torch.equal(grad[:, :, 5:], torch.zeros_like(grad[:, :, 5:]))
        assert grad[:, :, :5].abs().max() > 0


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("sizes", ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 4, 0), (0, 3, 4), (2, 0, 4)))
def test_empty(sizes, is_causal, draw):
    *batch, seq_len_q, seq_len_kv = sizes
    query, key = draw(*batch, seq_len_q, 16), draw(*batch, seq_len_kv, 16)
    out = scaled_dot_product_attention(query, key, key, is_causal=is_causal)
    assert torch.equal(out, torch.zeros_like(query))


def test_compiles_whole(draw):
    torch._dynamo.reset()
    query, key = draw(1, 4, 20, 16).requires_grad_(), draw(1, 2, 6, 16)

    def function(query, key):
        return scaled_dot_product_attention(
            query, key, key, is_causal=True, enable_gqa=True, scale=0.5
        )

    results = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = f(query, key)
        results.append((out, torch.autograd.grad(out.sum(), query)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.transpose(1, 2).is_contiguous() and b.transpose(1, 2).is_contiguous()


def test_one_graph_serves_every_length(draw):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(query, key):
        return scaled_dot_product_attention(query, key, key, is_causal=True)

    counts = []
    for seq_len_q, seq_len_kv in ((5, 8), (6, 12), (7, 9)):
        query, key = draw(1, 2, seq_len_q, 16), draw(1, 2, seq_len_kv, 16)
        expected = scaled_dot_product_attention(query, key, key, is_causal=True)
        assert torch.equal(function(query, key), expected)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    for seq_len_q, seq_len_kv in ((9, 5), (11, 8)):  # more queries: another branch, a window
        query, key = draw(1, 2, seq_len_q, 16), draw(1, 2, seq_len_kv, 16)
        expected = scaled_dot_product_attention(query, key, key, is_causal=True)
        assert torch.equal(function(query, key), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: expected 0.0; got 0.1"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool"),
        ({"enable_gqa": None}, TypeError, "enable_gqa: expected a bool"),
        ({"scale": 0.0}, ValueError, "scale: expected a positive number, or None; got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale: expected a positive number"),
        ({"scale": "1"}, TypeError, "scale: expected a number; got str"),
    ),
)
def test_refused_options(options, error, message, draw):
    query = draw(1, 2, 3, 16)
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(query, query, query, **options)


def test_refused_tensors(draw):
    query, key = draw(2, 4, 3, 16), draw(2, 2, 5, 16)
    mask = torch.ones(3, 3, dtype=torch.bool, device=query.device)
    with pytest.raises(NotImplementedError, match=r"attn_mask: expected None; got Tensor\. Use"):
        scaled_dot_product_attention(query, query, query, mask)
    heads = r"key: expected shape \[2, 4, seq_len_kv, 16\]; got \[2, 2, 5, 16\]\. Fewer key/value "
    heads += "heads need"
    with pytest.raises(ValueError, match=heads):
        scaled_dot_product_attention(query, key, key)
    with pytest.raises(ValueError, match=r"query: .* multiple of key's 3; got 4"):
        other = draw(2, 3, 5, 16)
        scaled_dot_product_attention(query, other, other, enable_gqa=True)
    with pytest.raises(
        ValueError, match=r"key: expected shape \[2, num_kv_heads, seq_len_kv, 16\]"
    ):
        scaled_dot_product_attention(query, key[:1].repeat(3, 1, 1, 1), key, enable_gqa=True)
    with pytest.raises(ValueError, match=r"key: expected shape"):
        scaled_dot_product_attention(query, key[0], key[0], enable_gqa=True)
    with pytest.raises(ValueError, match=r"value: expected key's shape \[2, 2, 5, 16\]; got"):
        scaled_dot_product_attention(query, key, key[..., :8], enable_gqa=True)
    with pytest.raises(TypeError, match="value: expected query's dtype"):
        scaled_dot_product_attention(query, query, query.half())
    with pytest.raises(TypeError, match=r"key: expected a torch\.Tensor; got list"):
        scaled_dot_product_attention(query, [], query)
    with pytest.raises(NotImplementedError, match="query: expected 3 or 4 dimensions; got 5"):
        scaled_dot_product_attention(*[query[None]] * 3)
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 256; got 12"):
        scaled_dot_product_attention(*[query[..., :12]] * 3)


def test_autocast_casts_as_torch_does(draw, device):
    query, key = draw(1, 2, 5, 16), draw(1, 2, 5, 16).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        out = scaled_dot_product_attention(query, key, key)
    assert torch.equal(out, scaled_dot_product_attention(query.bfloat16(), key, key))


@pytest.mark.parametrize(
    ("shapes", "gqa"),
    [
        (((3, 4), (1, 4), (1, 4)), False),
        (((1, 4), (3, 4), (1, 4)), False),
        (((2, 4), (2, 1), (2, 1)), False),
        (((2, 1), (2, 4), (1, 4)), False),
        (((3, 4), (1, 2), (3, 2)), True),
    ],
    ids=str,
)
def test_batches_and_heads_are_broadcast(shapes, gqa, draw, device):
    query, key, value = (
        draw(*shape, length, 16) for shape, length in zip(shapes, (5, 7, 7), strict=True)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    ours = scaled_dot_product_attention(*leaves, enable_gqa=gqa)
    theirs = F.scaled_dot_product_attention(*leaves, enable_gqa=gqa)
    torch.testing.assert_close(ours, theirs)
    cotangent = draw(*ours.shape)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, cotangent),
        torch.autograd.grad(theirs, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
