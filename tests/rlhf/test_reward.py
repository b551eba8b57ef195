"""The loss of comparisons, their batches, and what a model learns from them."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from torch import nn

from gqa_kernels.backends import get_backend
from llama2 import parallel
from llama2.checkpoint import SHIPPED
from llama2.config import ModelConfig
from llama2.rlhf.comparisons import RATINGS, margin_of, parse_comparison
from llama2.rlhf.ragged import Ragged
from llama2.rlhf.reward import (
    Pair,
    PairBatches,
    differences,
    encode_pair,
    evaluate,
    ranking_loss,
    score_pairs,
    with_margins,
)
from llama2.scalar_model import ScalarModel
from llama2.tokenizer import Tokenizer
from llama2.train.distributed import Sharded, make_mesh
from llama2.train.execution import OneProcess
from llama2.train.pretrain import TrainConfig, make_optimizer, train_step

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=24,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=32,
)
SLIGHTLY, SIGNIFICANTLY = "slightly better", "significantly better"


class LastToken(nn.Module):
    """Scores each token by a table alone, and all that is not a last token as NaN."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float32))
        self.rope = SimpleNamespace(cos=torch.zeros(1))

    def forward(self, tokens, *, cu_seqlens):
        last = torch.zeros(tokens.shape, dtype=torch.bool)
        last[0, cu_seqlens[1:] - 1] = True
        return self.table[tokens].where(last, torch.nan)


def pair(chosen, rejected, rating=None, **more):
    """Of ids."""
    return Pair(np.array(chosen, np.int32), np.array(rejected, np.int32), rating, **more)


def rows(*pairs):
    return Ragged(pairs)


def make_model(dtype=torch.float32, backend="eager"):
    torch.manual_seed(0)
    model = ScalarModel(MODEL, get_backend(backend)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # scores far from equal
    return model


def make_pairs(count=11, seed=0, ratings=RATINGS):
    """Of unequal lengths."""
    rng = np.random.default_rng(seed)

    def draw():
        return rng.integers(40, size=rng.integers(1, 33)).astype(np.int32)

    pairs = [Pair(draw(), draw(), ratings[n % len(ratings)]) for n in range(count)]
    return with_margins(pairs, "small")


def test_margins_are_the_papers():
    """Table 27."""
    assert [margin_of(rating, "large") for rating in RATINGS] == [3, 2, 1, 0]
    small = [margin_of(rating, "small") for rating in RATINGS]
    assert small == [pytest.approx(margin / 3, abs=1e-16) for margin in (3, 2, 1, 0)]
    assert [margin_of(rating, "none") for rating in (*RATINGS, None)] == [0] * 5
    with pytest.raises(
        ValueError, match=r"rating: expected one of .* with margins small; got none"
    ):
        margin_of(None, "small")
    with pytest.raises(ValueError, match="margins: expected one of none, small, large; got 'big'"):
        margin_of("better", "big")


def test_an_answer_is_encoded_with_its_end(tmp_path):
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model")
    line = {"prompt": "q", "chosen": " yes\n", "rejected": "no", "rating": "better"}
    comparison = parse_comparison(json.dumps(line).encode(), tmp_path, 1)
    found = encode_pair(tokenizer, comparison, "chat", 256)
    assert found.chosen.tolist() == tokenizer.encode("[INST] q [/INST] yes ", bos=True, eos=True)
    assert found.rejected.tolist() == tokenizer.encode("[INST] q [/INST] no ", bos=True, eos=True)
    assert found.rating == "better" and found.chosen.dtype == np.int32
    separated = encode_pair(tokenizer, comparison, "separator", 256)
    asked = [*tokenizer.encode("q", bos=True), tokenizer.bos_id]
    assert separated.rejected.tolist() == asked + tokenizer.encode("no", bos=False, eos=True)
    size = max(len(found.chosen), len(found.rejected))
    assert encode_pair(tokenizer, comparison, "chat", size).chosen.tolist() == found.chosen.tolist()
    longer = "chosen" if len(found.chosen) == size else "rejected"
    with pytest.raises(ValueError, match=f"{longer}: .* at most {size - 1} tokens; got {size}"):
        encode_pair(tokenizer, comparison, "chat", size - 1)


# Scores by a token's id, powers of two apart so that no difference is rounded.
SCORES = [0.0, 1.0, -2.5, 8.0, -128.0, 4096.0, 0.0]


@pytest.mark.parametrize("margins", ["none", "small", "large"])
def test_the_loss_is_the_papers(margins):
    """−log σ(r_c − r_r − m) = log(1 + exp(m − (r_c − r_r))), also where exp overflows float32."""
    cases = [(c, r, rating) for c in range(7) for r in range(7) for rating in RATINGS]
    pairs = [pair([3, 2, c], [4, r], rating) for c, r, rating in cases]
    model = LastToken(SCORES)
    for one, (c, r, rating) in zip(with_margins(pairs, margins), cases, strict=True):
        margin = {"none": 0.0, "small": 1 / 3, "large": 1.0}[margins] * (3 - RATINGS.index(rating))
        gap = margin - (SCORES[c] - SCORES[r])
        expected = max(gap, 0) + math.log1p(math.exp(-abs(gap)))
        # The loss grows no faster than its argument, which has the roundings of margin and sum.
        tolerance = 2**-24 * (2 * margin + abs(gap) + 4 * expected)
        found = ranking_loss(model, rows(one))
        assert found.dtype == torch.float32
        assert abs(found.item() - expected) <= tolerance
        (gradient,) = torch.autograd.grad(found, model.table)
        slope = -1 / (1 + math.exp(min(-gap, 700)))  # of the loss by the chosen score
        wanted = np.zeros(7)
        wanted[c] += slope
        wanted[r] -= slope
        assert np.abs(gradient.numpy() - wanted).max() <= 2**-24 * (2 + abs(gap) + 2 * margin)
    losses = [ranking_loss(model, rows(one)).item() for one in with_margins(pairs, margins)]
    together = ranking_loss(model, rows(*with_margins(pairs, margins))).item()
    assert together == pytest.approx(np.mean(losses), rel=1e-6)


def test_packed_pairs_have_the_scores_that_each_answer_has_alone():
    """Within twice the error of scores in float32 that are computed alone."""
    pairs, model, exact = make_pairs(), make_model(), make_model(torch.float64)

    def alone(model, ids):
        return model(torch.from_numpy(ids.astype(np.int64))[None])[0, -1].item()

    answers = [ids for one in pairs for ids in (one.chosen, one.rejected)]
    with torch.no_grad():
        chosen, rejected = score_pairs(model, rows(*pairs))
        wanted = np.array([alone(exact, ids) for ids in answers])
        error = np.abs([alone(model, ids) for ids in answers] - wanted).max()
    assert chosen.dtype == rejected.dtype == torch.float32 and len(chosen) == len(pairs)
    found = torch.stack([chosen, rejected], 1).flatten().double().numpy()
    assert np.ptp(wanted) > 0.5  # no tolerance hides a mixed-up order
    assert np.abs(found - wanted).max() <= 2 * error + 2**-24 * np.abs(wanted).max()


def test_epochs_have_every_pair_once_in_another_order():
    pairs = make_pairs(11)
    numbers = {id(one.chosen): number for number, one in enumerate(pairs)}
    data = PairBatches(pairs, batch_size=4, epochs=2.5, seed=3)
    assert data.steps == 7  # of 28 pairs
    batches = [data.batch(step) for step in range(data.steps)]
    assert all(len(batch) == 4 for batch in batches)
    order = [numbers[id(one.chosen)] for batch in batches for one in batch.items if one.weight]
    assert sorted(order[:11]) == sorted(order[11:22]) == list(range(11)) != order[:11]
    assert order[:11] != order[11:22] and len(order) == 28
    again = PairBatches(pairs, batch_size=4, epochs=2.5, seed=3)
    third = zip(again.batch(3).items, batches[3].items, strict=True)
    assert all(one.chosen is two.chosen for one, two in third)
    assert again.identity() == data.identity()
    otherwise = PairBatches(pairs, batch_size=4, epochs=1, seed=4)
    assert [numbers[id(one.chosen)] for one in otherwise.batch(0).items] != order[:4]
    for changed in (
        with_margins(pairs, "large"),
        [replace(pairs[0], chosen=pairs[0].chosen + 1), *pairs[1:]],
        [replace(pairs[0], rejected=pairs[0].rejected + 1), *pairs[1:]],
    ):
        other = PairBatches(changed, batch_size=4, epochs=2.5, seed=3)
        assert other.identity() != data.identity()
    with pytest.raises(ValueError, match="epochs: expected a positive number"):
        PairBatches(pairs, batch_size=4, epochs=0, seed=0)
    with pytest.raises(ValueError, match="pairs: expected at least one; got none"):
        PairBatches([], batch_size=4, epochs=1, seed=0)


def step_of(micro_batch_size, execution=None, model=None):
    """A step on a last batch: 5 pairs and 3 places that are filled up."""
    config = TrainConfig(
        steps=1,
        batch_size=8,
        seq_len=32,
        peak_lr=1e-2,
        warmup_steps=0,
        max_grad_norm=1e9,
        micro_batch_size=micro_batch_size,
    )
    model = make_model() if model is None else model
    data = PairBatches(make_pairs(5), batch_size=8, epochs=1, seed=0)
    loss, norm = train_step(
        model,
        make_optimizer(model, config),
        data.batch(0),
        0,
        config,
        worker=model,
        objective=ranking_loss,
        execution=execution or OneProcess(),
    )
    return loss, norm, model


def test_micro_batches_and_filling_do_not_change_a_step():
    """The loss and gradients are the means over the pairs, each computed by itself."""
    model, pairs = make_model(), make_pairs(5)
    losses = [ranking_loss(model, rows(one)) for one in pairs]
    mean = sum(losses) / 5
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert max(losses) - min(losses) > 0.1  # the mean is no other of their mixtures
    for size in (None, 4, 1):
        loss, found, trained = step_of(size)
        assert loss == pytest.approx(mean.item(), rel=1e-6)
        assert found == pytest.approx(norm, rel=1e-5)
        for gradient, parameter in zip(gradients, trained.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6 * norm)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_accuracy_is_counted_by_rating(batch_size):
    """A tie is wrong."""
    pairs = [
        pair([0, 1], [2], SIGNIFICANTLY),  # 3.5
        pair([3], [1], SIGNIFICANTLY),  # 7
        pair([2], [0], SLIGHTLY),  # -2.5
        pair([0], [5, 6]),  # 0
    ]
    model = LastToken(SCORES)
    found = evaluate(model, pairs, batch_size=batch_size, execution=OneProcess())
    assert model.training
    assert (found["pairs"], found["correct"], found["accuracy"]) == (4, 2, 0.5)
    assert found["mean_difference"] == 2.0
    losses = [math.log1p(math.exp(-gap)) for gap in (3.5, 7, -2.5, 0)]
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-12)
    by_rating = found["by_rating"]
    assert list(by_rating) == [SIGNIFICANTLY, SLIGHTLY, "unrated"]
    assert by_rating[SIGNIFICANTLY]["accuracy"] == 1
    assert by_rating[SIGNIFICANTLY]["mean_difference"] == 5.25
    assert by_rating[SLIGHTLY]["loss"] == pytest.approx(losses[2], rel=1e-12)
    assert (by_rating["unrated"]["pairs"], by_rating["unrated"]["correct"]) == (1, 0)
    json.dumps(found)


def more_low_tokens(count, seed):
    """Pairs whose chosen answer has more tokens below 20, by how many as the rating says."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < count:
        one, other = rng.integers(40, size=(2, 8), dtype=np.int32)
        gap = int((one < 20).sum()) - int((other < 20).sum())
        if gap:
            better, worse = (one, other) if gap > 0 else (other, one)
            pairs.append(Pair(better, worse, RATINGS[4 - min(abs(gap), 4)]))
    return pairs


def learnt(margins):
    """The evaluation on held-out pairs of a model that has seen others."""
    torch.manual_seed(0)
    model = ScalarModel(replace(MODEL, num_layers=1), get_backend("eager"))
    sizes = {"batch_size": 32, "seed": 0}
    config = TrainConfig(steps=30, seq_len=8, peak_lr=1e-2, warmup_steps=5, **sizes)
    data = PairBatches(with_margins(more_low_tokens(320, 1), margins), epochs=3, **sizes)
    assert data.steps == config.steps
    optimizer = make_optimizer(model, config)
    for step in range(config.steps):
        batch = data.batch(step)
        train_step(model, optimizer, batch, step, config, objective=ranking_loss)
    held_out = more_low_tokens(100, 2)
    return evaluate(model, held_out, batch_size=50, execution=OneProcess())


def test_a_preference_is_learnt_and_a_margin_parts_scores_further():
    none, large = map(learnt, ("none", "large"))
    assert min(none["accuracy"], large["accuracy"]) > 0.9
    assert large["mean_difference"] > none["mean_difference"]
    apart = [large["by_rating"][rating]["mean_difference"] for rating in RATINGS]
    assert apart == sorted(apart, reverse=True)


def test_scores_part_as_far_as_their_margins_ask():
    """Four pairs of tokens, one of each rating, after as many steps of gradient descent."""
    gaps = {}
    for margins in ("none", "small", "large"):
        model = LastToken([0.0] * 8)
        pairs = [pair([n], [n + 4], rating) for n, rating in enumerate(RATINGS)]
        batch = rows(*with_margins(pairs, margins))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(200):
            optimizer.zero_grad()
            ranking_loss(model, batch).backward()
            optimizer.step()
        chosen, rejected = score_pairs(model, batch)
        gaps[margins] = (chosen - rejected).tolist()
    none, small, large = gaps.values()
    assert none == [none[0]] * 4 and none[0] > 1
    assert small == sorted(small, reverse=True) and large == sorted(large, reverse=True)
    for n in range(3):
        assert none[n] + 0.1 < small[n] < large[n] - 0.1
    assert none[3] == small[3] == large[3]


def several_processes():
    expected, norm, trained = step_of(None)
    scores = differences(trained, make_pairs(), batch_size=2, execution=OneProcess())
    weights = [parameter.detach() for parameter in trained.parameters()]
    for tp in (1, 2):
        mesh = make_mesh("cpu", tp)
        execution = Sharded(mesh)
        for size in (None, 1):
            model = parallel.parallelize(make_model(), mesh)
            loss, found, model = step_of(size, execution, model)
            assert loss == pytest.approx(expected, rel=1e-6)
            assert found == pytest.approx(norm, rel=1e-5)
        other = differences(model, make_pairs(), batch_size=2, execution=execution)
        torch.testing.assert_close(other, scores, rtol=1e-4, atol=1e-4)
        for one, two in zip(weights, model.parameters(), strict=True):
            two = two.full_tensor() if hasattr(two, "full_tensor") else two
            torch.testing.assert_close(two.detach(), one, rtol=1e-3, atol=1e-4)


def test_processes_do_not_change_a_step_nor_an_evaluation():
    """FSDP and tensor parallelism on two ranks."""
    ranks.run({"several processes": several_processes}, world_size=2)


def test_the_kernels_compute_the_same_loss():
    """Both backends, within the roundings of float32."""
    pairs = [pair([3, 4, 5, 6], [1, 2], margin=0.5), pair([7], [8, 9, 10], margin=1.0)]
    exact = ranking_loss(make_model(torch.float64), rows(*pairs)).item()
    for backend in ("eager", "triton"):
        loss = ranking_loss(make_model(torch.float32, backend), rows(*pairs)).item()
        assert loss == pytest.approx(exact, rel=1e-5)
