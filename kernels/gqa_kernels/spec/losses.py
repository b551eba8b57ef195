"""Rows of the table: losses over a vocabulary."""

from typing import Any

import torch

from gqa_kernels import fused, reference
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec


def _projection(case: Case, *context: Any) -> dict[str, Any]:
    """Inputs whose logits have a standard deviation of about 1."""
    draw, sizes = Draw(case, *context), case.sizes
    num_tokens, width, vocab_size = (
        sizes[name] for name in ("num_tokens", "hidden_size", "vocab_size")
    )
    targets = torch.randint(
        vocab_size, (num_tokens,), generator=draw.generator, device=draw.generator.device
    )
    return {
        "hidden": draw(num_tokens, width),
        "weight": draw.weight(vocab_size, width) * width**-0.5,
        "targets": targets.to(draw.device),
    }


def _ignored_every(case: Case) -> int | None:
    """The n for which every n-th token is ignored; None if none is."""
    return case.sizes.get("ignored_every", 3)


def _loss_inputs(case: Case, *context: Any) -> dict[str, Any]:
    inputs, every = _projection(case, *context), _ignored_every(case)
    if every is not None and inputs["targets"].device.type != "meta":
        inputs["targets"][every - 1 :: every] = -100
    options = {name: case.sizes[name] for name in ("reduction", "softcap", "z_loss")}
    return inputs | options


def _log_probs_inputs(case: Case, *context: Any) -> dict[str, Any]:
    options = {name: case.sizes[name] for name in ("temperature", "return_entropy")}
    return _projection(case, *context) | options


def _cost(case: Case, dtype: torch.dtype, num_ignored: int = 0) -> Cost:
    """Reads hidden states, weight and targets, writes a number per token; one matrix product."""
    tokens, width, vocab_size = (
        case.sizes[name] for name in ("num_tokens", "hidden_size", "vocab_size")
    )
    rows = tokens - num_ignored
    read = (rows + vocab_size) * width * dtype.itemsize + 8 * tokens
    return Cost(read, 4 * tokens, 2 * rows * width * vocab_size)


def _backward_cost(case: Case, dtype: torch.dtype, num_ignored: int = 0) -> Cost:
    """Reads the same, writes both gradients; two matrix products, with the logits given."""
    read, _, flops = _cost(case, dtype, num_ignored)
    tokens, width, vocab_size = (
        case.sizes[name] for name in ("num_tokens", "hidden_size", "vocab_size")
    )
    return Cost(read, (tokens + vocab_size) * width * dtype.itemsize, 2 * flops)


def _num_ignored(case: Case) -> int:
    every = _ignored_every(case)
    return 0 if every is None else case.sizes["num_tokens"] // every


def _loss_cost(case: Case, dtype: torch.dtype) -> Cost:
    return _cost(case, dtype, _num_ignored(case))


def _loss_backward_cost(case: Case, dtype: torch.dtype) -> Cost:
    return _backward_cost(case, dtype, _num_ignored(case))


def _case(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    source: str,
    test: bool = False,
    **options: Any,
) -> Case:
    sizes = {"num_tokens": num_tokens, "hidden_size": hidden_size, "vocab_size": vocab_size}
    return Case(sizes | options, source, test)


_LOSS = {"reduction": "mean", "softcap": None, "z_loss": 0.0}
_LOG_PROBS = {"temperature": 1.0, "return_entropy": False}
_REAL = ((4096, 32000, "Llama 2 7B"), (4096, 128256, "Llama 3 8B"), (3584, 256000, "Gemma 2 9B"))

OPS = (
    OpSpec(
        "linear_cross_entropy",
        reference.linear_cross_entropy,
        fused.linear_cross_entropy,
        (
            _case(70, 40, 300, "several chunks and blocks", True, **_LOSS),
            _case(9, 111, 50, "odd width, z-loss", True, **_LOSS | {"z_loss": 1e-2}),
            _case(
                *(37, 64, 130, "a loss per token, capped", True),
                **_LOSS | {"reduction": "none", "softcap": 5.0},
            ),
            _case(5, 1, 7, "the narrowest row", True, **_LOSS | {"reduction": "sum"}),
            _case(2, 16, 4100, "more scores than a block of the softmax", True, **_LOSS),
            *(
                _case(tokens, width, vocab_size, source, **_LOSS)
                for width, vocab_size, source in _REAL
                for tokens in (1024, 8192)
            ),
        ),
        _loss_inputs,
        _loss_cost,
        _case(3, 8, 11, "tiny", **_LOSS).sizes,
        ("hidden", "weight"),
        _loss_backward_cost,
    ),
    OpSpec(
        "token_log_probs",
        reference.token_log_probs,
        fused.token_log_probs,
        (
            _case(70, 40, 300, "several chunks and blocks", True, **_LOG_PROBS),
            _case(
                *(9, 111, 50, "odd width, entropy", True),
                **{"temperature": 0.7, "return_entropy": True},
            ),
            *(
                _case(tokens, width, vocab_size, source, **_LOG_PROBS)
                for width, vocab_size, source in _REAL
                for tokens in (1024, 8192)
            ),
        ),
        _log_probs_inputs,
        _cost,
        _case(3, 8, 11, "tiny", **_LOG_PROBS).sizes,
        ("hidden", "weight"),
        _backward_cost,
    ),
)
