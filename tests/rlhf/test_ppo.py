"""The loop of PPO on a tiny policy whose answers a function rewards."""

import math
from dataclasses import replace
from statistics import fmean

import pytest
import tiny_ppo
import torch
from tiny_ppo import CONFIG, EOS, wanted

from llama2.rlhf import ppo, ppo_losses
from llama2.rlhf.ppo_losses import PolicyLoss, ValueLoss, tokens_per_row
from llama2.rlhf.ragged import Ragged
from llama2.rlhf.rollouts import Judge
from llama2.train.execution import OneProcess
from llama2.train.state import read_log

LEARNS = replace(CONFIG, iterations=10, batch_size=32, lr=4e-3)


def train(folder, config=CONFIG, reward=wanted, *, actors=None, **options):
    actors = actors or tiny_ppo.actors(config, reward)
    questions, sampler = tiny_ppo.questions(config), tiny_ppo.sampler(config)
    return ppo.train(actors, questions, sampler, config, folder, **options), actors


def without_seconds(log):
    return [{key: line[key] for key in line if "seconds" not in key} for line in log]


def same(one, other):
    return all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_size": 4}, {"bf16": True}, {"temperature": 0.8}, {"group_size": 4}],
    ids=str,
)
def test_before_the_first_step_the_ratio_is_one_to_the_bit(changes, tmp_path):
    """One step per iteration is the first of each: nothing is clipped, nothing has moved. And the
    reference is where the policy begins."""
    log, _ = train(tmp_path, replace(CONFIG, mini_batch_size=16, **changes))
    for line in log:
        assert line["first_ratio_deviation"] == line["clip_fraction"] == line["approx_kl"] == 0.0
        assert line["gathers"] == 0
    assert log[0]["kl"] == log[0]["kl_k3_per_token"] == 0.0 < log[0]["entropy"] < math.log(24)
    assert log[1]["kl"] != 0.0 < log[1]["kl_k3_per_token"]


def test_old_log_probs_are_of_the_micro_batches_of_training(tmp_path, monkeypatch):
    found, places = [], []
    for module in (ppo, ppo_losses):
        exact = module.answer_log_probs

        def noted(model, part, *args, exact=exact, name=module.__name__):
            found.append((name, id(model), [tuple(rollout.ids) for rollout in part]))
            return exact(model, part, *args)

        monkeypatch.setattr(module, "answer_log_probs", noted)
    _, actors = train(tmp_path, replace(CONFIG, iterations=1, micro_batch_size=2))
    for module in (ppo, ppo_losses):
        names = (module.__name__, id(actors.policy))
        places.append([ids for *place, ids in found if tuple(place) == names])
    assert places[0] == places[1] and len(places[0]) == 8


def test_later_mini_batches_have_other_ratios(tmp_path):
    log, _ = train(tmp_path)
    assert log[0]["first_ratio_deviation"] == 0.0 < log[0]["approx_kl"]
    assert 0.0 < log[0]["clip_fraction"] < 0.5  # of the second half of the batch


def test_a_forward_pass_that_does_not_repeat_its_bits_is_an_error(tmp_path, monkeypatch):
    exact = ppo.answer_log_probs

    def off(*args):
        log_probs, entropies = exact(*args)
        return log_probs + 2**-20, entropies

    monkeypatch.setattr(ppo, "answer_log_probs", off)
    with pytest.raises(FloatingPointError, match=r"0: expected ratios .* at most 0 before"):
        train(tmp_path)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("group_size", [0, 4])
def test_the_reward_rises_and_the_penalty_keeps_the_policy_near(group_size, tmp_path):
    """By as much as under other seeds too; and the critic, where there is one, learns."""
    kl, reward = {}, {}
    for kl_weight in (0.0, 0.5):
        config = replace(LEARNS, kl_weight=kl_weight, group_size=group_size)
        log, _ = train(tmp_path / str(kl_weight), config)
        kl[kl_weight] = log[-1]["kl"]
        reward[kl_weight] = fmean(line["reward"] for line in log[-3:]) - log[0]["reward"]
        if not group_size:
            assert abs(log[0]["explained_variance"]) < 0.05
            assert max(line["explained_variance"] for line in log) > 0.1
    assert reward[0.0] > 1.0 > reward[0.5] > 0.2
    assert kl[0.0] > 2 * kl[0.5] > 0


def test_neither_loss_moves_the_other_model(tmp_path):
    config, actors = CONFIG, tiny_ppo.actors(CONFIG)
    loop = ppo._Loop(
        actors, tiny_ppo.questions(config), tiny_ppo.sampler(config), config, OneProcess()
    )
    loop.iteration(0)  # the optimiser has moments of both
    rollouts = loop.sampler(actors.policy, loop.questions.batch(1), 1)
    rows = ppo.experiences(loop._measured(rollouts), config)[: config.mini_batch_size]
    per_row = tokens_per_row(rows)
    for name, other, objective in (
        ("policy", "critic", PolicyLoss(per_row, 0.2, 1.0)),
        ("critic", "policy", ValueLoss(per_row, 0.2)),
    ):
        own = [weight.clone() for weight in loop.trained[name].parameters()]
        others = [weight.clone() for weight in loop.trained[other].parameters()]
        loop._step(name, Ragged(rows), 0, objective)
        assert all(weight.grad is None for weight in loop.trained[other].parameters())
        assert all(map(torch.equal, others, loop.trained[other].parameters()))
        assert not any(map(torch.equal, own, loop.trained[name].parameters()))
    ids = [{id(x) for x in model.parameters()} for model in (actors.policy, actors.critic)]
    assert not ids[0] & ids[1]


def test_answers_that_are_cut_are_kept(tmp_path):
    seen = []

    def reward(sequences):
        seen.extend(sequences)
        return wanted(sequences)

    log, _ = train(tmp_path, replace(CONFIG, iterations=1, max_new_tokens=3), reward)
    assert len(seen) == CONFIG.batch_size
    cut = [ids for ids in seen if ids[-1] != EOS]
    assert log[0]["cut"] == len(cut) / len(seen) > 0 and log[0]["answer_tokens_max"] == 3


def test_answers_to_one_prompt_follow_each_other_and_differ():
    config = replace(CONFIG, group_size=4)
    questions = tiny_ppo.questions(config).batch(1)
    rollouts = tiny_ppo.sampler(config)(tiny_ppo.policy(), questions, 1)
    assert [rollout.prompt for rollout in rollouts] == [q.ids for q in questions for _ in range(4)]
    assert len({tuple(rollout.answer) for rollout in rollouts[:4]}) > 1
    again = tiny_ppo.sampler(config)(tiny_ppo.policy(), questions, 1)
    later = tiny_ppo.sampler(config)(tiny_ppo.policy(), questions, 2)
    assert [x.answer for x in again] == [x.answer for x in rollouts] != [x.answer for x in later]


def test_among_answers_of_equal_rewards_there_is_nothing_to_learn(tmp_path):
    """Nor is anything divided by their spread, which is 0."""
    config = replace(CONFIG, group_size=4, kl_weight=0.0)
    log, actors = train(tmp_path, config, lambda sequences: [0.7] * len(sequences))
    assert [line["grad_norm"] for line in log] == [0.0, 0.0]
    assert actors.policy.norm.weight.equal(tiny_ppo.policy().norm.weight)  # it does not decay


def test_a_run_that_was_stopped_has_the_same_bits(tmp_path):
    config = replace(CONFIG, iterations=4)
    expected, whole = train(tmp_path / "whole", config)
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt, match="saved after iteration 2 of 4"):
        train(tmp_path / "cut", config, asked_to_stop=lambda: next(asked))
    log, resumed = train(tmp_path / "cut", config)
    assert without_seconds(log) == without_seconds(expected)
    assert same(whole.policy, resumed.policy) and same(whole.critic, resumed.critic)


def test_an_iteration_that_fails_is_done_again_from_its_beginning(tmp_path, monkeypatch):
    config = replace(CONFIG, iterations=3)
    expected, whole = train(tmp_path / "whole", config)
    step, calls = ppo.train_step, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 7:  # of the second iteration's four, the third
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(ppo, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", config, save_every=1)
    monkeypatch.setattr(ppo, "train_step", step)
    log, resumed = train(tmp_path / "cut", config, save_every=1)
    assert without_seconds(log) == without_seconds(expected) and same(whole.policy, resumed.policy)


def failing(kind):
    """A reward, and models, of which something is not finite from the second iteration on."""
    calls = []

    def reward(sequences):
        calls.append(None)
        late = len(calls) > CONFIG.batch_size // CONFIG.mini_batch_size
        return [math.nan] * len(sequences) if late and kind == "reward" else wanted(sequences)

    return reward


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("reward", r"iteration 1: expected every score of the helpfulness .* got 16 of 16"),
        ("policy", r"iteration 1: model: expected finite logits; got NaN or infinity"),
        ("reference", "iteration 1: expected every log-probability of the reference"),
        ("critic", "iteration 1: expected every value of the critic"),
        ("gradient", "policy: step 2: expected a finite loss and gradient norm"),
    ],
)
def test_what_is_not_finite_is_refused_and_never_saved(kind, message, tmp_path, monkeypatch):
    actors = tiny_ppo.actors(CONFIG, failing(kind))
    step, calls = ppo.train_step, []

    def poisoned(*args):
        found = step(*args)
        calls.append(args)
        if len(calls) == 4 and kind in ("policy", "reference", "critic"):  # the first iteration's
            with torch.no_grad():
                getattr(actors, kind).norm.weight.fill_(math.nan)
        return found

    monkeypatch.setattr(ppo, "train_step", poisoned)
    if kind == "gradient":
        seen = ppo.PolicyLoss.__call__
        monkeypatch.setattr(
            ppo.PolicyLoss,
            "__call__",
            lambda *args: seen(*args) * (math.nan if len(calls) >= 4 else 1.0),
        )
    elif kind != "reward":
        save = OneProcess.save

        def saved(self, folder, model, optimizer, number, identity):
            """What was poisoned after the last step is no part of the first iteration's state."""
            if kind != "reference":
                getattr(actors, kind).norm.weight.data.fill_(1.0)
            save(self, folder, model, optimizer, number, identity)
            getattr(actors, kind).norm.weight.data.fill_(math.nan)

        monkeypatch.setattr(OneProcess, "save", saved)
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, CONFIG, actors=actors, save_every=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 1 and len(read_log(tmp_path / "log.jsonl")) == 1
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_the_safety_reward_counts_where_the_paper_says(tmp_path):
    safe = -1.0  # σ(−1) = 0.27 is above 0.15, σ(−2) is not
    judge = Judge(wanted, lambda sequences: [safe] * len(sequences))
    for safe, counts in ((-1.0, "reward_helpful"), (-2.0, "reward_safety")):
        actors = replace(tiny_ppo.actors(CONFIG), judge=judge)
        log, _ = train(tmp_path / str(safe), replace(CONFIG, iterations=1), actors=actors)
        assert log[0]["reward"] == log[0][counts] and log[0]["reward_safety"] == safe


def test_a_critic_is_there_or_not():
    config = replace(CONFIG, group_size=4)
    with pytest.raises(
        ValueError, match="critic: expected a critic if and only if group_size is 0"
    ):
        ppo._Loop(
            tiny_ppo.actors(CONFIG),
            tiny_ppo.questions(config),
            tiny_ppo.sampler(config),
            config,
            OneProcess(),
        )
