"""Rows of the table: the choice of a token."""

from typing import Any

import torch

from gqa_kernels import fused, reference
from gqa_kernels.spec.case import Case, Cost, Draw, OpSpec


def _inputs(case: Case, *context: Any) -> dict[str, Any]:
    """Rows with greedy choice, nuclei and whole distributions. `uniform` is in the middle of a
    token's interval, so that rounding of sums does not matter."""
    draw, sizes = Draw(case, *context), case.sizes
    batch, vocab_size = sizes["num_tokens"], sizes["vocab_size"]
    logits = draw(batch, vocab_size)
    row = torch.arange(batch, device="cpu")
    temperature, top_p = 0.5 * (row % 4), 1.0 - 0.3 * (row % 3)
    uniform = torch.zeros(batch, dtype=torch.float32, device="cpu")
    if draw.device.type != "meta":
        asked = draw(batch, dtype=torch.float32).sigmoid().cpu()
        settings = (x.to(draw.device, torch.float32) for x in (temperature, top_p, asked))
        uniform = _between_borders(logits, *settings)
    rest = {"temperature": temperature, "top_p": top_p, "uniform": uniform}
    return {"logits": logits} | {k: x.to(draw.device, torch.float32) for k, x in rest.items()}


def _between_borders(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, asked: torch.Tensor
) -> torch.Tensor:
    """The middle of the interval around `asked` in which the same token is drawn."""

    def drawn(uniform: torch.Tensor) -> torch.Tensor:
        return reference.sample_tokens(logits.double(), temperature, top_p, uniform)

    asked, ends = asked.double(), []
    tokens = drawn(asked)
    for end in (0.0, 1.0):
        inside, outside = asked, torch.full_like(asked, end)
        for _ in range(24):
            middle = (inside + outside) / 2
            is_inside = drawn(middle) == tokens
            inside = torch.where(is_inside, middle, inside)
            outside = torch.where(is_inside, outside, middle)
        ends.append(inside)
    return ((ends[0] + ends[1]) / 2).float()


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    """Reads logits and three numbers per row, writes a token; an exponential, a difference and a
    sum per logit."""
    batch, vocab_size = case.sizes["num_tokens"], case.sizes["vocab_size"]
    return Cost(batch * vocab_size * dtype.itemsize + 12 * batch, 8 * batch, 3 * batch * vocab_size)


_REAL = ((32000, "Llama 2"), (128256, "Llama 3"), (151936, "Qwen3"))

OPS = (
    OpSpec(
        "sample_tokens",
        reference.sample_tokens,
        fused.sample_tokens,
        (
            Case({"num_tokens": 13, "vocab_size": 97}, "greedy, nucleus and whole", test=True),
            Case({"num_tokens": 3, "vocab_size": 1}, "one id", test=True),
            *(
                Case({"num_tokens": batch, "vocab_size": vocab_size}, source)
                for vocab_size, source in _REAL
                for batch in (1, 128)
            ),
        ),
        _inputs,
        _cost,
        {"num_tokens": 3, "vocab_size": 11},
    ),
)
