"""Numbers and flags of other kinds than Python's own give what those give."""

import numpy as np
import pytest
import torch

from gqa_kernels import apply_rope, decode_attention, flash_attention, rms_norm, swiglu
from gqa_kernels.flash_attn import flash_attn_func, flash_attn_with_kvcache
from gqa_kernels.runtime import checks
from gqa_kernels.sdpa import scaled_dot_product_attention


def _on_heads(function):
    return lambda x, **options: function(x, x, x, **options)


def _rope(x, **options):
    angles = x[0, :, 0, : x.shape[3] // 2]
    return apply_rope(x, x, angles.cos(), angles.sin(), **options)[0]


def _decode(x, **options):
    lengths = torch.full((len(x),), 4, device=x.device)
    return decode_attention(x[:, :2].contiguous(), x, x, lengths, **options)


def _norm(x, **options):
    return rms_norm(x, x[0, 0, 0], **options)


CASES = (
    (_on_heads(flash_attention), {"window": (2, None)}, {"window": (np.int64(2), None)}),
    (_on_heads(flash_attention), {"window": (2, 1)}, {"window": torch.tensor([2, 1])}),
    (_on_heads(flash_attention), {"causal": True}, {"causal": np.bool_(True)}),
    (_on_heads(flash_attention), {"softmax_scale": 0.5}, {"softmax_scale": np.float32(0.5)}),
    (_on_heads(flash_attn_func), {"window_size": (2, 0)}, {"window_size": np.array([2, 0])}),
    (
        _on_heads(flash_attn_func),
        {"window_size": (2, -1)},
        {"window_size": (torch.tensor(2), np.int32(-1))},
    ),
    (
        _on_heads(flash_attn_func),
        {"causal": True, "deterministic": True},
        {"causal": np.int64(1), "deterministic": 1, "return_attn_probs": 0},
    ),
    (
        _on_heads(flash_attn_with_kvcache),
        {"cache_seqlens": 3, "causal": True},
        {"cache_seqlens": np.int32(3), "causal": np.bool_(True), "num_splits": np.int8(1)},
    ),
    (_on_heads(scaled_dot_product_attention), {"is_causal": True}, {"is_causal": np.bool_(True)}),
    (_decode, {"softmax_scale": 0.5}, {"softmax_scale": np.float16(0.5)}),
    (_rope, {"interleaved": True}, {"interleaved": np.bool_(True)}),
    (_norm, {"eps": 0.5}, {"eps": np.float32(0.5)}),
    (_norm, {"eps": 1.0}, {"eps": 1}),
)


@pytest.mark.parametrize(("function", "plain", "other"), CASES)
def test_other_kinds_give_the_same(function, plain, other, draw):
    x = draw(2, 5, 4, 16)
    expected = function(x, **plain)
    assert torch.equal(function(x, **other), expected)
    assert not torch.equal(function(x), expected)


def test_a_numpy_eps_under_a_compiler(draw):
    """Which makes a tensor of it, so that the op is called outside of the graph."""
    x = draw(3, 16)

    def function(a, eps):
        return rms_norm(swiglu(a, a), a[0], eps)

    compiled = torch.compile(lambda a: function(a, np.float32(0.5)), backend="aot_eager")
    assert torch.equal(compiled(x), function(x, 0.5))


@pytest.mark.parametrize(
    "wrong", [True, np.bool_(True), 1.0, "1", torch.tensor(1.0), torch.tensor(True)], ids=repr
)
def test_what_is_no_whole_number(wrong):
    with pytest.raises(TypeError, match="x: expected a whole number; got "):
        checks.whole("x", wrong)


def test_a_tensor_elsewhere_is_not_read():
    for x in (torch.tensor(1, device="meta"), torch.tensor([1])):
        with pytest.raises(TypeError, match="x: expected a whole number; got Tensor"):
            checks.whole("x", x)
    with pytest.raises(TypeError, match="window_size: expected a whole number; got Tensor"):
        checks.window_size(torch.zeros(2, device="meta", dtype=torch.int64))


@pytest.mark.parametrize("wrong", [2, (1, 2, 3), torch.tensor(2), np.ones((2, 2)), {1, 2}, "12"])
def test_what_is_no_window(wrong):
    for function, name in ((checks.window, "window"), (checks.window_size, "window_size")):
        with pytest.raises(TypeError, match=rf"^{name}: expected \(left, right\); got"):
            function(wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_called_so(draw):
    nested = torch.nested.nested_tensor([draw(3, 2, 16), draw(5, 2, 16)])
    with pytest.raises(TypeError, match=r"q: expected a strided tensor; got a nested tensor$"):
        flash_attention(nested, nested, nested)
