"""What is peculiar to losses over a vocabulary; budgets of ordinary calls are `test_ops.py`'s."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import assert_call, assert_ok
from combinations import long
from largest import LargestTensor

from gqa_kernels import accuracy, fused, reference
from gqa_kernels.ops.linear_cross_entropy import chunks
from gqa_kernels.runtime import configs, target

FUNCTIONS = pytest.mark.parametrize("ops", (fused, reference), ids=("triton", "eager"))
REDUCTIONS = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
WRT = ("hidden", "weight")


@pytest.fixture
def make(draw, generator, device):
    """Inputs of which every third target is ignored."""

    def make(num_tokens, hidden_size, vocab_size, dtype=torch.float32, *, ignored=True, size=1.0):
        targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
        if ignored:
            targets[2::3] = -100
        return {
            "hidden": draw(num_tokens, hidden_size, dtype=dtype),
            "weight": (size * hidden_size**-0.5 * draw(vocab_size, hidden_size)).to(dtype),
            "targets": targets.to(device),
        }

    return make


def differentiated(function, inputs, **options):
    """(result, dhidden, dweight)"""
    leaves = [inputs[name].detach().requires_grad_() for name in WRT]
    result = function(*leaves, inputs["targets"], **options)
    return result.detach(), *torch.autograd.grad(result.sum(), leaves)


@FUNCTIONS
def test_against_pytorch(ops, make):
    """Of PyTorch's own cross-entropy, in float64 what the specification says."""
    inputs = make(20, 9, 13)
    inputs = {
        k: x.double() if x.is_floating_point() and ops is reference else x
        for k, x in inputs.items()
    }
    logits = F.linear(inputs["hidden"], inputs["weight"])
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}):
        targets = inputs["targets"] if "ignore_index" not in options else inputs["targets"].clamp(0)
        found = ops.linear_cross_entropy(inputs["hidden"], inputs["weight"], targets, **options)
        torch.testing.assert_close(found, F.cross_entropy(logits, targets, **options))
    counted = inputs["targets"] != -100
    lse = logits.logsumexp(-1)[counted]
    squares = ops.linear_cross_entropy(**inputs, z_loss=0.5) - ops.linear_cross_entropy(**inputs)
    torch.testing.assert_close(squares, 0.5 * lse.square().mean())
    capped = F.cross_entropy(2.0 * torch.tanh(logits / 2.0), inputs["targets"])
    torch.testing.assert_close(ops.linear_cross_entropy(**inputs, softcap=2.0), capped)
    inputs["targets"] = inputs["targets"].clamp(min=0)
    chosen, entropy = ops.token_log_probs(**inputs, temperature=0.7, return_entropy=True)
    categorical = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(chosen, categorical.log_prob(inputs["targets"]))
    torch.testing.assert_close(entropy, categorical.entropy())


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "dtype"),
    (
        (7, 37, torch.float16),
        (4099, 8, torch.float32),
        (50257, 17, torch.float16),
        long(128256, 16, torch.bfloat16),
    ),
)
def test_vocabularies(vocab_size, hidden_size, dtype, make):
    """In 16 bits beside eager code with the sums of the library, which are soon done and whose
    errors are nothing beside one rounding; in float32 by the budget, whose sums are in order."""
    inputs = make(4, hidden_size, vocab_size, dtype)
    if dtype == torch.float32:
        assert_call(fused.linear_cross_entropy, reference.linear_cross_entropy, inputs, WRT)
        return
    actual = accuracy.run(fused.linear_cross_entropy, inputs, WRT)
    eager, truth = (
        accuracy.run(reference.linear_cross_entropy, given, WRT, like=actual)
        for given in (inputs, accuracy.widen(inputs))
    )
    assert_ok(accuracy.measure_results(actual, [(eager, truth)]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_large_scores(dtype, make):
    """Of some ten thousand: what is left of a loss is a difference of two of them."""
    inputs = make(40, 24, 50, dtype, size=3000.0)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction}
        assert_call(
            fused.linear_cross_entropy, reference.linear_cross_entropy, inputs | options, WRT
        )
    inputs["targets"] = inputs["targets"].clamp(min=0)
    options = {"return_entropy": True, "temperature": 0.5}
    assert_call(fused.token_log_probs, reference.token_log_probs, inputs | options, WRT)


@FUNCTIONS
@REDUCTIONS
def test_nothing_to_predict(ops, reduction, make):
    inputs = make(5, 8, 11)
    inputs["targets"].fill_(-100)
    inputs["hidden"].fill_(float("nan"))  # which is not read
    loss, dhidden, dweight = differentiated(ops.linear_cross_entropy, inputs, reduction=reduction)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert torch.equal(loss, torch.zeros_like(loss))
    assert not dhidden.any() and not dweight.any()


@FUNCTIONS
@REDUCTIONS
@pytest.mark.parametrize("ignore_index", (-100, None))
def test_no_rows(ops, reduction, ignore_index, make):
    inputs = make(0, 8, 11)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    loss, dhidden, dweight = differentiated(ops.linear_cross_entropy, inputs, **options)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.isnan() if reduction == "mean" else not loss.any()
    assert dhidden.shape == (0, 8)
    assert not dweight.any() or (ops is reference and ignore_index is None)  # 0 · NaN
    chosen, dhidden, dweight = differentiated(ops.token_log_probs, inputs)
    assert chosen.shape == (0,) and not dweight.any()


def test_ignored_rows_are_not_read(make):
    inputs = make(70, 24, 30)
    ignored = inputs["targets"] == -100
    for reduction in ("sum", "none"):
        run = partial(differentiated, fused.linear_cross_entropy, reduction=reduction)
        expected = run(inputs)
        spoiled = inputs["hidden"].masked_fill(ignored[:, None], float("nan"))
        for found, wanted in zip(run(inputs | {"hidden": spoiled}), expected, strict=True):
            assert torch.equal(found, wanted)
        # And the others are what they are without them.
        few = {"hidden": inputs["hidden"][~ignored], "targets": inputs["targets"][~ignored]}
        loss, dhidden, dweight = run(inputs | few, ignore_index=None)
        kept = expected[0][~ignored] if reduction == "none" else expected[0]
        torch.testing.assert_close(loss, kept, rtol=1e-6, atol=0)
        assert torch.equal(dhidden, expected[1][~ignored])
        assert torch.equal(dweight, expected[2])


def test_scores_of_minus_infinity(make):
    """An overflow of float16 is enough. Such a score has no probability, and no gradient."""
    hidden = torch.tensor([[1.0, 300.0]], dtype=torch.float16)
    weight = torch.zeros(4200, 2, dtype=torch.float16)
    weight[:4120, 1] = -300.0  # more than a block of the softmax, and the first
    inputs = {"hidden": hidden, "weight": weight, "targets": torch.tensor([4150])}
    for reduction in ("mean", "none"):
        found = differentiated(fused.linear_cross_entropy, inputs, reduction=reduction)
        expected = differentiated(reference.linear_cross_entropy, inputs, reduction=reduction)
        for one, other in zip(found, expected, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other)
    chosen, dhidden, _ = differentiated(fused.token_log_probs, inputs)
    torch.testing.assert_close(chosen, torch.tensor([80.0]).log().neg())
    assert dhidden.isfinite().all()


@REDUCTIONS
def test_a_second_derivative_is_refused(reduction, make):
    inputs = make(5, 8, 11)
    hidden = inputs["hidden"].detach().requires_grad_()
    loss = fused.linear_cross_entropy(**inputs | {"hidden": hidden}, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected first derivatives only"):
        (loss.sum() + grad.square().sum()).backward()


@FUNCTIONS
@REDUCTIONS
@pytest.mark.parametrize("wrong", (-1, 11))
def test_a_target_outside_of_the_vocabulary(ops, reduction, wrong, make):
    inputs = make(7, 8, 11)
    inputs["targets"][3] = wrong
    loss, dhidden, dweight = differentiated(ops.linear_cross_entropy, inputs, reduction=reduction)
    if reduction == "none":
        assert loss.isnan().tolist() == [row == 3 for row in range(7)]
        assert dhidden.isnan().any(1).tolist() == [row == 3 for row in range(7)]
    assert loss.isnan().any() and dhidden[3].isnan().all() and dweight.isnan().all()
    inputs["targets"] = inputs["targets"].masked_fill(inputs["targets"] == -100, 0)
    chosen, dhidden, _ = differentiated(ops.token_log_probs, inputs)
    assert chosen.isnan().tolist() == dhidden.isnan().any(1).tolist() == [i == 3 for i in range(7)]


@REDUCTIONS
def test_one_gradient_alone_has_the_same_bits(reduction, make):
    inputs = make(40, 24, 30, torch.bfloat16)
    both = differentiated(fused.linear_cross_entropy, inputs, reduction=reduction)
    for index, name in enumerate(WRT):
        leaf = inputs[name].detach().requires_grad_()
        loss = fused.linear_cross_entropy(**inputs | {name: leaf}, reduction=reduction)
        assert torch.equal(loss, both[0])
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.equal(grad, both[1 + index])


@REDUCTIONS
def test_two_consumers_and_a_kept_graph(reduction, make):
    inputs = make(40, 24, 30)
    leaves = [inputs[name].detach().requires_grad_() for name in WRT]
    loss = fused.linear_cross_entropy(*leaves, inputs["targets"], reduction=reduction)
    once = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    twice = torch.autograd.grad((loss + loss).sum(), leaves)
    for one, same, two in zip(once, again, twice, strict=True):
        assert torch.equal(one, same) and torch.equal(two, 2.0 * one)


@pytest.mark.parametrize("function", (fused.linear_cross_entropy, fused.token_log_probs))
def test_a_row_has_the_same_bits_in_any_company(function, make):
    inputs = make(70, 40, 300, torch.bfloat16, ignored=False)
    options = {} if function is fused.token_log_probs else {"reduction": "none"}
    together, dhidden, dweight = differentiated(function, inputs, **options)
    for found, wanted in zip(
        differentiated(function, inputs, **options), (together, dhidden, dweight), strict=True
    ):
        assert torch.equal(found, wanted)
    for row in (0, 31, 32, 69):
        alone = {name: inputs[name][row : row + 1] for name in ("hidden", "targets")}
        found, drow, _ = differentiated(function, inputs | alone, **options)
        assert torch.equal(found, together[row : row + 1])
        assert torch.equal(drow, dhidden[row : row + 1])


def test_what_divides_the_mean(make, device):
    inputs = make(9, 8, 11)
    total = fused.linear_cross_entropy(**inputs, reduction="sum")
    for count in (7, 7.0, torch.tensor(7, device=device), torch.tensor(7.0, device=device)):
        found = fused.linear_cross_entropy(**inputs, num_predictions=count)
        torch.testing.assert_close(found, total / 7, rtol=1e-6, atol=0)
    assert torch.equal(fused.linear_cross_entropy(**inputs), total / 6)


def test_shapes_strides_and_kinds_of_ids(make):
    inputs = make(24, 16, 11)
    expected = differentiated(fused.linear_cross_entropy, inputs, reduction="none")
    targets = inputs["targets"].view(4, 6).int().t().contiguous().t()
    wide = torch.full((11, 20), float("nan"), device=targets.device)
    wide[:, 2:18] = inputs["weight"]
    views = {
        "hidden": inputs["hidden"].view(4, 6, 16).transpose(0, 2).contiguous().transpose(0, 2),
        "weight": wide[:, 2:18],
        "targets": targets,
    }
    found = differentiated(fused.linear_cross_entropy, views, reduction="none")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.view(one.shape))


def test_no_tensor_has_the_size_of_the_logits(make, monkeypatch):
    """In autograd and around the ops; inside them a chunk is the largest."""
    inputs, made = make(70, 24, 300), []
    monkeypatch.setattr(
        chunks.Problem,
        "logits_of_a_chunk",
        lambda self, make=chunks.Problem.logits_of_a_chunk: made.append(make(self)) or made[-1],
    )
    for reduction in ("mean", "none"):
        with LargestTensor() as largest:
            differentiated(fused.linear_cross_entropy, inputs, reduction=reduction)
        assert largest.numel == 300 * 24  # the weight's gradient
    assert {x.shape for x in made} == {(32, 320)}


@pytest.mark.parametrize("vocab_size", (32000, 128256, 1_000_000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_chunk_is_bounded_whatever_the_number_of_tokens(vocab_size, dtype, monkeypatch):
    """8192 tokens of a vocabulary of 128256 in bfloat16: 2.1 GB of logits in eager code, a copy of
    them in float32 (4.2 GB), and the gradients of both; here 256 MiB."""
    monkeypatch.setattr(target, "current", lambda: target.Target("sm_90", 132, True, 32))
    meta = partial(torch.empty, device="meta")
    weight = meta(vocab_size, 64, dtype=dtype)
    for num_tokens in (8192, 1 << 20):
        hidden, targets = meta(num_tokens, 64, dtype=dtype), meta(num_tokens, dtype=torch.int64)
        logits = chunks.Problem(hidden, weight, targets, -100).logits_of_a_chunk()
        block = configs.linear_cross_entropy_config("sm_90", dtype.itemsize).block_m
        least = block * logits.stride(0) * dtype.itemsize
        assert logits.nbytes <= max(configs.LINEAR_CROSS_ENTROPY_BYTES, least)
        assert logits.shape[0] % block == 0


def test_a_traced_call_is_differentiated(make):
    """`torch.jit.trace` records no need of gradients; they are computed when asked for."""
    inputs = make(9, 8, 11)
    expected = differentiated(fused.linear_cross_entropy, inputs)
    leaves = [inputs[name].detach().requires_grad_() for name in WRT]
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(fused.linear_cross_entropy, (*leaves, inputs["targets"]))
    loss = traced(*leaves, inputs["targets"])
    found = loss.detach(), *torch.autograd.grad(loss, leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        (
            {"reduction": "average"},
            ValueError,
            "reduction: expected one of mean, sum, none; got 'av",
        ),
        ({"reduction": "sum", "num_predictions": 3}, ValueError, "num_predictions: expected None"),
        (
            {"num_predictions": torch.ones(2)},
            ValueError,
            r"num_predictions: expected a scalar.*\[2\]",
        ),
        (
            {"num_predictions": torch.tensor(True)},
            TypeError,
            "num_predictions: expected a number; got",
        ),
        ({"ignore_index": 2**32 - 100}, ValueError, "ignore_index: expected an int32; got 42949"),
        ({"group": "tp"}, TypeError, "group: expected a ProcessGroup; got str"),
        ({"num_predictions": "3"}, TypeError, "num_predictions: expected a number; got str"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a number from 1e-37 to 1e37; got 0.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss: expected a finite number of 0 or more; got -1.0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected a whole number; got float"),
        ({"targets": torch.ones(9)}, TypeError, "targets: expected dtype int32, int64; got"),
        ({"targets": torch.ones(8, dtype=torch.int64)}, ValueError, r"targets: .*\[9\]; got \[8\]"),
        ({"weight": torch.ones(11, 7)}, ValueError, r"weight: .*, 8\]; got \[11, 7\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, "weight: expected a vocabulary of 1 or more"),
        ({"weight": torch.ones(11, 8).bfloat16()}, TypeError, "weight: expected hidden's dtype"),
        (
            {"hidden": torch.ones(9, 0)},
            ValueError,
            "hidden: expected a last dimension of 1 or more",
        ),
        ({"hidden": torch.ones(9, 8).double()}, TypeError, "hidden: expected dtype float32"),
    ),
)
def test_arguments(changes, error, message, make, device):
    inputs = make(9, 8, 11) | {
        k: x.to(device) if torch.is_tensor(x) else x for k, x in changes.items()
    }
    with pytest.raises(error, match=message):
        fused.linear_cross_entropy(**inputs)


@pytest.mark.parametrize("temperature", (0.0, -1.0, float("nan"), float("inf")))
def test_temperatures(temperature, make):
    with pytest.raises(ValueError, match="temperature: expected a number from"):
        fused.token_log_probs(**make(9, 8, 11), temperature=temperature)
