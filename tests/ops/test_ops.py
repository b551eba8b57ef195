"""Every op of the table, every small case, every dtype: outputs and gradients within budget.

`make test` runs each case in one dtype, and each op in all of them."""

import inspect
import random
from dataclasses import replace

import pytest
import torch
from budget import SEED, assert_call, assert_ok

import gqa_kernels
from gqa_kernels import fused, reference
from gqa_kernels.accuracy import measure
from gqa_kernels.spec import IN_PLACE_OPS, OPS, STRUCTURES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {spec.name: spec for spec in OPS}
TABLE = [
    pytest.param(spec, case, id=f"{spec.name}-{case}")
    for spec in (*OPS, *IN_PLACE_OPS)
    for case in spec.test_cases()
]


@pytest.mark.covering(1, each="spec")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), TABLE)
def test_within_budget(spec, case, dtype, device):
    assert_ok(measure(spec, case, dtype, device, SEED))


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "normal"])
@pytest.mark.parametrize("spec", (*OPS, *IN_PLACE_OPS), ids=lambda spec: spec.name)
def test_inputs_with_structure(spec, structure, device):
    """A small case of each op, in one dtype; both differ between structures."""
    cases, index = spec.test_cases(), list(STRUCTURES).index(structure)
    case = replace(cases[index % len(cases)], structure=structure)
    dtype = DTYPES[index % len(DTYPES)]
    print(case, dtype)
    assert_ok(measure(spec, case, dtype, device, SEED))


@pytest.mark.parametrize("seed", (1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))))
@pytest.mark.parametrize("spec", (*OPS, *IN_PLACE_OPS), ids=lambda spec: spec.name)
def test_within_budget_of_chosen_cases(spec, seed, device):
    """Each seed chooses a case, a structure and a dtype for each op. TEST_SEED chooses others, as
    `make test-seeds` does: budgets are estimates, so a seed that nobody has tried may exceed one by
    chance, and a run of all tests should not fail by chance."""
    chosen = random.Random(f"{SEED} {seed} {spec.name}")
    case, dtype = chosen.choice(spec.test_cases()), chosen.choice(DTYPES)
    case = replace(case, structure=chosen.choice(list(STRUCTURES)))
    print(f"{case}, {case.structure}, {dtype}")
    assert_ok(measure(spec, case, dtype, device, 1000 * SEED + seed))


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as a view with gaps between rows, as a slice of a fused projection is."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), float("nan"), device=x.device).to(x.dtype)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with features that are not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("view", (strided, transposed))
@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_strided_views(spec, view, device, generator):
    inputs = spec.make_inputs(spec.test_cases()[0], torch.bfloat16, device, generator)
    floating = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]
    floating = [name for name in floating if inputs[name].is_floating_point()]
    if view is transposed:
        floating = [name for name in floating if not name.endswith("_cache")]
    viewed = {name: view(inputs[name]) if name in floating else x for name, x in inputs.items()}
    untouched = {name: viewed[name].clone() for name in floating}
    assert_call(spec.kernel, spec.reference, viewed, spec.wrt)
    for name in floating:
        torch.testing.assert_close(viewed[name], untouched[name], rtol=0, atol=0, equal_nan=True)


def test_backends_export_the_same_signatures():
    names = set(fused.__all__)
    assert {spec.name for spec in (*OPS, *IN_PLACE_OPS)} == names == set(gqa_kernels.OPS)
    for name in fused.__all__:
        ours = inspect.signature(getattr(fused, name))
        assert ours == inspect.signature(getattr(reference, name)), name


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_float64_is_refused_by_name(spec, device, generator):
    inputs = spec.make_inputs(spec.test_cases()[0], torch.float64, device, generator)
    first = next(iter(inputs))
    with pytest.raises(TypeError, match=f"^{first}: expected dtype float32"):
        spec.kernel(**inputs)
