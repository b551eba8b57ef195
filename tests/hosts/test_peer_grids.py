"""What other libraries test their attention over key/value caches with, on this package's functions
with flash-attn's names and, for 8-bit caches, its own.

Lengths, batches and windows are made smaller. `make test` runs some combinations of each grid,
`make test-long` as many as it takes for every pair of two parameters' values to occur.
"""

import math
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from budget import assert_results
from cached_attention import check, meaning
from peer_grids import GRIDS, count, cover, reasons

from gqa_kernels import decode_attention, prefill_attention
from gqa_kernels.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

FLASH_ATTN, *PAGED = GRIDS
FLOAT8 = torch.float8_e4m3fn
# How many combinations `make test` runs.
FEW = {FLASH_ATTN: 10, PAGED[0]: 6, PAGED[1]: 6}
# What the error says about a reason to refuse.
SAID = {
    "head_dim above 256": "q: expected a head_dim",
    "RoPE inside attention": "unexpected keyword argument 'pos_encoding_mode'",
    "masks of pairs": "unexpected keyword argument 'custom_mask'",
    "an output to write to": "unexpected keyword argument 'out'",
    "8-bit queries": "q: expected dtype float32, float16, bfloat16",
    "4-bit caches": "k_cache: expected dtype",
    "float8_e5m2 caches": "k_cache: expected dtype",
}


def shorter(length):
    return length if length <= 20 else 21 + length % 19


def run_flash_attn(
    draw, device, *, dtype, num_splits, nheads_k, new_kv, alibi, local, causal, d, seqlens,
    seqlen_new_eq_seqlen_q, rotary_interleaved, rotary_fraction, paged_kv_block_size, has_leftpad,
    has_batch_idx,
):  # fmt: skip
    numbers = random.Random(d)
    seqlen_q, room = min(seqlens[0], 18), shorter(seqlens[1])
    kind, options = "indexed" if has_batch_idx else "contiguous", {}
    if paged_kv_block_size is not None:
        kind = paged_kv_block_size // 32
        room = -(-room // kind) * kind
    seqlen_new = seqlen_q if seqlen_new_eq_seqlen_q else numbers.randint(1, seqlen_q)
    seqlen_new *= new_kv
    rotary_dim = int(rotary_fraction * d) // 16 * 16
    # So that there is an angle for every query.
    most = room - (seqlen_q if rotary_dim and (causal or local) else seqlen_new)
    lengths = [numbers.randint(0 if new_kv else 1, most) for _ in "ab"]
    if has_leftpad:
        options["cache_leftpad"] = [numbers.randint(0, length) for length in lengths]
    if local:
        options["window_size"] = (numbers.randint(0, room), numbers.randint(0, room))
    if alibi:
        options["alibi_slopes"] = draw(2, 6).abs().cpu() * 0.3
    check(
        kind, draw, device, getattr(torch, dtype), seqlen_q=seqlen_q, seqlen_new=seqlen_new,
        lengths=lengths, rotary_dim=rotary_dim, dim=d, room=room,
        heads=(6, nheads_k), causal=causal, num_splits=num_splits,
        rotary_interleaved=rotary_interleaved, **options,
    )  # fmt: skip


def pages_of(rows, page_size, kv_layout, contiguous_kv, kv_dtype):
    """(k, v, block_table) that hold `rows`, both in one tensor, and NaN where nobody is to look."""
    (_, heads, head_dim), lengths = rows[0][0].shape, [len(keys) for keys, _ in rows]
    used = [-(-length // page_size) for length in lengths]
    inner = (heads, page_size) if kv_layout == "HND" else (page_size, heads)
    shape = [sum(used) + 1, 2, *inner, head_dim]
    if contiguous_kv:
        pages = torch.full(shape, math.nan)
    else:  # every other one, in each dimension but the last
        wide = [2 * size for size in shape[:-1]]
        pages = torch.full((*wide, head_dim), math.nan)[1::2, 1::2, 1::2, 1::2]
    by_slot = pages.transpose(2, 3) if kv_layout == "HND" else pages
    order = torch.randperm(sum(used) + 1).tolist()
    table = torch.full((len(rows), max(used)), 1 << 30, dtype=torch.int32)
    for row, length, count_used, both in zip(table, lengths, used, rows, strict=True):
        row[:count_used] = torch.tensor([order.pop() for _ in range(count_used)])
        for t in range(length):
            for side in (0, 1):
                by_slot[int(row[t // page_size]), side, t % page_size] = both[side][t]
    stored = torch.empty_strided(pages.shape, pages.stride(), dtype=kv_dtype)
    stored.copy_(pages)
    return *(stored.transpose(2, 3) if kv_layout == "HND" else stored).unbind(1), table


def run_paged(
    draw, device, *, dtype, num_heads=(8, 2), head_dim, page_size=32, seq_lens=None, batch_size=2,
    kv_len=0, qo_len=1, mask="causal", kv_layout="NHD", contiguous_kv=True, kv_dtype=None,
    q_dtype=None, sliding_window=None, soft_cap=None, alibi=False, pos_encoding_mode="NONE",
    use_out=False, **_,
):  # fmt: skip
    """The parameters that are left over choose among a library's kernels, or the size of its pool
    of pages."""
    if seq_lens is None:
        seq_lens = [(5, 70), (1, 41), (18, 160)]
        if kv_len:
            seq_lens = [(qo_len, kv_len - i) for i in range(2 + batch_size // 64)]
    seq_lens = [(min(new, 18), shorter(length)) for new, length in seq_lens]
    dtype, kv_dtype = getattr(torch, dtype), getattr(torch, kv_dtype or dtype)
    group, heads_k = num_heads[0] // num_heads[1], min(num_heads[1], 4)
    quantised, options, given = kv_dtype != dtype, {}, {}
    q = [draw(new, group * heads_k, head_dim, dtype=dtype).cpu() for new, _ in seq_lens]
    rows = [
        tuple(draw(length, heads_k, head_dim, dtype=dtype).cpu() for _ in "kv")
        for _, length in seq_lens
    ]
    if quantised and kv_dtype != torch.uint8:
        rows = [tuple(x.to(kv_dtype).to(dtype) for x in row) for row in rows]
    k, v, table = (
        x.to(device) for x in pages_of(rows, page_size, kv_layout, contiguous_kv, kv_dtype)
    )
    if sliding_window:
        given["window"] = (sliding_window // 16, 0)
        options["window" if quantised else "window_size"] = given["window"]
    if soft_cap is not None:
        given["softcap"] = options["softcap"] = soft_cap
    if alibi:
        given["slopes"] = draw(group * heads_k).abs().cpu() * 0.1
        options["alibi_slopes"] = given["slopes"].to(device)
    if pos_encoding_mode != "NONE":
        options["pos_encoding_mode"] = pos_encoding_mode
    if use_out:
        options["out"] = torch.empty(0)
    if mask == "custom":
        options["custom_mask"] = torch.ones(1, dtype=torch.bool)
    causal = mask == "causal"
    new, lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device).unbind(1)
    packed = torch.cat(q).to(device)
    if q_dtype is not None:
        packed, k, v = (x.to(getattr(torch, q_dtype)) for x in (packed, k, v))
    bounds_q, bounds_k = (
        torch.cat([x.new_zeros(1), x.cumsum(0, dtype=torch.int32)]) for x in (new, lengths)
    )
    one_each, options["block_table"] = set(new.tolist()) == {1}, table
    if quantised:
        scales = torch.ones(heads_k, device=device)
        options |= {"k_scale": scales, "v_scale": scales, "causal": causal, "return_lse": True}
        if one_each:
            out, lse = decode_attention(packed[:, None], k, v, lengths, **options)
        else:
            out, lse = prefill_attention(packed, k, v, bounds_q, lengths, **options)
    elif one_each:
        options |= {"causal": causal, "return_softmax_lse": True}
        out, lse = flash_attn_with_kvcache(packed[:, None], k, v, cache_seqlens=lengths, **options)
    else:
        options |= {"causal": causal, "return_attn_probs": True}
        out, lse, _ = flash_attn_varlen_func(packed, k, v, bounds_q, bounds_k, 18, 40, **options)
    if one_each:
        out, lse = out[:, 0], lse[:, :, 0].T

    def results(given):
        outs, lses, _ = meaning(dtype, causal=causal, **given)
        lse = torch.cat(lses, 1)
        kind = torch.promote_types(lse.dtype, torch.float32)
        return {"out": torch.cat(outs), "lse": lse.to(kind)}

    given |= {"q": q, "rows": rows}
    assert_results({"out": out.cpu(), "lse": lse.cpu()}, results, given)


def run(name, combination, draw, device):
    """Runs a combination: its result is right, or the error names why it is refused."""

    def call():
        run_one = run_flash_attn if name == FLASH_ATTN else run_paged
        run_one(draw, device, **combination)

    why = reasons(GRIDS[name], combination)
    if not why:
        return call()
    with pytest.raises((TypeError, NotImplementedError)) as caught:
        call()
    assert any(SAID[reason] in str(caught.value) for reason in why), caught.value


@pytest.mark.parametrize(
    ("name", "index", "combination"),
    [
        pytest.param(name, index, combination, id=f"{name.split()[0]}-{name.split()[1]}-{index}")
        for name in GRIDS
        for index, combination in enumerate(islice(cover(GRIDS[name]), FEW.get(name, 3)))
    ],
)
def test_some_combinations(name, index, combination, draw, device):
    run(name, combination, draw, device)


@pytest.mark.long
@pytest.mark.parametrize("name", GRIDS)
def test_every_pair(name, draw, device):
    wrong = {}
    for combination in cover(GRIDS[name]):
        try:
            run(name, combination, draw, device)
        except (Exception, pytest.fail.Exception) as error:  # the others still count
            wrong[str(combination)] = error
    assert not wrong


README = Path(__file__).parents[2] / "kernels" / "README.md"


@pytest.mark.parametrize("name", GRIDS)
def test_the_manual_tells_which_are_accepted(name):
    tested, accepted = count(GRIDS[name])
    why = ", ".join(GRIDS[name].refused) or "–"
    assert f"| {name} | {tested:,} | {accepted:,} | {why} |" in README.read_text(encoding="utf-8")


def test_every_reason_is_told():
    assert set(SAID) == {why for grid in GRIDS.values() for why in grid.refused}
