"""What is peculiar to flash_attention_varlen: sequences packed one after another."""

import pytest
import torch
from budget import assert_call

from gqa_kernels import reference
from gqa_kernels.accuracy import run
from gqa_kernels.ops.attention import flash_attention, flash_attention_varlen

WRT = ("q", "k", "v")


@pytest.fixture
def bounds(device):
    def make(*lengths, dtype=torch.int32):
        return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)

    return make


def assert_within_budget(q, k, v, cu_seqlens_q, cu_seqlens_kv, wrt=WRT, **kwargs):
    inputs = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
    inputs |= {"return_lse": True, **kwargs}
    assert_call(flash_attention_varlen, reference.flash_attention_varlen, inputs, wrt)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_other_lengths_of_queries_and_keys(causal, dtype, draw, bounds):
    """Empty on either side, on both, longer queries, longer keys, one row; the last is empty."""
    lengths_q, lengths_kv = (0, 5, 0, 33, 1, 40, 0), (7, 0, 0, 20, 35, 65, 0)
    q = draw(sum(lengths_q), 4, 16, dtype=dtype)
    k, v = (draw(sum(lengths_kv), 2, 16, dtype=dtype) for _ in range(2))
    assert_within_budget(q, k, v, bounds(*lengths_q), bounds(*lengths_kv), causal=causal)


def test_a_sequence_equals_itself_alone(draw, bounds):
    """To the bit, gradients too: nothing of its neighbours or of its place comes in."""
    lengths = (17, 0, 40, 33, 1)
    tensors = {
        name: draw(sum(lengths), heads, 32) for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    cu_seqlens = bounds(*lengths)
    scores = {"causal": True, "window": (25, None), "return_lse": True}
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    out, lse = flash_attention_varlen(*leaves, cu_seqlens, cu_seqlens, **scores)
    dout, dlse = draw(*out.shape), draw(*lse.shape)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for i in range(len(lengths)):
        rows = slice(*cu_seqlens[i : i + 2].tolist())
        alone = [x[None, rows].clone().requires_grad_() for x in tensors.values()]
        out_alone, lse_alone = flash_attention(*alone, **scores)
        assert torch.equal(out[rows], out_alone[0])
        assert torch.equal(lse[:, rows], lse_alone[0])
        if rows.start < rows.stop:
            expected = torch.autograd.grad(
                (out_alone, lse_alone), alone, (dout[None, rows], dlse[None, :, rows])
            )
            assert all(torch.equal(a[rows], b[0]) for a, b in zip(grads, expected, strict=True))


def test_nan_in_a_neighbour_never_matters(draw, bounds):
    cu_seqlens = bounds(19, 21, 24)
    q, k, v = draw(64, 2, 16), draw(64, 2, 16), draw(64, 2, 16)
    clean = run(
        flash_attention_varlen,
        {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens},
        WRT,
    )
    for x in (q, k, v):
        x[:19] = x[40:] = float("nan")
    dirty = run(
        flash_attention_varlen,
        {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens},
        WRT,
    )
    for what in clean:
        assert torch.equal(clean[what][19:40], dirty[what][19:40]), what


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_rows_after_the_last_sequence(dtype, draw, bounds):
    q, k, v = draw(50, 2, 16), draw(60, 2, 16), draw(60, 2, 16)
    cu_seqlens = bounds(20, 3, dtype=dtype)
    inputs = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    results = run(flash_attention_varlen, inputs | {"causal": True, "return_lse": True}, WRT)
    assert not results["output 0"][23:].any()
    assert (results["output 1"][:, 23:] == -torch.inf).all()
    assert not any(results[f"d {name}"][23:].any() for name in WRT)
    assert_within_budget(q, k, v, cu_seqlens, cu_seqlens, causal=True)


def test_many_sequences(draw, bounds):
    """More sequences than rows in a block, so that programs search and most find nothing to do.

    In bfloat16: of so few keys eager's float32 gradients are exact, 0 for a single one.
    """
    lengths = [i % 4 for i in range(70)]
    q, k = (draw(sum(lengths), heads, 16, dtype=torch.bfloat16) for heads in (2, 1))
    assert_within_budget(q, k, k.clone(), bounds(*lengths), bounds(*lengths), causal=True)


def test_all_that_shapes_scores(draw, bounds, device):
    q, k, v = draw(60, 6, 16), draw(70, 2, 16), draw(70, 2, 16)
    assert_within_budget(
        q, k, v, bounds(20, 0, 40), bounds(25, 5, 40), (*WRT, "sinks"),
        window=(13, 5), softcap=2.0, sinks=draw(6), alibi_slopes=torch.rand(3, 6).to(device),
    )  # fmt: skip


@pytest.mark.parametrize("rows", ((0, 0), (5, 0), (0, 5)))
def test_empty(rows, draw, bounds):
    q, k = draw(rows[0], 2, 16), draw(rows[1], 2, 16)
    inputs = {"q": q, "k": k, "v": k, "cu_seqlens_q": bounds(rows[0])}
    inputs |= {"cu_seqlens_kv": bounds(rows[1]), "return_lse": True}
    results = run(flash_attention_varlen, inputs, WRT)
    assert torch.equal(results["output 0"], torch.zeros_like(q))
    assert torch.equal(results["output 1"], torch.full((2, rows[0]), -torch.inf, device=q.device))
    assert not any(results[f"d {name}"].any() for name in WRT)


def test_bounds_beyond_the_rows_read_nothing_beyond_them(draw, bounds):
    storage = draw(80, 2, 16)
    storage[30:] = float("nan")
    q = k = v = storage[:30]
    out = flash_attention_varlen(q, k, v, bounds(10, 60), bounds(10, 60), causal=True)
    assert torch.equal(
        out, flash_attention_varlen(q, k, v, bounds(10, 20), bounds(10, 20), causal=True)
    )


def test_wrong_arguments(draw, bounds):
    q, k = draw(9, 4, 16), draw(9, 2, 16)
    good = bounds(4, 5)
    with pytest.raises(ValueError, match=r"q: expected shape \[total_q, num_q_heads, head_dim\]"):
        flash_attention_varlen(q[None], k, k, good, good)
    with pytest.raises(ValueError, match=r"cu_seqlens_kv: expected shape \[3\]; got \[2\]"):
        flash_attention_varlen(q, k, k, good, bounds(9))
    with pytest.raises(TypeError, match="cu_seqlens_q: expected dtype int32, int64"):
        flash_attention_varlen(q, k, k, good.float(), good)
    with pytest.raises(TypeError, match=r"cu_seqlens_q: expected a torch\.Tensor; got list"):
        flash_attention_varlen(q, k, k, [0, 4, 9], good)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected the bounds of one sequence"):
        flash_attention_varlen(q, k, k, good[:1], good[:1])
    with pytest.raises(ValueError, match=r"alibi_slopes: expected shape \[2, 4\]"):
        flash_attention_varlen(q, k, k, good, good, alibi_slopes=torch.ones(3, 4).to(q.device))
