"""The order of attention's programs: that of `bench/balance.py`, and what it gains there."""

import importlib
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from gqa_kernels.ops.attention import sequences
from gqa_kernels.ops.attention.call import Call
from gqa_kernels.primitives import packed
from gqa_kernels.runtime import configs, target

BENCH = Path(__file__).parents[2] / "bench"
BLOCK = 16
SM_90 = target.Target("sm_90", 132, True, 32)


@pytest.fixture
def balance(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("balance")


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "section"])
def _locate(out_ptr, cu_seqlens_ptr, num_sequences, num_heads, num_rows, section, B: tl.constexpr):
    work = sequences.locate(
        cu_seqlens_ptr, cu_seqlens_ptr, num_sequences, num_heads, num_rows, num_rows, section, B
    )
    out_ptr += tl.program_id(0) * 4
    tl.store(out_ptr, work.sequence)
    tl.store(out_ptr + 1, work.head)
    tl.store(out_ptr + 2, work.block)
    tl.store(out_ptr + 3, work.num_rows)


def located(device, num_programs, *arguments):
    out = torch.full((num_programs, 4), -1, dtype=torch.int32, device=device)
    _locate[(num_programs,)](out, *arguments, B=BLOCK)
    return [tuple(row) for row in out.tolist()]


@pytest.mark.parametrize("section", [1, 2, 4, 6])
def test_programs_start_section_by_section(balance, device, section):
    """Sections may cross batch entries; the last one has the rest of the heads."""
    batch, num_heads, num_rows = 2, 3, 2 * BLOCK + 1
    found = located(device, batch * num_heads * 3, None, None, num_heads, num_rows, section)
    assert found == [
        (head // num_heads, head % num_heads, block, num_rows)
        for head, block in balance.programs(3, batch * num_heads, section)
    ]


@pytest.mark.parametrize("section", [1, 2, 3])
def test_programs_of_packed_sequences_start_section_by_section(balance, device, section):
    lengths, num_heads = (BLOCK + 1, 0, 3 * BLOCK, 5), 3
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    num_blocks = packed.num_blocks(total, len(lengths), BLOCK)
    found = located(device, num_blocks * num_heads, bounds, len(lengths), num_heads, total, section)
    owned = [row for row in found if row[2] * BLOCK < row[3]]  # others find no rows
    blocks = [(s, b) for s, n in enumerate(lengths) for b in range(triton.cdiv(n, BLOCK))]
    assert owned == [
        (blocks[block][0], head, blocks[block][1], lengths[blocks[block][0]])
        for head, block in balance.programs(len(blocks), num_heads, section)
    ]


def call_of(shape, *, causal=True):
    q = torch.empty(
        shape.batch, shape.seq_len, shape.num_q_heads, shape.head_dim,
        dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    k = q[:, :, : shape.num_kv_heads]
    return Call(q, k, k, *[None] * 8, 0 if causal else None, None)


SHAPES = [
    (batch, heads, kv_heads, seq_len)
    for batch in (1, 3, 4)
    for heads, kv_heads in ((8, 1), (8, 8), (32, 8), (40, 40), (64, 8))
    for seq_len in (1024, 2000, 4096, 8192)
]


def test_sections_are_whole_groups_that_fit_the_cache(balance, monkeypatch):
    monkeypatch.setattr(target, "current", lambda: SM_90)
    for shape in (balance.Shape(*sizes) for sizes in (*SHAPES, (1, 64, 8, 1 << 20), (2, 8, 2, 0))):
        call, group_size = call_of(shape), shape.num_q_heads // shape.num_kv_heads
        num_bytes = 2 * shape.seq_len * shape.head_dim * 2
        of_queries, of_keys = sequences.section_of_queries(call), sequences.section_of_keys(call)
        assert of_queries % group_size == 0
        for groups in (of_queries // group_size, of_keys):
            assert groups == 1 or groups * num_bytes <= configs.section_bytes("sm_90")
        assert of_queries <= shape.batch * shape.num_q_heads
        assert of_keys <= shape.batch * shape.num_kv_heads
        if shape.seq_len:  # as the predictions assume
            assert of_queries == balance.section_of(balance.FORWARD, shape)
            assert of_keys == balance.section_of(balance.DKDV, shape)
        full = call_of(shape, causal=False)
        assert (sequences.section_of_queries(full), sequences.section_of_keys(full)) == (1, 1)


@pytest.mark.parametrize("kernel", ["FORWARD", "DKDV", "DQ"])
def test_sections_keep_more_sms_busy(balance, kernel):
    """No shape loses, and short ones gain a tenth or more."""
    kernel, gains = getattr(balance, kernel), {}
    for shape in (balance.Shape(*sizes) for sizes in SHAPES):
        section = balance.section_of(kernel, shape)
        before = balance.useful_share(kernel, shape, 1)
        gains[shape] = balance.useful_share(kernel, shape, section) / before
    assert min(gains.values()) >= 0.995, min(gains, key=gains.get)
    assert gains[balance.Shape(1, 32, 8, 2000 if not kernel.owns_keys else 4096)] > 1.1


def test_duration_is_that_of_programs_started_in_order(balance):
    assert balance.duration([3, 1, 1, 4], 2) == 6  # 3 | 1, 1, 4
    assert balance.duration([4, 3, 1, 1], 2) == 5
    assert balance.num_tiles(balance.FORWARD, balance.Shape(1, 1, 1, 300)) == [5, 4, 2]
    assert balance.num_tiles(balance.DKDV, balance.Shape(1, 2, 1, 300)) == [10, 6, 2]
    # One head of one block: its start, its two tiles, and no product of 1/2 − 1/256 of the pairs.
    one, cycles = balance.Shape(1, 1, 1, 128), 128 * 128 * 4 * 128 / 4096
    share = balance.useful_share(balance.FORWARD, one, 1, num_places=1)
    assert share == pytest.approx((0.5 + 1 / 256) * cycles / (balance.START_CYCLES + cycles))
