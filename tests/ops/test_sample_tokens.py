"""What is peculiar to sample_tokens: borders, ties, and that rows do not affect each other."""

import pytest
import torch
from budget import SEED

from gqa_kernels import reference, sample_tokens
from gqa_kernels.runtime import configs

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def settings(device):
    """Makes temperature, top_p and uniform for a batch: greedy rows, low and high temperatures,
    small nuclei and whole distributions."""

    def make(batch: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        temperature, top_p, uniform = torch.rand(3, batch, generator=generator)
        temperature = (3 * temperature).where(torch.arange(batch) % 5 > 0, 0.0)
        top_p = (0.01 + 0.99 * top_p).where(torch.arange(batch) % 3 > 0, 1.0)
        return [x.to(device) for x in (temperature, top_p, uniform)]

    return make


def logits_of(batch: int, vocab_size: int, dtype: torch.dtype, device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + vocab_size)
    return (3 * torch.randn(batch, vocab_size, generator=generator)).to(device, dtype)


def may_be_drawn(logits, temperature, top_p, uniform, token) -> bool:
    """Whether float32 rounding can explain the token of one row.

    A weight has an error of a few units in its last place, of which the exponent's is the largest:
    (x - max) / temperature is rounded twice. A sum of n weights, in any order, adds at most n - 1
    roundings of itself. So each of the sums that a draw compares may be off by this part of Σw, and
    so may the nucleus' sum.
    """
    x = logits.double()
    weights = (
        (x - x.max()) / temperature.double().clamp(min=torch.finfo(torch.float32).tiny)
    ).exp()
    order = x.sort(descending=True, stable=True).indices
    reached = weights[order].cumsum(0)
    total = reached[-1]
    exponent = ((x - x.max()) / temperature.double()).abs()
    slack = (len(x) + 4) * EPS * total + 2 * EPS * (exponent * weights).sum()
    rank = int((order == token).nonzero())
    before = reached[rank] - weights[token]
    limit = top_p.double() * total
    # The nucleus may end a little sooner or later.
    sizes = [
        int((reached - weights[order] < limit + d).sum().clamp(min=1)) for d in (-slack, slack)
    ]
    sums = [reached[size - 1] for size in sizes]
    goal = [uniform.double() * s for s in sums]
    return (
        rank < sizes[1]
        and before <= goal[1] + slack
        and (reached[rank] >= goal[0] - slack or rank == sizes[0] - 1)
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("batch", "vocab_size"), ((30, 1), (40, 33), (12, 1000), (4, 9001)))
def test_tokens_are_the_references_but_for_roundings(batch, vocab_size, dtype, settings, device):
    logits, drawn_by = logits_of(batch, vocab_size, dtype, device), settings(batch)
    tokens = sample_tokens(logits, *drawn_by)
    assert tokens.dtype == torch.int64 and tokens.shape == (batch,)
    expected = reference.sample_tokens(logits, *drawn_by)
    for row in (tokens != expected).nonzero()[:, 0].tolist():
        assert drawn_by[0][row] > 0, "the likeliest token needs no sum"
        assert may_be_drawn(logits[row], *(x[row] for x in drawn_by), tokens[row])
    assert (tokens == expected).float().mean() >= 0.75


def test_the_explanation_by_roundings_explains_no_other_token(device, settings):
    """The test above allows hardly more than one token per row."""
    logits, drawn_by = logits_of(40, 33, torch.float32, device), settings(40)
    drawn_by[0].clamp_(min=0.1)
    expected = reference.sample_tokens(logits, *drawn_by)
    allowed = [
        [t for t in range(33) if may_be_drawn(logits[row], *(x[row] for x in drawn_by), t)]
        for row in range(40)
    ]
    assert all(int(token) in tokens for token, tokens in zip(expected, allowed, strict=True))
    assert sum(map(len, allowed)) <= 42


def test_ties_are_drawn_in_the_order_of_ids(device):
    """Nuclei of 8, of 6 and of all tokens, of 8 equal ones and 8 less likely ones."""
    row = torch.tensor([0.0, -1.0] * 8, device=device)
    row[::4] = -0.0  # which equals 0
    uniform = (torch.arange(16, device=device) + 0.5) / 16
    weight = torch.exp(torch.tensor(-1.0)).item()
    for top_p, ids in (
        (1 / (1 + weight), [*range(0, 16, 2)]),
        (0.7 / (1 + weight), [*range(0, 12, 2)]),
    ):
        settings = (torch.full_like(uniform, value) for value in (1.0, top_p - 1e-6))
        tokens = sample_tokens(row.expand(16, -1), *settings, uniform)
        assert tokens.tolist() == [ids[int(u * len(ids))] for u in uniform.tolist()]
    settings = (torch.full_like(uniform, value) for value in (1.0, 1.0))
    tokens = sample_tokens(row.expand(16, -1), *settings, uniform).tolist()
    assert tokens == [i for i in tokens if i % 2 == 0] + [i for i in tokens if i % 2]
    assert sum(i % 2 for i in tokens) == round(16 * weight / (1 + weight))


def test_rows_that_are_not_finite(device, settings):
    inf, nan = float("inf"), float("nan")
    rows = [[0, nan, 1], [inf, 0, 1], [-inf, -inf, -inf], [-inf, 2, -inf], [nan, inf, -inf]]
    logits = torch.tensor(rows, device=device)
    for temperature in (0.0, 1.0):
        given = (torch.full((5,), x, device=device) for x in (temperature, 1.0, 0.999))
        assert sample_tokens(logits, *given).tolist() == [-1, -1, -1, 1, -1]


def test_a_row_does_not_see_the_others(device, settings, monkeypatch):
    """Strides do not matter."""
    monkeypatch.setattr(configs, "SAMPLING_BLOCK", 16)
    logits, drawn_by = logits_of(9, 50, torch.bfloat16, device), settings(9)
    together = sample_tokens(logits, *drawn_by)
    wide = torch.full((9, 80), float("nan"), dtype=logits.dtype, device=device)
    wide[:, 7:57] = logits
    assert torch.equal(sample_tokens(wide[:, 7:57], *drawn_by), together)
    every_other = [x.repeat_interleave(2)[::2] for x in drawn_by]
    assert torch.equal(sample_tokens(logits, *every_other), together)
    for row in range(9):
        alone = sample_tokens(logits[row : row + 1], *(x[row : row + 1] for x in drawn_by))
        assert alone == together[row]


def test_extreme_temperatures(device):
    logits = logits_of(6, 20, torch.float32, device)
    ones = torch.ones(6, device=device)
    for cold in (1e-45, 1e-38, 1e-6):
        tokens = sample_tokens(logits, cold * ones, ones, 0.999 * ones)
        assert torch.equal(tokens, logits.argmax(1))
    hottest = torch.finfo(torch.float32).max * ones
    uniform = (torch.arange(6, device=device) + 0.5) / 6
    tokens = sample_tokens(logits, hottest, ones, uniform)
    order = logits.sort(dim=1, descending=True).indices
    assert torch.equal(tokens, order.gather(1, (20 * uniform).long()[:, None])[:, 0])


def test_impossible_arguments(device):
    logits, ones = torch.zeros(2, 5, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match="logits: expected a vocab_size of 1 or more"):
        sample_tokens(logits[:, :0], ones, ones, ones)
    with pytest.raises(TypeError, match="temperature: expected dtype float32"):
        sample_tokens(logits, ones.double(), ones, ones)
    with pytest.raises(ValueError, match="uniform: expected"):
        sample_tokens(logits, ones, ones, ones[:1])
    with pytest.raises(NotImplementedError, match="logits: expected inputs without a gradient"):
        sample_tokens(logits.requires_grad_(), ones, ones, ones)
