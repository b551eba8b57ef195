"""What is peculiar to the gradients of flash_attention."""

import itertools

import pytest
import torch
from budget import assert_call, assert_calls
from combinations import long

from gqa_kernels import reference
from gqa_kernels.accuracy import run
from gqa_kernels.ops.attention import flash_attention
from gqa_kernels.runtime import configs, target

WRT = ("q", "k", "v")


def assert_within_budget(q, k, v, wrt=WRT, **kwargs):
    inputs = {"q": q, "k": k, "v": v, "return_lse": True, **kwargs}
    assert_call(flash_attention, reference.flash_attention, inputs, wrt)


def gradients(q, k, v, **kwargs):
    return run(flash_attention, {"q": q, "k": k, "v": v, **kwargs}, WRT)


def border_lengths():
    """Pairs of lengths on both sides of the tile borders of both backward kernels."""
    dq = configs.attention_config(configs.ATTENTION_DQ, target.current().arch, 4, 16)
    queries = (1, dq.block_m - 1, dq.block_m + 1, 2 * dq.block_m)
    keys = (1, dq.block_n, dq.block_n + 1, 2 * dq.block_m + 1)
    return [(a, b) for a in queries for b in keys]


@pytest.mark.parametrize(
    "scores", ({"causal": True}, {"window": (11, 6)}, long({}), long({"window": (60, 15)})), ids=str
)
def test_lengths_that_cross_tile_borders(scores, draw):
    """One budget for all lengths: a single short row says little about eager's error."""
    calls = []
    for seq_len_q, seq_len_kv in border_lengths():
        call = {
            "q": draw(1, seq_len_q, 2, 16),
            "k": draw(1, seq_len_kv, 1, 16),
            "v": draw(1, seq_len_kv, 1, 16),
            "return_lse": True,
            **scores,
        }
        calls.append(call)
    assert_calls(flash_attention, reference.flash_attention, calls, WRT)


def test_windows_that_end_at_every_row_of_a_tile(draw):
    """Among 16 neighbouring diagonals one has a key block's last query begin a tile."""
    for seq_len_kv in range(40, 56):
        q, k, v = (draw(1, n, 1, 16, dtype=torch.bfloat16) for n in (40, seq_len_kv, seq_len_kv))
        assert_within_budget(q, k, v, window=(11, 6))


# FlashAttention's own: crossed on a GPU; in the interpreter each once, longer and shorter mixed.
LENGTHS = (1, 3, 108, 113, 203, 239, 256, 799, 1023, 1024)
PAIRS = tuple(itertools.product(LENGTHS, LENGTHS))
SOME_PAIRS = (long((1, 239)), (799, 3), (108, 113), long((113, 203)), (256, 108))


@pytest.mark.parametrize("lengths", PAIRS if torch.cuda.is_available() else SOME_PAIRS, ids=str)
def test_the_lengths_of_flash_attention(lengths, draw):
    q, k, v = (
        draw(1, rows, heads, 16, dtype=torch.bfloat16)
        for rows, heads in zip((lengths[0], lengths[1], lengths[1]), (2, 1, 1), strict=True)
    )
    assert_within_budget(q, k, v, causal=True)
    assert_within_budget(q, k, v, window=(60, 15), softcap=15.0)


@pytest.mark.parametrize("apart", (True, False))
def test_tiles_that_need_no_mask(apart, draw, monkeypatch):
    """In a loop of their own or not: those between the edges of a window, of a group's heads."""
    rows = (row._replace(apart=apart) for row in configs.ATTENTION_DKDV)
    monkeypatch.setattr(configs, "ATTENTION_DKDV", tuple(rows))
    q, k, v = draw(1, 150, 4, 16), draw(1, 170, 2, 16), draw(1, 170, 2, 16)
    assert_within_budget(q, k, v, causal=True)
    assert_within_budget(q, k, v, window=(75, 20))


@pytest.mark.parametrize("group_size", (1, 3, long(5), long(7), 8, long(12)))
def test_keys_sum_over_their_group(group_size, draw):
    q, k, v = draw(2, 18, 2 * group_size, 16), draw(2, 35, 2, 16), draw(2, 35, 2, 16)
    assert_within_budget(q, k, v, causal=True)


@pytest.mark.parametrize("head_dim", (8, 40, 64, 80, 96, 128, 192, 256))
def test_head_dims(head_dim, draw):
    shapes = (1, 34, 2, head_dim), (1, 40, 1, head_dim), (1, 40, 1, head_dim)
    assert_within_budget(*(draw(*shape, dtype=torch.bfloat16) for shape in shapes), causal=True)


def test_queries_that_see_no_key_have_no_gradient(draw):
    q, k, v = draw(1, 50, 2, 16), draw(1, 20, 1, 16), draw(1, 20, 1, 16)
    grads = gradients(q, k, v, causal=True, return_lse=True)
    assert torch.equal(grads["d q"][:, :30], torch.zeros_like(q[:, :30]))
    assert_within_budget(q, k, v, causal=True)


@pytest.mark.parametrize("shape", ((2, 3, 0), (2, 0, 3), (0, 3, 3)))
def test_empty(shape, draw):
    batch, seq_len_q, seq_len_kv = shape
    q, k = draw(batch, seq_len_q, 4, 16), draw(batch, seq_len_kv, 2, 16)
    grads = gradients(q, k, k, causal=True, return_lse=True)
    for name, x in (("q", q), ("k", k), ("v", k)):
        assert torch.equal(grads[f"d {name}"], torch.zeros_like(x))


def test_sinks(draw):
    """Heads enough that eager's error of so few sums is no accident."""
    q, k, v = draw(2, 40, 24, 16), draw(2, 33, 6, 16), draw(2, 33, 6, 16)
    sinks = draw(24)
    assert_within_budget(q, k, v, (*WRT, "sinks"), sinks=sinks, causal=True)
    inputs = [x.bfloat16() for x in (q, k, v)]
    assert_within_budget(*inputs, (*WRT, "sinks"), sinks=sinks.bfloat16())


def test_a_sink_of_minus_infinity_is_none(draw):
    q, k, v = draw(1, 30, 2, 16), draw(1, 20, 2, 16), draw(1, 20, 2, 16)
    sinks = torch.full((2,), -torch.inf, device=q.device)
    without = run(
        flash_attention, {"q": q, "k": k, "v": v, "causal": True, "return_lse": True}, WRT
    )
    inputs = {"q": q, "k": k, "v": v, "causal": True, "return_lse": True, "sinks": sinks}
    results = run(flash_attention, inputs, (*WRT, "sinks"))
    assert torch.equal(results.pop("d sinks"), torch.zeros_like(sinks))
    assert all(torch.equal(results[what], without[what]) for what in without)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_everything_at_once(dtype, draw):
    q, k, v = (draw(2, n, heads, 32, dtype=dtype) for n, heads in ((40, 6), (55, 2), (55, 2)))
    slopes = torch.rand(2, 6).to(q.device)
    assert_within_budget(
        q, k, v, (*WRT, "sinks"), window=(19, 4), softcap=3.0, alibi_slopes=slopes,
        sinks=draw(6, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize("softcap", (0.1, 1.0, 50.0))
def test_soft_caps(softcap, draw):
    """Small caps saturate tanh; large ones leave scores nearly as they were."""
    q, k, v = (draw(2, 33, 4, 16) for _ in range(3))
    assert_within_budget(q, k, v, softcap=softcap, causal=True)


def test_gradient_through_lse_alone(draw):
    def lse_of(attention):
        return lambda **inputs: attention(**inputs, causal=True, return_lse=True)[1]

    inputs = {name: draw(1, 20, 2, 16) for name in WRT}
    assert_call(lse_of(flash_attention), lse_of(reference.flash_attention), inputs, ("q", "k"))
    dv = run(lse_of(flash_attention), inputs, WRT)["d v"]
    assert torch.equal(dv, torch.zeros_like(dv))


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision:UserWarning")
def test_gradcheck(draw):
    """Against differences of the kernel's own forward pass; float32 asks for a wide step."""
    inputs = [draw(1, n, h, 8).requires_grad_() for n, h in ((2, 2), (3, 1), (3, 1))]

    def function(q, k, v):
        return flash_attention(q, k, v, causal=True, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-2, atol=2e-3, rtol=1e-2, nondet_tol=0.0
    )


def test_the_same_bits_in_every_run_and_any_batch(draw):
    q, k, v = draw(3, 40, 6, 32), draw(3, 50, 2, 32), draw(3, 50, 2, 32)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out = flash_attention(q, k, v, causal=True)
    cotangent = draw(*out.shape)
    first = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = [x[1:2].detach().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*alone, causal=True)
    single = torch.autograd.grad(out, alone, cotangent[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, single, strict=True))


def test_nan_beyond_the_keys_never_matters(draw):
    storage = [draw(1, 64, 2, 16) for _ in range(4)]
    for x in storage:
        x[:, 21:] = float("nan")
    q, k, v, dout = (x[:, :21].requires_grad_() for x in storage)
    out = flash_attention(q, k, v, causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    clean = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(flash_attention(*clean, causal=True), clean, dout.detach())
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_offsets_beyond_32_bits(device):
    """Strides of 31 bits whose multiples need more; only the pages that are touched exist."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    q = storage.as_strided((3, 2, 1, 32), (apart, 32, 32, 1))
    q.copy_(torch.randn(3, 2, 1, 32))
    far = gradients(q, q, q, causal=True)
    near = gradients(*[q.contiguous()] * 3, causal=True)
    assert all(torch.equal(far[what], near[what]) for what in near)


def test_slopes_are_constants(draw):
    q = draw(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="alibi_slopes: expected a constant"):
        flash_attention(q, q, q, alibi_slopes=torch.ones(2, device=q.device, requires_grad=True))
