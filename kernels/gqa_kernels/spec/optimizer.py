"""Rows of the table: steps of an optimiser."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gqa_kernels import fused, reference
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec


def on_copies(update: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Wraps an update so that it returns what it would write and leaves its arguments unchanged."""

    @wraps(update)
    def updated(**inputs: Any) -> tuple[Tensor, ...]:
        names = ("weight", "exp_avg", "exp_avg_sq", "copy")
        written = {name: inputs[name].clone() for name in names}
        update(**inputs | written)
        return tuple(written.values())

    return updated


def _adamw_inputs(case: Case, *context: Any) -> dict[str, Any]:
    """The tenth step of a model of the case's dtype with float32 master weights."""
    draw, sizes = Draw(case, *context), case.sizes
    shape = (sizes["num_tokens"], sizes["hidden_size"])
    gradient = draw(*shape)
    wide = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
    weight, exp_avg = (draw(*shape, dtype=wide) for _ in range(2))
    return {
        "weight": weight,
        "gradient": gradient,
        "exp_avg": 0.1 * exp_avg,
        "exp_avg_sq": draw(*shape, dtype=wide).square(),
        "copy": weight.to(gradient.dtype),
        "grad_scale": draw(1, dtype=wide).abs().squeeze() + 1.0,
        "step": 10,
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.1,
    }


def _adamw_cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads weight, m, v and gradient, writes weight, m, v and copy; 14 flops per number."""
    numbers = case.sizes["num_tokens"] * case.sizes["hidden_size"]
    size = 3 * 4 + dtype.itemsize
    return Cost(numbers * size, numbers * size, 14 * numbers)


def _adamw_case(rows: int, width: int, source: str, *, test: bool = False) -> Case:
    return Case({"num_tokens": rows, "hidden_size": width}, source, test)


IN_PLACE_OPS = (
    OpSpec(
        "adamw_update",
        on_copies(reference.adamw_update),
        on_copies(fused.adamw_update),
        (
            _adamw_case(3, 111, "odd: no 16-byte accesses", test=True),
            _adamw_case(1, 1, "a single number", test=True),
            _adamw_case(4, 1024, "whole blocks", test=True),
            _adamw_case(2, 2056, "a block that is not whole", test=True),
            _adamw_case(4096, 4096, "7B, a projection"),
            _adamw_case(32000, 4096, "7B, embeddings"),
            _adamw_case(28672, 8192, "70B, a projection"),
        ),
        _adamw_inputs,
        _adamw_cost,
        _adamw_case(3, 24, "tiny").sizes,
    ),
)
