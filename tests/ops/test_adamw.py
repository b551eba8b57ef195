"""What is peculiar to adamw_update."""

import copy
import math

import pytest
import torch
from budget import assert_results

from gqa_kernels import native, reference
from gqa_kernels.ops.adamw import adamw_update

RECIPE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
WRITTEN = ("weight", "exp_avg", "exp_avg_sq", "copy")


@pytest.fixture
def inputs(draw):
    """The first step of a weight whose copy in bfloat16 the model computes with."""
    weight = draw(5, 72)
    return {
        "weight": weight,
        "gradient": draw(5, 72, dtype=torch.bfloat16),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "copy": weight.bfloat16(),
    }


def steps(update, inputs, count=3):
    """What `count` steps leave, gradients growing."""
    state = {name: x.clone() for name, x in inputs.items()}
    for step in range(1, count + 1):
        update(**state | {"gradient": state["gradient"] * step}, step=step, **RECIPE)
    return {name: state[name] for name in WRITTEN}


def test_several_steps(inputs):
    ours = steps(adamw_update, inputs)
    assert_results(ours, lambda given: steps(reference.adamw_update, given), inputs)


def test_the_reference_is_torchs_adamw(inputs):
    weight = torch.nn.Parameter(inputs["weight"].double())
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    kept = {name: RECIPE[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([weight], betas=betas, **kept)
    for step in (1, 2, 3):
        weight.grad = inputs["gradient"].double() * step
        optimizer.step()
    wide = {name: x.double() for name, x in inputs.items()}
    ours = steps(reference.adamw_update, wide)
    torch.testing.assert_close(ours["weight"], weight.detach(), rtol=1e-13, atol=1e-13)
    moments = optimizer.state[weight]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], moments[name], rtol=1e-13, atol=1e-13)


def test_a_scale_divides_the_gradient(inputs, device):
    halved = inputs | {"gradient": inputs["gradient"] / 2}
    scale = torch.tensor(2.0, device=device)
    ours = steps(lambda **given: adamw_update(**given, grad_scale=scale), inputs)
    for name, expected in steps(adamw_update, halved).items():
        assert torch.equal(ours[name], expected), name


def rows_apart(inputs, name):
    """Copies of the inputs, and the larger tensor that one of them is a view of."""
    wide = torch.full((5, 96), math.nan, device=inputs[name].device, dtype=inputs[name].dtype)
    wide[:, 8:80] = inputs[name]
    return {key: x.clone() for key, x in inputs.items()} | {name: wide[:, 8:80]}, wide


@pytest.mark.parametrize("update", (adamw_update, native.adamw_update), ids=("triton", "torch"))
@pytest.mark.parametrize("name", (*WRITTEN, "gradient"))
def test_rows_apart(name, update, inputs, device):
    """The bits are those of contiguous tensors; the gaps and the gradient are not changed."""
    before = inputs["weight"].clone()
    viewed, wide = rows_apart(inputs, name)
    update(**viewed, grad_scale=torch.tensor(2.0, device=device), step=1, **RECIPE)
    halved = inputs | {"gradient": inputs["gradient"] / 2}
    expected = steps(adamw_update, halved, 1)
    for key in WRITTEN:
        if update is adamw_update:
            assert torch.equal(viewed[key], expected[key]), key
    ours = {key: viewed[key] for key in WRITTEN}
    assert_results(ours, lambda given: steps(reference.adamw_update, given, 1), halved)
    assert torch.equal(viewed["gradient"], inputs["gradient"])
    assert wide[:, :8].isnan().all() and wide[:, 80:].isnan().all()
    assert not torch.equal(viewed["weight"], before)


@pytest.mark.parametrize("shape", ((7,), (2, 3, 8), (0, 8), (4, 0)))
def test_other_shapes(shape, draw):
    given = {name: draw(*shape) for name in (*WRITTEN, "gradient")}
    given["exp_avg_sq"] = given["exp_avg_sq"].square()
    ours = steps(adamw_update, given)
    if given["weight"].numel():
        assert_results(ours, lambda wide: steps(reference.adamw_update, wide), given)


def test_without_a_copy_and_with_gradients_in_columns(inputs):
    expected = steps(adamw_update, inputs, 1)
    plain = copy.deepcopy(inputs)
    del plain["copy"]
    plain["gradient"] = plain["gradient"].T.contiguous().T
    adamw_update(**plain, step=1, **RECIPE)
    for name in WRITTEN[:3]:
        assert torch.equal(plain[name], expected[name]), name


def test_autograd_notices_the_write(inputs):
    before = inputs["weight"]._version
    adamw_update(**inputs, step=1, **RECIPE)
    assert inputs["weight"]._version > before
    with pytest.raises(NotImplementedError, match="weight: expected inputs without a gradient"):
        adamw_update(**inputs | {"weight": inputs["weight"].requires_grad_()}, step=1, **RECIPE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"step": 0}, ValueError, "step: expected 1 or more; got 0"),
        ({"step": 1.0}, TypeError, "step: expected a whole number; got float"),
        ({"beta2": 1.0}, ValueError, "beta2: expected a number from 0 to less than 1; got 1.0"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite float32 of 0 or more; got -1.0"),
        ({"eps": math.nan}, ValueError, "eps: expected a finite float32"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay: expected a finite float32"),
        ({"exp_avg": torch.zeros(5, 71)}, ValueError, r"exp_avg: expected shape \[5, 72\]"),
        (
            {"exp_avg_sq": torch.zeros(5, 72).half()},
            TypeError,
            "exp_avg_sq: expected dtype float32",
        ),
        ({"copy": torch.zeros(72, 5).T}, ValueError, "copy: expected contiguous rows a fixed"),
        (
            {"weight": torch.zeros(1, 72).expand(5, 72)},
            ValueError,
            "weight: expected contiguous rows",
        ),
        ({"grad_scale": torch.ones(1)}, ValueError, r"grad_scale: expected shape \[\]; got \[1\]"),
        ({"gradient": None}, TypeError, "gradient: expected a torch.Tensor; got NoneType"),
    ),
    ids=str,
)
def test_wrong_arguments(change, error, message, inputs, device):
    change = {k: x.to(device) if torch.is_tensor(x) else x for k, x in change.items()}
    with pytest.raises(error, match=message):
        adamw_update(**inputs | {"step": 1, **RECIPE} | change)
