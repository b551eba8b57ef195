"""Inputs of prefill_attention: new tokens of several sequences over a cache, packed."""

import math

import torch
from budget import assert_call

from gqa_kernels import prefill_attention, reference
from gqa_kernels.spec.cache import _paged

NOWHERE = 1 << 30  # an entry of a block table that must not be read


def ints(*values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def maker(draw, device):
    """Returns a function that draws inputs of sequences with some new tokens after some cached
    ones; NaN beyond the lengths, and `rest` rows after the last sequence."""

    def make(new, cached, *, capacity=None, heads=(4, 2), head_dim=16, rest=0, dtype=torch.float32):
        lengths = [a + b for a, b in zip(new, cached, strict=True)]
        capacity = capacity or -(-max(lengths, default=0) // 64) * 64
        caches = {
            f"{x}_cache": draw(len(new), capacity, heads[1], head_dim, dtype=dtype) for x in "kv"
        }
        for cache in caches.values():
            for row, length in zip(cache, lengths, strict=True):
                row[length:] = math.nan
        bounds = [sum(new[:b]) for b in range(len(new) + 1)]
        return {
            "q": draw(bounds[-1] + rest, heads[0], head_dim, dtype=dtype),
            **caches,
            "cu_seqlens_q": ints(*bounds, device=device),
            "seq_lens": ints(*lengths, device=device),
        }

    return make


def in_pages(inputs, page_size, generator):
    """The same inputs with the caches in shuffled pages; pages of no sequence hold NaN."""
    batch, capacity = inputs["k_cache"].shape[:2]
    max_pages = capacity // page_size
    num_pages = batch * max_pages + 3
    order = torch.randperm(num_pages, generator=generator)[: batch * max_pages]
    table = order.view(batch, max_pages).to(inputs["q"].device, torch.int32)
    per_token = [x for x in inputs if x[1:] in ("_cache", "_scale") and inputs[x].dim() > 1]
    paged = {name: _paged(inputs[name], table, num_pages) for name in per_token}
    for row, length in zip(table, inputs["seq_lens"].tolist(), strict=True):
        row[-(-length // page_size) :] = NOWHERE
    return inputs | paged | {"block_table": table}


def assert_within_budget(inputs):
    inputs = inputs | {"return_lse": True}
    assert_call(prefill_attention, reference.prefill_attention, inputs)


def one_by_one(inputs):
    """Results of the rows of each sequence, each row in a separate call."""
    bounds, lengths = (inputs[name].tolist() for name in ("cu_seqlens_q", "seq_lens"))
    device, rows = inputs["q"].device, []
    for b, length in enumerate(lengths):
        caches = {name: inputs[name][b : b + 1] for name in ("k_cache", "v_cache")}
        for row in range(bounds[b], bounds[b + 1]):
            one = {"q": inputs["q"][row : row + 1], "cu_seqlens_q": ints(0, 1, device=device)}
            one["seq_lens"] = ints(length - (bounds[b + 1] - row - 1), device=device)
            rows.append(prefill_attention(**inputs | caches | one))
    return torch.cat(rows)


def every_option(draw, heads, batch):
    slopes = draw(batch, heads).abs()
    return {"window": (20, 3), "softcap": 1.5, "sinks": draw(heads), "alibi_slopes": slopes}
