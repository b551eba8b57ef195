"""Attention of drawn shapes, groups, strides, masks and scores, against the reference."""

import torch
from budget import assert_call
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gqa_kernels import reference
from gqa_kernels.ops.attention import flash_attention, flash_attention_varlen

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Without shrinking: in the interpreter it would take longer than all the rest.
QUICK = settings(
    max_examples=300 if ON_GPU else 8,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)
LENGTHS = st.integers(0, 300 if ON_GPU else 45)
SIDES = st.one_of(st.none(), st.integers(0, 80))


@st.composite
def drawn_scores(draw, num_q_heads, num_sequences, generator):
    """Keyword arguments, at most all of them."""
    window = draw(st.one_of(st.none(), st.tuples(SIDES, SIDES)))
    scores = {"causal": draw(st.booleans()), "window": window, "return_lse": True}
    if draw(st.booleans()):
        scores["softcap"] = draw(st.floats(0.5, 50.0))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(num_q_heads,), (num_sequences, num_q_heads)]))
        scores["alibi_slopes"] = torch.rand(shape, generator=generator).to(DEVICE)
    if draw(st.booleans()):
        scores["sinks"] = torch.randn(num_q_heads, generator=generator).to(DEVICE)
    return scores


def drawn_view(draw, rows, heads, head_dim, generator):
    """Values as a tensor of their own, as rows of a wider one, or with rows and heads exchanged."""
    form = draw(st.sampled_from(("dense", "wide", "exchanged")))
    if form == "exchanged":
        x = torch.randn(*rows[:-1], heads, rows[-1], head_dim, generator=generator)
        return x.to(DEVICE, torch.bfloat16).transpose(-3, -2)
    x = torch.randn(*rows, heads + (form == "wide"), head_dim, generator=generator)
    return x.to(DEVICE, torch.bfloat16)[..., :heads, :]


def assert_within_budget(kernel, op, inputs):
    """In bfloat16, whose roundings drown the chance in the errors of few numbers; the gradient of
    the sinks, one number per head, has a test of its own."""
    assert_call(kernel, op, inputs, ("q", "k", "v"))


@QUICK
@given(data=st.data())
def test_dense(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    group, num_kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    batch, head_dim = draw(st.integers(1, 2)), 8 * draw(st.integers(1, 3))
    rows_q, rows_kv = (batch, draw(LENGTHS)), (batch, draw(LENGTHS))
    inputs = {
        "q": drawn_view(draw, rows_q, group * num_kv_heads, head_dim, generator),
        "k": drawn_view(draw, rows_kv, num_kv_heads, head_dim, generator),
        "v": drawn_view(draw, rows_kv, num_kv_heads, head_dim, generator),
        **draw(drawn_scores(group * num_kv_heads, batch, generator)),
    }
    assert_within_budget(flash_attention, reference.flash_attention, inputs)


@QUICK
@given(data=st.data())
def test_packed(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    group, num_kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    head_dim = 8 * draw(st.integers(1, 3))
    lengths = draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3))
    after = draw(st.integers(0, 3))
    bounds = torch.tensor([(0, 0), *lengths]).cumsum(0).to(DEVICE, torch.int32)
    rows_q, rows_kv = ((int(total) + after,) for total in bounds[-1])
    inputs = {
        "q": drawn_view(draw, rows_q, group * num_kv_heads, head_dim, generator),
        "k": drawn_view(draw, rows_kv, num_kv_heads, head_dim, generator),
        "v": drawn_view(draw, rows_kv, num_kv_heads, head_dim, generator),
        "cu_seqlens_q": bounds[:, 0],
        "cu_seqlens_kv": bounds[:, 1],
        **draw(drawn_scores(group * num_kv_heads, len(lengths), generator)),
    }
    assert_within_budget(flash_attention_varlen, reference.flash_attention_varlen, inputs)
