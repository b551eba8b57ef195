"""What autograd asks of every op with a gradient, whatever its maths."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from gqa_kernels.accuracy import run
from gqa_kernels.spec import OPS

DIFFERENTIABLE = [pytest.param(spec, id=spec.name) for spec in OPS if spec.wrt]


@pytest.fixture
def call(device, generator):
    """Inputs of an op's first case, its differentiable ones as leaves."""

    def make(spec, dtype=torch.float32):
        inputs = spec.make_inputs(spec.test_cases()[0], dtype, device, generator)
        for name in spec.wrt:
            inputs[name].requires_grad_()
        return inputs

    return make


def outputs_of(spec, inputs):
    outputs = spec.kernel(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def grads_of(spec, inputs, outputs, **kwargs):
    leaves = [inputs[name] for name in spec.wrt]
    cotangents = [torch.ones_like(output) for output in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, **kwargs)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_repeated_backward_gives_the_same_bits_and_spoils_nothing(spec, call):
    inputs = call(spec)
    before = [inputs[name].detach().clone() for name in spec.wrt]
    outputs = outputs_of(spec, inputs)
    kept = [output.detach().clone() for output in outputs]
    first = grads_of(spec, inputs, outputs, retain_graph=True)
    first = [grad.clone() for grad in first]
    second = grads_of(spec, inputs, outputs)
    assert_same_bits(first, second)
    assert_same_bits(outputs, kept)
    assert_same_bits([inputs[name] for name in spec.wrt], before)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_two_consumers_add_up(spec, call):
    inputs = call(spec)
    outputs = outputs_of(spec, inputs)
    once = grads_of(spec, inputs, outputs, retain_graph=True)
    twice = grads_of(spec, inputs, [output + output for output in outputs])
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_activation_checkpointing_gives_the_same_bits(spec, call):
    inputs = call(spec)
    leaves = [inputs[name] for name in spec.wrt]
    rest = {name: value for name, value in inputs.items() if name not in spec.wrt}

    def function(*tensors):
        return spec.kernel(**dict(zip(spec.wrt, tensors, strict=True)), **rest)

    plain = grads_of(spec, inputs, outputs_of(spec, inputs))
    again = checkpoint(function, *leaves, use_reentrant=False)
    again = again if isinstance(again, tuple) else (again,)
    assert_same_bits(plain, grads_of(spec, inputs, again))


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_expanded_gradients(spec, call):
    """`.sum().backward()` hands over a gradient whose strides are all zero."""
    inputs = call(spec)
    dense = grads_of(spec, inputs, outputs_of(spec, inputs))
    total = sum(output.sum() for output in outputs_of(spec, inputs))
    assert_same_bits(dense, torch.autograd.grad(total, [inputs[name] for name in spec.wrt]))


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_only_what_is_asked_for(spec, device, generator):
    """The gradient of one argument alone equals its gradient among all of them."""
    inputs = spec.make_inputs(spec.test_cases()[0], torch.float32, device, generator)
    together = run(spec.kernel, inputs, spec.wrt)
    for name in spec.wrt:
        alone = run(spec.kernel, inputs, (name,))
        assert torch.equal(alone[f"d {name}"], together[f"d {name}"])


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_no_graph_without_grad(spec, call):
    inputs = call(spec)
    with torch.no_grad():
        assert not any(output.requires_grad for output in outputs_of(spec, inputs))
    with torch.inference_mode():
        outputs_of(spec, inputs)


@pytest.mark.parametrize("op", ("rms_norm", "add_rms_norm", "swiglu"))
def test_a_gradient_penalty_is_refused(op, call):
    """It differentiates a gradient with respect to the inputs, for constant cotangents."""
    (spec,) = (spec for spec in OPS if spec.name == op)
    inputs = call(spec)
    leaves = [inputs[name] for name in spec.wrt]
    grads = grads_of(spec, inputs, outputs_of(spec, inputs), create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(grads[0].square().sum(), leaves)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_a_forward_mode_tangent_is_refused(spec, call):
    inputs = {k: v.detach() if torch.is_tensor(v) else v for k, v in call(spec).items()}
    name = spec.wrt[0]
    with forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match=f"{name}: expected no forward-mode tangent"):
            spec.kernel(**inputs)


@pytest.mark.parametrize("spec", DIFFERENTIABLE)
def test_second_derivative_is_refused(spec, call):
    inputs = call(spec)
    outputs = outputs_of(spec, inputs)
    cotangents = [torch.ones_like(output, requires_grad=True) for output in outputs]
    leaves = [inputs[name] for name in spec.wrt]
    grads = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="first derivatives only; got a second"):
            grad.sum().backward(retain_graph=True)
