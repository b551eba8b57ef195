"""Fewer key/value heads: what a conversion keeps, and that what it loses is the least."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import EAGER, lively, random_tokens, small_config, twin

from llama2.conversion import (
    METHODS,
    NEEDS_DATA,
    AttentionWeights,
    aligned,
    convert,
    convert_layer,
    second_moment,
    second_moments,
)

UNIT = torch.finfo(torch.float64).eps / 2
PARTS = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
HIDDEN, HEAD_DIM = 12, 4


def random_layer(num_q_heads, num_kv_heads, hidden_size=HIDDEN, head_dim=HEAD_DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return AttentionWeights(
        draw(num_q_heads * head_dim, hidden_size),
        draw(num_kv_heads * head_dim, hidden_size),
        draw(num_kv_heads * head_dim, hidden_size),
        draw(hidden_size, num_q_heads * head_dim),
    )


def random_moment(hidden_size=HIDDEN, num_rows=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows or 3 * hidden_size, hidden_size)
    return second_moment(torch.randn(shape, generator=generator, dtype=torch.float64))


def members(head_dim, interleaved):
    """The rows of a head that are the first and the second of each RoPE pair."""
    rows = torch.arange(head_dim)
    return (rows[0::2], rows[1::2]) if interleaved else rows.chunk(2)


def times(head, factor, interleaved):
    """A head `[head_dim, hidden_size]` with each of its pairs times a complex number."""
    first, second = members(len(head), interleaved)
    real, imag = factor.real[:, None], factor.imag[:, None]
    out = torch.empty_like(head)
    out[first] = real * head[first] - imag * head[second]
    out[second] = imag * head[first] + real * head[second]
    return out


def function_of(weights, head_dim=HEAD_DIM, interleaved=False):
    """All that a layer's output depends on, for each query head.

    The products o · v `[num_q_heads, hidden_size, hidden_size]`, and the forms whose real part,
    turned by RoPE's phases and summed over pairs, is the score of x and y, Σ (q x) conj(k y):
    complex `[num_q_heads, pairs, hidden_size, hidden_size]`.
    """
    q, k, v = (weight.double().unflatten(0, (-1, head_dim)) for weight in weights[:3])
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    o = weights.o.double().unflatten(1, (-1, head_dim))
    first, second = members(head_dim, interleaved)
    q, k = (torch.complex(x[:, first], x[:, second]) for x in (q, k))
    return torch.einsum("hnd,ndx->nhx", o, v), torch.einsum("npx,npy->npxy", q, k.conj())


def errors(old, new, moment, head_dim=HEAD_DIM, interleaved=False):
    """E‖(o v − o′ v′) x‖² and E|(q x) conj(k y) − (q′ x) conj(k′ y)|², summed over query heads and
    pairs, for independent x and y."""
    values, scores = (
        a - b
        for a, b in zip(
            function_of(old, head_dim, interleaved),
            function_of(new, head_dim, interleaved),
            strict=True,
        )
    )
    wide = moment.to(scores.dtype)
    value_error = (values @ moment * values).sum()
    # x takes the form's rows, y, conjugated, its columns; moment is real and symmetric
    score_error = ((wide @ scores @ wide) * scores.conj()).sum().real
    return value_error, score_error


def least_errors(weights, num_kv_heads, moment, head_dim=HEAD_DIM, interleaved=False):
    """What no heads of their number can be below: Eckart and Young's sums of squares."""
    power, axes = torch.linalg.eigh(moment)
    root = axes * power.clamp(min=0).sqrt()
    values, scores = function_of(weights, head_dim, interleaved)
    rows = (values @ root).unflatten(0, (num_kv_heads, -1)).flatten(1, 2)
    value_error = torch.linalg.svdvals(rows)[:, head_dim:].square().sum()
    wide = root.to(scores.dtype)
    forms = wide.mT @ scores @ wide.conj()
    # [groups, pairs, query heads · hidden, hidden]: of rank one, whatever q is, if k is shared
    rows = forms.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    return value_error, torch.linalg.svdvals(rows)[..., 1:].square().sum()


def size(weights, moment, head_dim=HEAD_DIM, interleaved=False):
    """The errors of a layer that does nothing."""
    nothing = AttentionWeights(*(torch.zeros_like(weight) for weight in weights))
    return errors(weights, nothing, moment, head_dim, interleaved)


# Exact: a transformation of heads is undone.


def expanded(model, factor, generator, *, kind):
    """The same function with `factor` times the key/value heads, each transformed: by any
    invertible matrix and complex numbers, by orthogonal and unit ones, or not at all."""
    config = model.config
    dim, interleaved = config.head_dim, config.rope_interleaved
    queries = config.num_q_heads // config.num_kv_heads // factor

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    for layer in range(config.num_layers):
        names = [f"layers.{layer}.{part}" for part in PARTS]
        q, k, v, o = (state[name] for name in names)
        q, k, v = (list(x.split(dim)) for x in (q, k, v))
        o = list(o.split(dim, dim=1))
        k, v = ([x for x in heads for _ in range(factor)] for heads in (k, v))
        for head in range(len(k) if kind != "none" else 0):
            turn = torch.linalg.qr(draw(dim, dim))[0]
            number = torch.polar(torch.ones(dim // 2).double(), draw(dim // 2))
            if kind == "any":  # singular values and moduli from 1/2 to 2
                spread = torch.exp2(torch.linspace(-1, 1, dim, dtype=torch.float64))
                turn = (turn * spread) @ torch.linalg.qr(draw(dim, dim))[0]
                number = number * spread[: dim // 2]
            k[head] = times(k[head], number, interleaved)
            v[head] = turn @ v[head]
            for query in range(head * queries, (head + 1) * queries):
                q[query] = times(q[query], 1 / number.conj(), interleaved)
                o[query] = o[query] @ torch.linalg.inv(turn)
        state |= zip(names, (*(torch.cat(x) for x in (q, k, v)), torch.cat(o, 1)), strict=True)
    sizes = {**vars(config), "num_kv_heads": config.num_kv_heads * factor}
    copy = twin(lively(type(config)(**sizes), "cpu"), dtype=torch.float64)
    copy.load_state_dict(state)
    return copy


def model_and_calibration(num_q_heads, num_kv_heads, interleaved):
    config = small_config(num_q_heads, num_kv_heads, head_dim=8, rope_interleaved=interleaved)
    model = twin(lively(config, "cpu"), dtype=torch.float64)
    return model, random_tokens("cpu", 8, 24)


def rounding_bound(model, moments, logits):
    """γₙ = n · u of float64 for the longest chain of roundings, in units of the largest logit.

    The values' directions are eigenvectors of a Gram matrix of rank head_dim, off by u times the
    ratio of its largest eigenvalue to its smallest (Davis and Kahan 1970).
    """
    config = model.config
    ratio = 1.0
    for layer, moment in zip(model.layers, moments, strict=True):
        weights = AttentionWeights(*(layer.get_parameter(part) for part in PARTS))
        values, _ = function_of(weights, config.head_dim)
        root = torch.linalg.cholesky(moment)
        rows = (values @ root).unflatten(0, (config.num_kv_heads, -1)).flatten(1, 2)
        kept = torch.linalg.svdvals(rows)[:, : config.head_dim]
        ratio = max(ratio, (kept[:, 0] / kept[:, -1]).square().max().item())
    chain = config.num_layers * (3 * config.hidden_size + config.intermediate_size + 24)
    return (chain + config.hidden_size) * UNIT * ratio * logits.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "groups"), [(4, 4, 1), (8, 4, 2)])
@torch.no_grad()
def test_aligning_heads_changes_no_logit(num_q_heads, num_kv_heads, groups, interleaved):
    model, tokens = model_and_calibration(num_q_heads, num_kv_heads, interleaved)
    before = model(tokens)
    moments = second_moments(model, tokens)
    bound = rounding_bound(model, moments, before)
    for layer, moment in zip(model.layers, moments, strict=True):
        old = AttentionWeights(*(layer.get_parameter(part) for part in PARTS))
        turned = aligned(old, groups, head_dim=8, second_moment=moment, interleaved=interleaved)
        for part, a, b in zip("qkvo", old, turned, strict=True):
            assert not torch.allclose(a, b), part
        for part, weight in zip(PARTS, turned, strict=True):
            layer.get_parameter(part).copy_(weight)
    assert (model(tokens) - before).abs().max() <= bound


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "factor"), [(4, 1, 4), (8, 2, 2)])
@pytest.mark.parametrize("kind", ["any", "orthogonal", "none"])
@torch.no_grad()
def test_heads_that_are_transforms_of_one_become_it(
    num_q_heads, num_kv_heads, factor, interleaved, kind, generator
):
    model, tokens = model_and_calibration(num_q_heads, num_kv_heads, interleaved)
    larger = expanded(model, factor, generator, kind=kind)
    logits = larger(tokens)
    bound = rounding_bound(model, second_moments(model, tokens), logits)
    assert (model(tokens) - logits).abs().max() <= bound  # the expansion itself

    def error(method):
        converted = convert(larger, num_kv_heads, EAGER, method=method, calibration=tokens)
        converted = twin(converted, dtype=torch.float64)
        return (converted(tokens) - logits).abs().max()

    lossless = {
        "any": ["low_rank"],
        "orthogonal": ["low_rank", "aligned"],
        "none": ["low_rank", "aligned", "mean", "first"],
    }[kind]
    for method in METHODS:
        if method in lossless:
            assert error(method) <= bound, method
        else:
            assert error(method) > 1000 * bound, method


# The least loss.


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "groups"), [(4, 4, 1), (4, 4, 2), (6, 3, 1)]
)
def test_low_rank_loses_no_more_than_it_must(num_q_heads, num_kv_heads, groups, interleaved):
    weights, moment = random_layer(num_q_heads, num_kv_heads), random_moment()
    form = {"head_dim": HEAD_DIM, "interleaved": interleaved}
    found = {
        method: errors(
            weights,
            convert_layer(weights, groups, method=method, second_moment=moment, **form),
            moment,
            **form,
        )
        for method in METHODS
    }
    least = least_errors(weights, groups, moment, **form)
    for kind, total in enumerate(size(weights, moment, **form)):
        # squares of sums over hidden_size² products, and as many in the eigenvectors
        rounding = 4 * HIDDEN**2 * UNIT * total
        assert abs(found["low_rank"][kind] - least[kind]) <= rounding
        for method in METHODS:
            assert found[method][kind] >= least[kind] - rounding, method
        assert found["mean"][kind] > 1.1 * least[kind]  # the bound is not what all reach


def test_aligned_heads_are_as_near_to_the_first_as_rotations_bring_them(generator):
    weights, moment = random_layer(3, 3), random_moment()

    def distances(weights):
        """Of values and of keys of the second and the third head to the first."""
        for part in (weights.v, weights.k):
            first, *others = part.split(HEAD_DIM)
            yield sum(((x - first) @ moment * (x - first)).sum() for x in others)

    turned = aligned(weights, 1, head_dim=HEAD_DIM, second_moment=moment)
    least = list(distances(turned))
    assert all(a < b for a, b in zip(least, distances(weights), strict=True))
    for _ in range(20):  # near the optimum and far from it
        step = 0.1 * torch.randn(HEAD_DIM, HEAD_DIM, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.matrix_exp(step - step.mT)
        phases = torch.polar(torch.ones(2).double(), step[0, :2])
        v, k = (list(x.split(HEAD_DIM)) for x in (turned.v, turned.k))
        v[1], k[1] = rotation @ v[1], times(k[1], phases, False)
        moved = turned._replace(v=torch.cat(v), k=torch.cat(k))
        assert all(a < b for a, b in zip(least, distances(moved), strict=True))


def test_aligning_keeps_heads_that_nothing_can_be_turned_onto():
    weights, moment = random_layer(3, 3), random_moment()
    for part in (weights.k, weights.v):
        part[:HEAD_DIM] = 0
    turned = aligned(weights, 1, head_dim=HEAD_DIM, second_moment=moment)
    for a, b in zip(function_of(turned), function_of(weights), strict=True):
        assert (a - b).abs().max() <= 4 * HIDDEN * UNIT * b.abs().max()


@pytest.mark.parametrize("queries", ["all", "none"])
def test_low_rank_heads_are_as_strong_as_the_old_ones(queries):
    """In the mean over a group, and values in the basis that is nearest to the first head's."""
    weights, moment = random_layer(6, 3), random_moment()
    if queries == "none":  # a key that no query asks for has to stay one that can be learnt
        weights.q.zero_()
    new = convert_layer(weights, 1, head_dim=HEAD_DIM, second_moment=moment)

    def power(x):
        return (x @ moment * x).sum(-1)

    k, v = (power(x).unflatten(0, (-1, HEAD_DIM)) for x in (weights.k, weights.v))
    pairs = k.unflatten(1, (2, -1)).sum(1).mean(0)
    rounding = 4 * HIDDEN**2 * UNIT
    assert (power(new.k).unflatten(0, (2, -1)).sum(0) - pairs).abs().max() <= rounding * pairs.max()
    total = v.sum(1).mean()
    assert (power(new.v).sum() - total).abs() <= rounding * total
    cross = weights.v[:HEAD_DIM] @ moment @ new.v.mT  # symmetric and positive: no turn is nearer
    assert (cross - cross.mT).abs().max() <= rounding * cross.abs().max()
    assert (torch.linalg.eigvalsh(cross) > 0).all()


# Plain methods.


def test_mean_and_first_are_what_they_say():
    weights = random_layer(4, 4)
    for method in ("mean", "first"):
        new = convert_layer(weights, 2, head_dim=HEAD_DIM, method=method)
        assert torch.equal(new.q, weights.q) and torch.equal(new.o, weights.o)
        for old_part, new_part in ((weights.k, new.k), (weights.v, new.v)):
            a, b, c, d = old_part.split(HEAD_DIM)
            expected = (a, c) if method == "first" else ((a + b) / 2, (c + d) / 2)
            assert torch.equal(new_part, torch.cat(expected))


def test_random_heads_are_those_of_a_new_model_and_of_the_generator():
    weights = random_layer(4, 4, hidden_size=64, head_dim=32)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return convert_layer(weights, 2, head_dim=32, method="random", generator=generator)

    new = draw(5)
    assert torch.equal(new.k, draw(5).k) and torch.equal(new.v, draw(5).v)
    assert not torch.equal(new.k, draw(6).k) and not torch.equal(new.k, new.v)
    for part in (new.k, new.v):
        # five standard errors of the mean and of the standard deviation
        assert part.mean().abs() <= 5 * 0.02 / part.numel() ** 0.5
        assert (part.std() - 0.02).abs() <= 5 * 0.02 / (2 * part.numel()) ** 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_bits(method, dtype):
    weights = AttentionWeights(*(weight.to(dtype) for weight in random_layer(8, 4)))
    before = [weight.clone() for weight in weights]
    moment = random_moment()

    def run(count, weights=weights):
        generator = torch.Generator().manual_seed(0)
        options = {"method": method, "second_moment": moment, "generator": generator}
        return convert_layer(weights, count, head_dim=HEAD_DIM, **options)

    for count in (1, 2):
        new = run(count)
        assert [weight.dtype for weight in new] == [dtype] * 4
        shapes = [tuple(weight.shape) for weight in new]
        assert shapes == [(32, 12), (count * 4, 12), (count * 4, 12), (12, 32)]
        assert all(map(torch.equal, new, run(count)))
        exact = run(count, AttentionWeights(*(weight.double() for weight in weights)))
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(new, exact, strict=True))
    assert all(a is b for a, b in zip(run(4), weights, strict=True))
    assert all(map(torch.equal, weights, before))


# Degenerate layers.


@pytest.mark.parametrize("method", NEEDS_DATA)
@pytest.mark.parametrize("heads", [[0], [1], [0, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_heads_that_do_nothing(method, part, heads):
    weights, moment = random_layer(4, 4), random_moment()
    axis = 1 if part == "o" else 0
    for head in heads:
        getattr(weights, part).narrow(axis, head * HEAD_DIM, HEAD_DIM).zero_()
    new = convert_layer(weights, 2, head_dim=HEAD_DIM, method=method, second_moment=moment)
    assert all(weight.isfinite().all() for weight in new)
    if method == "low_rank":
        rounding = [4 * HIDDEN**2 * UNIT * total for total in size(random_layer(4, 4), moment)]
        found, least = errors(weights, new, moment), least_errors(weights, 2, moment)
        for a, b, slack in zip(found, least, rounding, strict=True):
            assert a <= b + slack


@pytest.mark.parametrize("method", NEEDS_DATA)
@pytest.mark.parametrize("rank", [0, 1, HEAD_DIM])
def test_inputs_of_few_dimensions(method, rank):
    weights = random_layer(4, 4)
    moment = random_moment(num_rows=rank) if rank else torch.zeros(HIDDEN, HIDDEN).double()
    new = convert_layer(weights, 1, head_dim=HEAD_DIM, method=method, second_moment=moment)
    assert all(weight.isfinite().all() for weight in new)
    if method == "low_rank":  # as many features as the inputs have dimensions: nothing is lost
        value_error, _ = errors(weights, new, moment)
        total, _ = size(weights, moment)
        assert value_error <= 4 * HIDDEN**2 * UNIT * total


def test_values_that_the_inputs_hardly_reach_stay_short():
    """Made as strong as the others they would be so long that 16 bits round away what is beside."""
    layer = random_layer(8, 4)
    strength = torch.full((HIDDEN,), 1e-6, dtype=torch.float64)
    strength[:2] = 1.0  # less dimensions than a head has
    converted = convert_layer(
        layer, 1, head_dim=HEAD_DIM, second_moment=torch.diag(strength), method="low_rank"
    )
    longest = [weights.v.norm(dim=1).max() for weights in (converted, layer)]
    # 2⁴: features of 2⁻⁸ of the power are made as strong; √head_dim: all turned into one row.
    assert longest[0] <= 2**4 * HEAD_DIM**0.5 * longest[1]
    assert longest[0] > 0


@pytest.mark.parametrize("seed", range(8))
def test_keys_that_the_inputs_never_reach(seed):
    """Their power is 0, but for rounding, which may make it less: nothing is divided by that, and
    no score of these inputs comes from them afterwards."""
    weights, moment = random_layer(4, 4, seed=seed), random_moment(num_rows=6)
    seen = torch.linalg.eigh(moment).eigenvectors[:, -6:]
    weights.k.sub_(weights.k @ seen @ seen.mT)
    new = convert_layer(weights, 1, head_dim=HEAD_DIM, second_moment=moment)
    assert all(weight.isfinite().all() for weight in new)
    assert (new.k @ seen).norm() <= 2**-20 * new.k.norm()


def test_queries_that_the_inputs_never_reach():
    """Their power is 0, which rounding makes a little less than 0 for some."""
    weights, moment = random_layer(64, 64), random_moment(num_rows=6)
    seen = torch.linalg.eigh(moment).eigenvectors[:, -6:]
    unseen = (weights.q - weights.q @ seen @ seen.mT).unflatten(0, (64, HEAD_DIM))
    weights.q.unflatten(0, (64, HEAD_DIM))[::2] = unseen[::2]
    new = convert_layer(weights, 32, head_dim=HEAD_DIM, second_moment=moment)
    found, least = (f(weights, x, moment)[1] for f, x in ((errors, new), (least_errors, 32)))
    # What such inputs do not excite counts as 2⁻²⁰ of their mean power.
    assert abs(found - least) <= 2**-20 * size(weights, moment)[1]


@pytest.mark.parametrize("method", ["low_rank", "aligned"])
def test_equal_heads_become_one_without_loss_after_a_narrow_text(method):
    """One token repeated excites one direction per layer; what other texts need is kept."""
    model = lively(small_config(), "cpu")
    config = model.config
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                heads = weight.view(config.num_kv_heads, config.head_dim, -1)
                heads[1:] = heads[:1]
    text, other = torch.full((2, 40), 7), random_tokens("cpu", 2, 30)
    converted = convert(model, 1, EAGER, method=method, calibration=text)
    with torch.no_grad():
        logits = model(other)
        assert (converted(other) - logits).abs().max() <= 1e-5 * logits.abs().max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 3),
    pairs=st.integers(1, 4),
    more=st.integers(0, 8),
    interleaved=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(groups, heads, queries, pairs, more, interleaved, seed):
    head_dim = 2 * pairs
    hidden_size = head_dim + more
    counts = (groups * heads * queries, groups * heads)
    weights = random_layer(*counts, hidden_size=hidden_size, head_dim=head_dim, seed=seed)
    moment = random_moment(hidden_size, seed=seed + 1)
    form = {"head_dim": head_dim, "interleaved": interleaved}
    new = convert_layer(weights, groups, second_moment=moment, **form)
    assert new.q.shape == weights.q.shape and new.o.shape == weights.o.shape
    assert new.k.shape == new.v.shape == (groups * head_dim, hidden_size)
    found, least = (
        errors(weights, new, moment, **form),
        least_errors(weights, groups, moment, **form),
    )
    for a, b, total in zip(found, least, size(weights, moment, **form), strict=True):
        assert abs(a - b) <= 4 * (hidden_size * head_dim) ** 2 * UNIT * total


# Whole models.


def test_second_moments_are_those_of_the_normed_inputs():
    model = lively(small_config(), "cpu")
    tokens = random_tokens("cpu", 2, 7)
    seen = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        for layer in model.layers
    ]
    found = second_moments(model, tokens)
    for hook in hooks:
        hook.remove()
    for moment, x in zip(found, seen, strict=True):
        rows = x.detach().double().reshape(14, -1)
        assert moment.dtype == torch.float64
        expected = sum(torch.outer(row, row) for row in rows) / 14
        assert (moment - expected).abs().max() <= 2 * 14 * UNIT * rows.abs().max() ** 2
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_makes_a_new_model(tied, dtype):
    model = lively(small_config(4, 4, tie_word_embeddings=tied), "cpu").to(dtype).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = random_tokens("cpu", 4, 16)
    new = convert(model, 2, EAGER, calibration=tokens)
    assert new.config == type(new.config)(**{**vars(model.config), "num_kv_heads": 2})
    assert not new.training and {weight.dtype for weight in new.parameters()} == {dtype}
    assert (new.lm_head.weight is new.embed_tokens.weight) == tied
    for name, weight in new.state_dict().items():
        if not name.endswith(tuple(PARTS)):
            assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        for weight in new.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_more_heads_and_better_methods_lose_less():
    """On random weights, where only the order of the methods that is proven shows."""
    model, tokens = model_and_calibration(8, 8, False)
    with torch.no_grad():
        logits = model(tokens)
        off = [
            (
                twin(convert(model, n, EAGER, calibration=tokens), dtype=torch.float64)(tokens)
                - logits
            )
            for n in (8, 4, 2, 1)
        ]
    assert off[0].abs().max() == 0
    assert all(a.norm() < b.norm() for a, b in pairwise(off))


# Refusals.


def test_what_cannot_be_converted_is_refused():
    weights, moment = random_layer(8, 4), random_moment()

    def run(count, **options):
        convert_layer(weights, count, head_dim=HEAD_DIM, **options)

    for count in (0, -1, 3, 8):
        with pytest.raises(ValueError, match=f"num_kv_heads: expected a divisor of 4; got {count}"):
            run(count, second_moment=moment)
    with pytest.raises(ValueError, match=r"method: expected one of low_rank, .*; got 'median'"):
        run(2, method="median")
    for method in NEEDS_DATA:
        with pytest.raises(
            ValueError, match=rf"second_moment: expected \[12, 12\] for {method}; got None"
        ):
            run(2, method=method)
        with pytest.raises(ValueError, match=r"second_moment: .*; got \[12, 11\]"):
            run(2, method=method, second_moment=moment[:, 1:])
    with pytest.raises(
        ValueError, match=r"head_dim: expected at most hidden_size \(12\) .*; got 16"
    ):
        convert_layer(random_layer(4, 2, head_dim=16), 1, head_dim=16, second_moment=moment)
    with pytest.raises(ValueError, match="calibration: expected tokens for aligned; got None"):
        convert(lively(small_config(4, 4), "cpu"), 2, EAGER, method="aligned")
