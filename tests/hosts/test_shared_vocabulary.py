"""Losses over a vocabulary that two ranks share."""

from contextlib import contextmanager
from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from budget import assert_results
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def loss_inputs(*rows: int, vocab_size: int, **options) -> dict:
    targets = torch.randint(vocab_size, rows)
    targets[0] = -100
    weight = torch.randn(vocab_size, 6)
    return {"hidden": torch.randn(*rows, 6), "weight": weight, "targets": targets} | options


def spread(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(dim)])


@contextmanager
def sizes_of_sums():
    """How many numbers each all_reduce takes."""
    sizes, all_reduce = [], dist.all_reduce

    def watched(x, *args, **kwargs):
        sizes.append(x.numel())
        return all_reduce(x, *args, **kwargs)

    dist.all_reduce = watched
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def check(*, by_group: bool, vocab_size: int, op: str = "linear_cross_entropy", **options) -> None:
    """On either backend, what the whole vocabulary gives; no more than three numbers per token
    travel, for the entropy a fourth, and the gradient of the hidden states."""
    import gqa_kernels
    from gqa_kernels import reference

    inputs = loss_inputs(3, 5, vocab_size=vocab_size, **options)
    if op == "token_log_probs":
        inputs["targets"] = inputs["targets"].clamp(min=0)
    for ops in (gqa_kernels, reference):
        check_backend(getattr(ops, op), getattr(reference, op), inputs, by_group)


def check_backend(function, eager, inputs: dict, by_group: bool) -> None:
    from gqa_kernels import accuracy

    hidden = inputs["hidden"].detach().requires_grad_()
    if by_group:
        part = inputs["weight"].chunk(2)[dist.get_rank()].detach().requires_grad_()
        shared = {"hidden": hidden, "weight": part, "group": dist.group.WORLD}
    else:
        part = spread(inputs["weight"]).requires_grad_()
        shared = {"hidden": hidden, "weight": part}
    with sizes_of_sums() as sizes:
        results = function(**inputs | shared)
        results = results if isinstance(results, tuple) else (results,)
        named = {f"output {i}": x.detach() for i, x in enumerate(results)}
        directions = [x.to(y) for x, y in zip(accuracy.cotangents(named), results, strict=True)]
        dhidden, dweight = torch.autograd.grad(results, [hidden, part], directions)
    if by_group:
        parts = [torch.empty_like(dweight) for _ in range(2)]
        dist.all_gather(parts, dweight.contiguous())
        dweight = torch.cat(parts)
    else:
        assert dweight.placements == (Shard(0),)
        dweight = dweight.full_tensor()
    actual = named | {"d hidden": dhidden, "d weight": dweight}
    assert_results(actual, lambda given: accuracy.run(eager, given, ("hidden", "weight")), inputs)
    # Beside the maxima, which tell whether the ranks have as many rows each.
    vectors = 3 if inputs.get("return_entropy") else 2
    assert sorted(sizes) == [15] * vectors + [17, hidden.numel()], sizes


def an_unknown_target() -> None:
    """What no rank has is NaN; what another rank has is not."""
    import gqa_kernels

    inputs = loss_inputs(6, vocab_size=8, reduction="none", ignore_index=2)
    inputs["targets"] = torch.tensor([2, 8, -1, 7, 0, 4])
    loss = gqa_kernels.linear_cross_entropy(**inputs | {"weight": spread(inputs["weight"])})
    assert loss.isnan().tolist() == [False, True, True, False, False, False] and loss[0] == 0.0


def ranks_with_different_rows() -> None:
    """A group's parts are as large each, or nothing is said to be right."""
    from gqa_kernels import fused, reference

    inputs = loss_inputs(6, vocab_size=11)
    part = inputs["weight"].chunk(2)[dist.get_rank()]
    for ops in (fused, reference):
        loss = ops.linear_cross_entropy(**inputs | {"weight": part}, group=dist.group.WORLD)
        assert loss.isnan()


def a_rank_without_a_finite_score() -> None:
    from gqa_kernels import fused, reference

    inputs = loss_inputs(6, vocab_size=12)
    inputs["targets"] = inputs["targets"].clamp(min=0) % 6
    inputs["hidden"] = inputs["hidden"].abs()
    inputs["weight"][6:] = -torch.inf
    expected = reference.linear_cross_entropy(**inputs)
    part = inputs["weight"].chunk(2)[dist.get_rank()]
    for ops in (fused, reference):
        loss = ops.linear_cross_entropy(**inputs | {"weight": part}, group=dist.group.WORLD)
        torch.testing.assert_close(loss, expected)


def a_second_derivative() -> None:
    """Of eager code, to which an error of the kernels refers."""
    from gqa_kernels import reference

    inputs, found = loss_inputs(6, vocab_size=12, reduction="sum"), []
    part = inputs["weight"].chunk(2)[dist.get_rank()]
    for given in ({"weight": part, "group": dist.group.WORLD}, {}):
        hidden = inputs["hidden"].double().requires_grad_()
        weight = given.get("weight", inputs["weight"]).double()
        loss = reference.linear_cross_entropy(
            **inputs | given | {"hidden": hidden, "weight": weight}
        )
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), hidden)[0])
    torch.testing.assert_close(*found)


def whole_dtensors() -> None:
    """Hidden states and targets as DTensors, beside a weight that is one."""
    from gqa_kernels import fused, reference

    inputs = loss_inputs(6, vocab_size=12)
    expected = reference.linear_cross_entropy(**inputs)
    for ops in (fused, reference):
        given = {name: spread(x) for name, x in inputs.items()}
        torch.testing.assert_close(ops.linear_cross_entropy(**given), expected)


def refused() -> None:
    import gqa_kernels

    inputs = loss_inputs(6, vocab_size=8)
    weight = inputs.pop("weight")
    for wrong, message in (
        (spread(weight, dim=1), "sharded over the vocabulary"),
        (spread(weight[:1]), "a row of the vocabulary for each of 2 ranks; got 1"),
    ):
        with pytest.raises(NotImplementedError, match=f"weight: expected .*{message}"):
            gqa_kernels.linear_cross_entropy(**inputs, weight=wrong)
    with pytest.raises(TypeError, match="group: expected None for a weight that is a DTensor"):
        gqa_kernels.linear_cross_entropy(**inputs, weight=spread(weight), group=dist.group.WORLD)


ON_TWO_RANKS = {
    "DTensors": partial(check, by_group=False, vocab_size=11),
    "a group, a loss per token": partial(
        check, by_group=True, vocab_size=12, reduction="none", softcap=2.0
    ),
    "an id to ignore": partial(
        check, by_group=True, vocab_size=12, reduction="sum", ignore_index=3, z_loss=0.1
    ),
    "entropies": partial(
        check,
        by_group=False,
        vocab_size=7,
        op="token_log_probs",
        temperature=0.7,
        return_entropy=True,
    ),
    "an unknown target": an_unknown_target,
    "ranks with different rows": ranks_with_different_rows,
    "a rank without a finite score": a_rank_without_a_finite_score,
    "a second derivative": a_second_derivative,
    "whole DTensors": whole_dtensors,
    "refused": refused,
}


def test_on_two_ranks():
    ranks.run(ON_TWO_RANKS, 2)
