"""A deployment against a table made by hand, and against what must hold of every one."""

from dataclasses import replace

import pytest
import torch
from small_llama import small_config

from llama2 import PUBLISHED
from llama2.accounting import (
    attention_flops_per_pair,
    flops_per_token,
    head_counts,
    kv_bytes_per_token,
    kv_parameters,
    matched,
    num_parameters,
)
from llama2.cache.kv_cache import CACHE_DTYPES, KeyValues
from llama2.tradeoff.roofline import CACHE_FORMATS, GIB, GPUS, CacheFormat, Deployment, Gpu

SEVEN, SEVENTY = PUBLISHED["7B"], PUBLISHED["70B"]
# An H200 with the memory that CUDA reports.
H200 = replace(GPUS["H200"], memory_bytes=139 * GIB)


def seven(num_kv_heads, **changes):
    return Deployment(matched(SEVEN, num_kv_heads, "same_ffn"), H200, **changes)


# Weights + batch · 4096 · KV bytes, at 4.8 TB/s, in 139 GiB less 4 GiB.
@pytest.mark.parametrize(
    ("num_kv_heads", "kib", "largest", "one", "thirty_two", "most"),
    [
        (32, 512, 61, 307, 1_869, 2_027),
        (8, 128, 247, 387, 5_288, 8_206),
        (4, 64, 496, 405, 7_609, 16_449),
        (1, 16, 1_990, 419, 11_341, 65_902),
    ],
)
def test_7b_on_an_h200(num_kv_heads, kib, largest, one, thirty_two, most):
    deployment = seven(num_kv_heads)
    assert deployment.kv_bytes_per_token_per_rank == kib * 1024
    assert deployment.largest_batch(4096) == largest
    rates = [deployment.decode_tokens_per_s(batch, 4096) for batch in (1, 32, largest)]
    assert [round(rate) for rate in rates] == [one, thirty_two, most]
    assert deployment.bound(largest, 4096) == "bandwidth"


def test_the_gpus_are_not_those_of_another_unit():
    """Flops per byte of the memory's traffic: hundreds on every card of these generations."""
    for gpu in GPUS.values():
        assert 100 < gpu.flops_per_s / gpu.bytes_per_s < 500
        assert 20 * GIB < gpu.memory_bytes < 200 * GIB
        assert gpu.source


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("num_kv_heads", [1, 8, 32])
def test_at_the_crossover_the_cache_outweighs_the_weights(num_kv_heads, batch):
    deployment = seven(num_kv_heads)
    weights = deployment.weight_bytes_per_rank

    def cache(batch, context):
        return batch * context * deployment.kv_bytes_per_token_per_rank

    context = deployment.crossover_context(batch)
    assert cache(batch, context) >= weights > cache(batch, context - 1)
    batch = deployment.crossover_batch(context)
    assert cache(batch, context) >= weights > cache(batch - 1, context)


@pytest.mark.parametrize("context", [1, 300, 4096])
def test_the_largest_batch_fits_and_one_more_does_not(context):
    deployment = seven(8)
    largest = deployment.largest_batch(context)
    sequence = context * deployment.kv_bytes_per_token_per_rank
    assert largest * sequence <= deployment.cache_bytes_per_rank < (largest + 1) * sequence
    longest = deployment.largest_context(largest)
    assert longest >= context
    assert deployment.largest_batch(longest) >= largest > deployment.largest_batch(longest + 1)


def test_nothing_fits_beside_weights_that_do_not():
    deployment = Deployment(SEVENTY, GPUS["H100"])
    assert deployment.cache_bytes_per_rank < 0
    assert deployment.largest_batch(1) == deployment.largest_context(1) == 0


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16, 32])
def test_heads_of_a_rank(num_kv_heads, tp):
    config = matched(SEVEN, num_kv_heads, "same_ffn")
    deployment = Deployment(config, H200, tp)
    heads = max(1, num_kv_heads // tp)
    assert deployment.kv_heads_per_rank == heads
    assert deployment.kv_bytes_per_token_per_rank == 2 * 32 * 128 * 2 * heads
    # A rank's projections to keys and values are those of its heads, and 1 / tp of all else.
    rest = num_parameters(config) - kv_parameters(config)
    parameters = rest / tp + kv_parameters(config) / num_kv_heads * heads
    assert deployment.weight_bytes_per_rank == pytest.approx(2 * parameters, rel=1e-12)
    rest = flops_per_token(config, 100) - 2 * kv_parameters(config)
    flops = rest / tp + 2 * kv_parameters(config) / num_kv_heads * heads
    assert deployment.decode_flops(3, 100) == pytest.approx(3 * flops, rel=1e-12)


def test_fewer_heads_than_ranks_save_nothing():
    eight, one = seven(8, tp=8), seven(1, tp=8)
    assert one.kv_bytes_per_token_per_rank == eight.kv_bytes_per_token_per_rank
    assert one.decode_seconds(5, 900) == eight.decode_seconds(5, 900)
    assert one.prefill_seconds(900) == eight.prefill_seconds(900)


def test_ranks_that_cannot_share_the_heads():
    config = small_config(num_q_heads=12, num_kv_heads=6)
    for tp in (1, 2, 3, 6, 12):
        assert Deployment(config, H200, tp).kv_heads_per_rank == max(1, 6 // tp)
    with pytest.raises(
        ValueError, match=r"tp: expected a multiple or a divisor of .* \(6\); got 4"
    ):
        Deployment(config, H200, 4)
    with pytest.raises(ValueError, match=r"tp: expected a divisor of num_q_heads \(12\); got 5"):
        Deployment(config, H200, 5)


def test_the_slower_of_memory_and_matrix_units_decides():
    even = Gpu("", 100 * GIB, 1e12, 1e12, "")  # a flop per byte
    for config in (SEVEN, matched(SEVEN, 1, "same_ffn")):
        slow_memory = Deployment(config, replace(even, bytes_per_s=1e6))
        slow_matrix = Deployment(config, replace(even, flops_per_s=1e6))
        traffic = num_parameters(config) * 2 + 4 * 100 * kv_bytes_per_token(config)
        assert slow_memory.bound(4, 100) == "bandwidth"
        assert slow_memory.decode_seconds(4, 100) == traffic / 1e6
        assert slow_matrix.bound(4, 100) == "compute"
        assert slow_matrix.decode_seconds(4, 100) == 4 * flops_per_token(config, 100) / 1e6


def test_prefill_is_the_sum_of_its_tokens():
    slow_matrix = Deployment(SEVEN, replace(H200, flops_per_s=1.0))
    tokens = sum(flops_per_token(SEVEN, context) for context in range(1, 301))
    without_head = tokens - 299 * 2 * SEVEN.vocab_size * SEVEN.hidden_size
    assert slow_matrix.prefill_seconds(300) == without_head
    assert slow_matrix.prefill_seconds(300, batch=3) == 3 * without_head
    slow_memory = Deployment(SEVEN, replace(H200, bytes_per_s=1.0))
    cache = 300 * kv_bytes_per_token(SEVEN)
    shared = Deployment(SEVEN, replace(H200, flops_per_s=1.0), tp=8)
    assert shared.prefill_seconds(300) == without_head / 8
    assert slow_memory.prefill_seconds(300) == 2 * num_parameters(SEVEN) + cache


def test_quantised_weights_and_cache():
    half = Deployment(SEVEN, H200, weight_bytes_per_value=0.5, cache=CacheFormat("half", 1))
    assert half.weight_bytes_per_rank == num_parameters(SEVEN) / 2
    assert half.kv_bytes_per_token_per_rank == kv_bytes_per_token(SEVEN) // 2


def test_fewer_heads_never_decode_slower():
    for batch in (1, 64):
        rates = [seven(count).decode_tokens_per_s(batch, 2000) for count in head_counts(SEVEN)]
        assert rates == sorted(rates, reverse=True)
    assert attention_flops_per_pair(SEVEN) == attention_flops_per_pair(seven(1).config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 0}, "tp: expected a positive number; got 0"),
        ({"weight_bytes_per_value": 0}, "weight_bytes_per_value: expected a positive number; .* 0"),
        ({"reserved_bytes": -1}, "reserved_bytes: expected at least 0; got -1"),
    ],
)
def test_sizes_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        seven(8, **changes)


def test_batches_and_contexts_are_positive():
    deployment = seven(8)
    for call in (deployment.largest_batch, deployment.crossover_batch, deployment.prefill_seconds):
        with pytest.raises(ValueError, match="context: expected at least 1; got 0"):
            call(0)
    for call in (deployment.largest_context, deployment.crossover_context):
        with pytest.raises(ValueError, match="batch: expected at least 1; got 0"):
            call(0)
    with pytest.raises(ValueError, match="batch: expected at least 1; got 0"):
        deployment.decode_seconds(0, 1)


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_cache_formats_are_what_a_cache_allocates(name):
    assert list(CACHE_FORMATS) == list(CACHE_DTYPES)
    config = small_config()
    dtype = CACHE_DTYPES[name] or torch.bfloat16
    parts = KeyValues.zeros(config, (1, 1), dtype, "cpu")
    stored = sum(part.nbytes for part in parts if part is not None)
    deployment = Deployment(config, H200, cache=CACHE_FORMATS[name])
    assert deployment.kv_bytes_per_token_per_rank == stored
