"""PPO's losses against tables, and over packed answers against each answer by itself."""

import numpy as np
import pytest
import tiny_ppo
import torch
from small_llama import EAGER, twin

from llama2.rlhf.ppo_losses import (
    Experience,
    PolicyLoss,
    Rollout,
    ValueLoss,
    answer_log_probs,
    answer_values,
    clipped_policy_losses,
    clipped_value_losses,
    tokens_per_row,
)
from llama2.rlhf.ragged import Ragged
from llama2.scalar_model import ScalarModel

CPU = torch.device("cpu")
ROLLOUTS = [
    Rollout([1, 7, 9], [5, 6, 2]),
    Rollout([1], [3]),
    Rollout([1, 8], [5, 5, 5, 11, 2]),
    Rollout([1, 9, 4, 4], [10, 12]),
]


def policy():
    return twin(tiny_ppo.policy(), dtype=torch.float64)


def critic():
    """The body of the policy, so that positions matter as much, in float64."""
    model = ScalarModel.from_decoder(policy(), EAGER, seed=3)
    model.rope.cos, model.rope.sin = policy().rope.cos, policy().rope.sin
    return model


def experiences():
    draw = np.random.default_rng(0)
    return [
        Experience(
            rollout,
            draw.normal(-2.5, 0.3, len(rollout.answer)),
            draw.normal(size=len(rollout.answer)),
            draw.normal(size=len(rollout.answer)),
            draw.normal(size=len(rollout.answer)),
        )
        for rollout in ROLLOUTS
    ]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # the gradient is that of the loss by log π, −ρ·A, or 0 where the ratio is clipped
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
    ],
)
def test_clipped_policy_losses(ratio, advantage, loss, gradient):
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    found, ratios = clipped_policy_losses(log_ratio, torch.tensor(advantage), 0.2)
    assert found.item() == pytest.approx(loss) and ratios.item() == pytest.approx(ratio)
    assert torch.autograd.grad(found, log_ratio)[0].item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        # the old value is 0 and the range 0.2
        (0.1, 1.0, 0.405, -0.9),
        (0.5, 1.0, 0.32, 0.0),  # as far as 0.2: (0.2 − 1)² / 2
        (0.5, 0.0, 0.125, 0.5),  # too far already, and away from the target
        (-0.5, 1.0, 1.125, -1.5),
    ],
)
def test_clipped_value_losses(value, target, loss, gradient):
    values = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    found = clipped_value_losses(values, torch.tensor(0.0), torch.tensor(target), 0.2)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found, values)[0].item() == pytest.approx(gradient)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_answer_by_itself(temperature):
    model = policy()
    log_probs, entropies = answer_log_probs(model, ROLLOUTS, temperature, CPU)
    assert not entropies.requires_grad
    expected, expected_entropies = [], []
    for rollout in ROLLOUTS:
        logits = model(torch.tensor([rollout.ids]))[0] / temperature
        every = logits.log_softmax(-1)[len(rollout.prompt) - 1 : -1]
        expected.append(every.gather(1, torch.tensor(rollout.answer)[:, None])[:, 0])
        expected_entropies.append(-(every.exp() * every).sum(-1))
    torch.testing.assert_close(log_probs, torch.cat(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, torch.cat(expected_entropies), rtol=1e-12, atol=1e-12)


def test_values_are_those_of_each_answer_by_itself():
    model = critic()
    expected = [
        model(torch.tensor([rollout.ids]))[0, len(rollout.prompt) - 1 : -1] for rollout in ROLLOUTS
    ]
    found = answer_values(model, ROLLOUTS, CPU)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


def losses(rows, micro_batch_size):
    """(loss, its gradients) of policy and critic, over equal parts."""
    per_row = tokens_per_row(rows)
    found = []
    for model, objective in (
        (policy(), PolicyLoss(per_row, 0.2, 1.0)),
        (critic(), ValueLoss(per_row, 0.2)),
    ):
        parts = Ragged(rows).split(micro_batch_size)
        loss = sum(objective(model, part) for part in parts) / len(parts)
        found += [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    return found


def test_losses_are_means_over_tokens_and_parts_add_up():
    rows = experiences()
    whole = losses(rows, 4)
    for size in (1, 2):
        for one, other in zip(losses(rows, size), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    joined = {
        name: torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
        for name in ("log_probs", "advantages", "values", "returns")
    }
    log_probs, _ = answer_log_probs(policy(), ROLLOUTS, 1.0, CPU)
    expected, _ = clipped_policy_losses(log_probs - joined["log_probs"], joined["advantages"], 0.2)
    torch.testing.assert_close(whole[0], expected.mean())
    values = answer_values(critic(), ROLLOUTS, CPU)
    expected = clipped_value_losses(values, joined["values"], joined["returns"], 0.2)
    torch.testing.assert_close(whole[1 + len(list(policy().parameters()))], expected.mean())


def test_what_the_policys_loss_saw():
    rows = experiences()
    objective, model = PolicyLoss(tokens_per_row(rows), 0.2, 1.0), policy()
    for part in Ragged(rows).split(1):
        objective(model, part)
    log_probs, _ = answer_log_probs(model, ROLLOUTS, 1.0, CPU)
    ratio = (log_probs - torch.from_numpy(np.concatenate([r.log_probs for r in rows]))).exp()
    assert objective.seen() == pytest.approx(
        {
            "ratio_deviation": (ratio - 1).abs().max().item(),
            "clipped": ((ratio - 1).abs() > 0.2).sum().item(),
            "divergence": (ratio - 1 - ratio.log()).sum().item(),
        }
    )
    assert 0 < objective.seen()["clipped"] < len(ratio)


def test_a_small_divergence_is_no_rounding():
    """x²/2 of log-ratios that are less than float32 tells apart from 1."""
    model = policy().float()
    with torch.no_grad():
        now = answer_log_probs(model, ROLLOUTS, 1.0, CPU)[0].double().numpy()
    steps = np.where(np.arange(len(now)) % 2, 3e-8, -2e-6)
    parts = np.split(now - steps, np.cumsum([len(row.answer) for row in ROLLOUTS])[:-1])
    rows = [Experience(rollout, old, 0 * old) for rollout, old in zip(ROLLOUTS, parts, strict=True)]
    objective = PolicyLoss(tokens_per_row(rows), 0.2, 1.0)
    objective(model, Ragged(rows))
    # What the loss sees of the steps is rounded to float32.
    seen = np.float32(now) - np.float32(now - steps)
    assert objective.seen()["divergence"] == pytest.approx((seen**2 / 2).sum(), rel=1e-2)
    assert objective.seen()["divergence"] > 0
