"""Parameters, flops and bytes against the model itself, and the published sizes."""

from dataclasses import replace

import pytest
import torch
from small_llama import EAGER, small_config
from torch.utils.flop_counter import FlopCounterMode

from llama2 import PUBLISHED, KVCache, Llama2
from llama2.accounting import (
    MATCHINGS,
    flops_per_token,
    head_counts,
    kv_bytes_per_token,
    kv_parameters,
    layers_parameters,
    matched,
    mean_flops_per_token,
    num_parameters,
    unmatched_parameters,
)

SEVEN, THIRTEEN, SEVENTY = (PUBLISHED[size] for size in ("7B", "13B", "70B"))


def on_meta(config):
    with torch.device("meta"):
        return Llama2(config, EAGER)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_parameters_are_the_models(num_kv_heads, tied):
    config = small_config(num_kv_heads=num_kv_heads, tie_word_embeddings=tied)
    model = on_meta(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kv = ("k_proj.weight", "v_proj.weight")
    assert kv_parameters(config) == sum(n for name, n in sizes.items() if name.endswith(kv))
    projections = sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
    assert layers_parameters(config) == projections


# Touvron et al. 2023 give them to the billion; these are the released checkpoints' counts.
@pytest.mark.parametrize(
    ("config", "count"),
    [(SEVEN, 6_738_415_616), (THIRTEEN, 13_015_864_320), (SEVENTY, 68_976_648_192)],
    ids=["7B", "13B", "70B"],
)
def test_parameters_of_the_published_models(config, count):
    assert num_parameters(config) == count
    assert sum(p.numel() for p in on_meta(config).parameters()) == count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_flops_are_those_that_torch_counts(num_kv_heads, tied):
    """The eager model computes every pair of query and key, and hides half of them."""
    config = small_config(num_kv_heads=num_kv_heads, tie_word_embeddings=tied)
    batch, seq_len = 2, 24
    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        Llama2(config, EAGER)(tokens)
    assert counter.get_total_flops() == batch * seq_len * flops_per_token(config, seq_len)


def test_flops_of_a_decode_step_are_those_that_torch_counts():
    config, context = small_config(), 50
    model = Llama2(config, EAGER)
    cache = KVCache(config, 3, context, dtype=torch.float32, device="cpu")
    cache.num_written = context - 1
    cache.seq_lens.fill_(context - 1)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 1, dtype=torch.long), cache)
    assert counter.get_total_flops() == 3 * flops_per_token(config, context)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_mean_flops_are_the_mean_over_causal_contexts(seq_len):
    config = small_config()
    total = sum(flops_per_token(config, context) for context in range(1, seq_len + 1))
    assert mean_flops_per_token(config, seq_len) * seq_len == total


def test_bytes_are_those_of_a_cache():
    config = small_config()
    cache = KVCache(config, 3, 5, dtype=torch.bfloat16, device="meta")
    assert 3 * 5 * kv_bytes_per_token(config) == cache.keys.nbytes + cache.values.nbytes
    assert kv_bytes_per_token(config, 1) * 2 == kv_bytes_per_token(config)
    assert [kv_bytes_per_token(PUBLISHED[size]) // 1024 for size in PUBLISHED] == [
        *(512, 800),
        *(192, 320),
    ]


def test_counts_of_heads_are_the_divisors():
    assert head_counts(small_config(num_q_heads=12, num_kv_heads=12)) == (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_the_same_count_is_the_config_itself(matching):
    assert matched(SEVENTY, 8, matching) is SEVENTY


def test_same_ffn_changes_the_heads_alone():
    assert matched(SEVEN, 8, "same_ffn") == replace(SEVEN, num_kv_heads=8)
    freed = 2 * 32 * 4096 * 128 * 24
    assert unmatched_parameters(SEVEN, 8, "same_ffn") == -freed


@pytest.mark.parametrize("config", [SEVEN, THIRTEEN, SEVENTY], ids=["7B", "13B", "70B"])
def test_exact_is_exact_to_the_nearest_column(config):
    column = 3 * config.num_layers * config.hidden_size
    for count in head_counts(config):
        left = unmatched_parameters(config, count, "exact")
        assert 2 * abs(left) < column
        freed = 2 * config.head_dim * (config.num_kv_heads - count)
        assert (left == 0) == (freed % 3 == 0)


def test_exact_of_known_shapes():
    assert matched(SEVEN, 8, "exact").intermediate_size == 11008 + 2048
    assert unmatched_parameters(SEVEN, 8, "exact") == 0
    # 2 · 128 · 31 / 3 = 2645 + 1/3
    assert matched(SEVEN, 1, "exact").intermediate_size == 11008 + 2645
    assert unmatched_parameters(SEVEN, 1, "exact") == -32 * 4096
    # The other way, from GQA to MHA, layers get narrower: 2 · 128 · 56 / 3 = 4778 + 2/3.
    assert matched(SEVENTY, 64, "exact").intermediate_size == 28672 - 4779
    assert unmatched_parameters(SEVENTY, 64, "exact") == -80 * 8192


def test_what_cannot_be_matched():
    for matching in MATCHINGS:
        with pytest.raises(ValueError, match=r"num_kv_heads: expected a divisor .*32.*; got 3$"):
            matched(SEVEN, 3, matching)
    with pytest.raises(ValueError, match=r"num_kv_heads: .*; got 0$"):
        matched(SEVEN, 0, "same_ffn")
    with pytest.raises(ValueError, match=r"matching: expected one of same_ffn, exact; got 'ffn'"):
        matched(SEVEN, 8, "ffn")
    narrow = small_config(num_q_heads=8, num_kv_heads=1)
    with pytest.raises(
        ValueError, match=r"num_kv_heads: expected an intermediate_size above .*; got 16"
    ):
        matched(replace(narrow, intermediate_size=16), 8, "exact")


@pytest.mark.parametrize("call", [flops_per_token, mean_flops_per_token, kv_bytes_per_token])
def test_sizes_must_be_positive(call):
    with pytest.raises(ValueError, match="expected at least 1; got 0"):
        call(SEVEN, 0)
