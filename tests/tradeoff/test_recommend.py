"""The rule against a search by hand, and what the reasons and refusals must name."""

from dataclasses import replace

import pytest

from llama2 import PUBLISHED
from llama2.accounting import head_counts, matched, num_parameters
from llama2.tradeoff import recommend as rule
from llama2.tradeoff.question import LEAST_SHARE, Question
from llama2.tradeoff.roofline import GIB, GPUS, Deployment

SEVEN, THIRTEEN, SEVENTY = (PUBLISHED[size] for size in ("7B", "13B", "70B"))
H200, H100, RTX_4090 = GPUS["H200"], GPUS["H100"], GPUS["RTX 4090"]


def recommend(*arguments, **options):
    return rule.recommend(Question(*arguments, **options))


@pytest.mark.parametrize("least", [0, LEAST_SHARE, 0.5])
@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("batch", [None, 1, 8, 60])
@pytest.mark.parametrize("context", [200, 4096])
def test_the_most_heads_that_keep_the_speed(context, batch, keep, least):
    rates = {}
    for count in head_counts(SEVEN):
        deployment = Deployment(matched(SEVEN, count, "same_ffn"), H100)
        largest = deployment.largest_batch(context)
        if largest >= (batch or 1):
            rates[count] = deployment.decode_tokens_per_s(batch or largest, context)
    considered = {count: rate for count, rate in rates.items() if count >= least * 32}
    kept = [n for n, rate in considered.items() if rate >= keep * max(considered.values())]
    found = recommend(SEVEN, H100, context=context, batch=batch, keep=keep, least_share=least)
    assert found.num_kv_heads == max(kept)
    assert [c.num_kv_heads for c in found.candidates] == list(head_counts(SEVEN))
    assert {c.num_kv_heads for c in found.candidates if c.verdict == "fits"} == set(rates)
    assert {c.num_kv_heads: c.tokens_per_s for c in found.candidates if c.tokens_per_s} == rates


def test_every_answer_can_be_had():
    """From MHA, where weights are all that is read, to MQA, where the cache is."""
    assert recommend(SEVEN, H200, context=128, batch=1).num_kv_heads == 32
    assert recommend(SEVEN, H200, context=1024, batch=8).num_kv_heads == 16
    assert recommend(SEVEN, H200, context=4096, batch=8).num_kv_heads == 8
    assert recommend(SEVEN, H200, context=4096).num_kv_heads == 4
    assert recommend(SEVEN, H200, context=4096, least_share=1 / 16).num_kv_heads == 2
    assert recommend(SEVEN, H200, context=4096, least_share=0).num_kv_heads == 1


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("batch", [None, 1, 32])
def test_the_default_rule_stays_where_quality_was_looked_at(config, tp, batch):
    """The study's smallest share, that of the GQA paper, and that of Llama 2 70B."""
    assert LEAST_SHARE == 1 / 8 == 8 / 64 == PUBLISHED["70B"].num_kv_heads / 64
    question = Question(config, GPUS["B200"], 4096, batch, tp)
    chosen = rule.pick(question, rule.candidates(question))
    assert chosen is None or chosen.share >= 1 / 8


def test_speed_up_is_over_mha_at_the_same_batch_even_where_it_does_not_fit():
    found = recommend(SEVEN, H100, context=4096, batch=100)
    mha = Deployment(SEVEN, H100)
    assert mha.largest_batch(4096) < 100
    assert found.candidates[-1].speed_up is found.candidates[-1].tokens_per_s is None
    speed = Deployment(matched(SEVEN, 4, "same_ffn"), H100).decode_tokens_per_s(100, 4096)
    four = found.candidates[2]
    assert four.speed_up == speed / mha.decode_tokens_per_s(100, 4096)
    assert four.share == 1 / 8


@pytest.mark.parametrize("batch", [None, 16])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_never_fewer_heads_than_ranks(tp, batch):
    found = recommend(SEVENTY, H100, context=4096, batch=batch, tp=tp, keep=1.0, least_share=0)
    assert found.num_kv_heads == tp


def test_heads_that_ranks_cannot_share_are_listed_and_not_chosen():
    found = recommend(THIRTEEN, H100, context=4096, batch=16, tp=4)
    verdicts = {c.num_kv_heads: c.verdict for c in found.candidates}
    shared = {count for count, verdict in verdicts.items() if verdict != "cannot be shared by tp"}
    assert shared == {1, 2, 4, 8, 20, 40}
    assert found.num_kv_heads in shared
    unshared = next(c for c in found.candidates if c.num_kv_heads == 5)
    assert unshared.parameters == num_parameters(matched(THIRTEEN, 5, "same_ffn"))
    assert unshared.tokens_per_s is unshared.largest_batch is None


def test_reasons_name_the_numbers():
    found = recommend(SEVENTY, H100, context=4096, batch=32, tp=8)
    chosen, above, below = (
        next(c for c in found.candidates if c.num_kv_heads == count) for count in (8, 16, 4)
    )
    text = " ".join(found.reasons)
    for needed in (
        f"8 key/value heads: {chosen.tokens_per_s:,.0f} tokens/s at batch 32",
        f"16 key/value heads: {above.tokens_per_s:,.0f} tokens/s",
        f"4 key/value heads: {below.tokens_per_s:,.0f} tokens/s",
        f"a batch of {chosen.crossover_batch:,} on",
        f"{chosen.largest_batch:,} sequences of 4,096 tokens fit",
        "each of 8 ranks holds 1 of the key/value heads",
        "from as large a cache",
        "Predicted from the nominal rates of H100 SXM, not measured",
        "keeps at least 1/8 of the query heads",
        "Communication is not modelled",
        "Quality is not predicted",
    ):
        assert needed in text, needed
    assert "ranks" not in " ".join(recommend(SEVEN, H200, context=9, batch=1).reasons)


def test_ends_of_the_list_have_one_neighbour():
    assert any("none, this is MHA" in r for r in recommend(SEVEN, H200, context=9, batch=1).reasons)
    fewest = recommend(SEVEN, H200, context=4096, least_share=0)
    assert any("none, this is MQA" in r for r in fewest.reasons)


def offer(message, *arguments, **options):
    with pytest.raises(ValueError, match=message) as raised:
        recommend(*arguments, **options)
    return str(raised.value)


def test_what_would_fit_fits():
    four_heads = matched(SEVEN, 4, "same_ffn")
    largest = Deployment(four_heads, RTX_4090).largest_batch(4096)
    longest = Deployment(four_heads, RTX_4090).largest_context(largest + 1)
    message = offer("context: expected", SEVEN, RTX_4090, context=4096, batch=largest + 1)
    assert f"a context of {longest:,} at batch {largest + 1:,}" in message
    assert f"a batch of {largest:,} at context 4,096" in message
    assert "tp=2" in message
    assert "2 heads, below the least share" in message
    assert recommend(SEVEN, RTX_4090, context=4096, batch=largest).num_kv_heads == 4
    assert recommend(SEVEN, RTX_4090, context=longest, batch=largest + 1).num_kv_heads == 4
    fewer = recommend(SEVEN, RTX_4090, context=4096, batch=largest + 1, least_share=1 / 16)
    assert fewer.num_kv_heads == 2
    assert recommend(SEVEN, RTX_4090, context=4096, batch=largest + 1, tp=2).num_kv_heads >= 1


def test_weights_that_do_not_fit_ask_for_ranks():
    message = offer("context: expected", SEVENTY, H100, context=4096)
    assert "a context of" not in message
    assert message.endswith("what would fit: tp=2")
    recommend(SEVENTY, H100, context=4096, tp=2)
    tiny = replace(H100, memory_bytes=4 * GIB)
    assert "what would fit" not in offer("context: expected", SEVENTY, tiny, context=4096)


def test_arguments_out_of_range():
    for keep in (0, 1.1):
        offer(
            rf"keep: expected a number in \(0, 1\]; got {keep}", SEVEN, H200, context=9, keep=keep
        )
    offer("least_share: expected .*; got 2", SEVEN, H200, context=9, least_share=2)
    offer("batch: expected at least 1, .*; got 0", SEVEN, H200, context=9, batch=0)
    offer("context: expected at least 1; got 0", SEVEN, H200, context=0)
    offer(r"tp: expected a divisor of num_q_heads \(32\); got 3", SEVEN, H200, context=9, tp=3)
