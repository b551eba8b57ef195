"""How long decoding takes with each number of key/value heads: measured, on a GPU that is there.

A row is one step of a few layers of a model's shape, with random weights and a cache full of random
values, on the same kernels that a whole model runs on. The head is left out: beside two layers it
would weigh many times what it weighs beside all. No row is scaled to a whole model.
"""

import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch

from gqa_kernels import get_backend
from llama2.accounting import (
    attention_flops_per_pair,
    kv_bytes_per_token,
    layers_parameters,
    matched,
)
from llama2.cache.kv_cache import KVCache
from llama2.config import ModelConfig
from llama2.model import Llama2
from llama2.tradeoff.clock import Call, Ceilings, Clock, CudaClock, measure_ceilings

DTYPE = torch.bfloat16


def floor_seconds(config: ModelConfig, batch: int, context: int, ceilings: Ceilings) -> float:
    """max(bytes / bandwidth, flops / matrix rate) of one step of the layers: their weights and all
    keys and values are read once, in bfloat16."""
    weights = layers_parameters(config)
    read = weights * DTYPE.itemsize + batch * context * kv_bytes_per_token(config, DTYPE.itemsize)
    flops = batch * (2 * weights + attention_flops_per_pair(config) * context)
    return max(read / ceilings.read_bytes_per_s, flops / ceilings.flops_per_s)


def measure_decode(
    config: ModelConfig,
    num_kv_heads: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    num_layers: int = 2,
    device: torch.device | str = "cuda",
    ops: ModuleType | None = None,
    clock: Clock | None = None,
    ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:
    """Times a decode step of `config`'s layers for each number of key/value heads.

    The step takes one new token per sequence, writes it to the cache and attends to `context` keys,
    the new one included; it is captured in a CUDA graph after warm-up and replayed. Feed-forward
    layers stay as wide as `config`'s.

    Args:
        contexts: at least 2 each; those beyond max_seq_len get a longer rotary table.
        num_layers: of the model that is timed.
        ops, clock, ceilings: the kernels, the GPU's clock, and what it measures at the start.
    Returns:
        a row per count, batch and context, in this order: num_kv_heads, batch, context, num_layers,
        gpu, tag, floor_microseconds and the rates that it comes from, read_bytes_per_s and
        flops_per_s; where tag is "measured", the median `microseconds`, the 20th and 80th
        percentiles `microseconds_p20` and `microseconds_p80`, and `percent_of_floor`,
        100 · floor / median. Where memory was short, the tag is "does not fit" and these four are
        None.
    Raises:
        RuntimeError: there is no GPU to measure on.
        ValueError: a count that does not divide num_q_heads, or another size out of range.
    """
    if not num_kv_heads or not batches or not contexts:
        raise ValueError("measure_decode: expected at least one count, batch and context; got none")
    if min(batches) < 1 or min(contexts) < 2:
        raise ValueError(
            f"batches, contexts: expected at least 1 and 2; got {min(batches)} and {min(contexts)}"
        )
    longest = max(config.max_seq_len, *contexts)
    shape = replace(config, num_layers=num_layers, max_seq_len=longest)
    shapes = [matched(shape, count, "same_ffn") for count in num_kv_heads]
    clock = clock or CudaClock(device)
    ops = ops or get_backend("triton")
    ceilings = ceilings or measure_ceilings(clock, device)
    return [
        row for one in shapes for row in _rows(one, batches, contexts, device, ops, clock, ceilings)
    ]


def _rows(
    config: ModelConfig,
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device | str,
    ops: ModuleType,
    clock: Clock,
    ceilings: Ceilings,
) -> Iterator[dict[str, Any]]:
    model = random_model(config, ops, device)
    for batch in batches:
        for context in contexts:
            floor = floor_seconds(config, batch, context, ceilings)
            samples = _samples(model, batch, context, clock)
            yield {
                "num_kv_heads": config.num_kv_heads,
                "batch": batch,
                "context": context,
                "num_layers": config.num_layers,
                "gpu": clock.name,
                "floor_microseconds": floor * 1e6,
                **asdict(ceilings),
                **_summary(samples, floor),
            }


def _summary(samples: list[float] | None, floor: float) -> dict[str, Any]:
    if samples is None:
        names = ("microseconds", "microseconds_p20", "microseconds_p80", "percent_of_floor")
        return {"tag": "does not fit", **dict.fromkeys(names)}
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    return {
        "tag": "measured",
        "microseconds": median * 1e6,
        "microseconds_p20": p20 * 1e6,
        "microseconds_p80": p80 * 1e6,
        "percent_of_floor": 100 * floor / median,
    }


def _samples(model: Llama2, batch: int, context: int, clock: Clock) -> list[float] | None:
    """None where memory was short; what the attempt allocated is free again afterwards."""
    try:
        with torch.no_grad():
            return clock.seconds(clock.capture(decode_step(model, batch, context)))
    except torch.OutOfMemoryError:
        pass  # freed below: here the traceback still holds the cache
    gc.collect()
    torch.cuda.empty_cache()
    return None


def random_model(
    config: ModelConfig, ops: ModuleType, device: torch.device | str, dtype: torch.dtype = DTYPE
) -> Llama2:
    """A model with random weights, never whole in another dtype, and without gradients."""
    with torch.device("meta"):
        model = Llama2(config, ops)
    model = model.to(dtype).to_empty(device=device)
    model.reset_parameters()
    return model.requires_grad_(False)


def decode_step(model: Llama2, batch: int, context: int) -> Call:
    """A step that may be repeated: each call writes and reads the same places of the cache."""
    device = model.embed_tokens.weight.device
    cache = KVCache(model.config, batch, context, dtype=DTYPE, device=device)
    cache.keys.normal_()
    cache.values.normal_()
    tokens = torch.randint(model.config.vocab_size, (batch, 1), device=device)

    def step() -> torch.Tensor:
        cache.num_written = context - 1
        cache.seq_lens.fill_(context - 1)
        return model.hidden_states(tokens, cache)

    return step
