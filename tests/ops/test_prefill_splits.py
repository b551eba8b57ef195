"""prefill_attention's split keys, and batches of decode steps, drafted tokens and chunks of
prompts."""

import math

import pytest
import torch
from new_tokens import assert_within_budget, every_option, in_pages, ints, maker
from program_order import Backwards

from gqa_kernels import prefill_attention
from gqa_kernels.ops.cache import counters, prefill
from gqa_kernels.runtime import configs
from gqa_kernels.spec.cache import _spoil, quantized

SPLIT = configs.PREFILL_SPLIT_TOKENS
# A decode step, drafted tokens, no new token, a chunk of a prompt, drafted tokens, a prompt.
NEW, CACHED = (1, 7, 0, 80, 16, 1), (120, 70, 20, 30, 60, 0)


@pytest.fixture
def make(draw, device):
    return maker(draw, device)


@pytest.fixture(autouse=True)
def _tiny_splits(monkeypatch, device):
    """Splits that a few keys cross, on a GPU too, whose tiles have at most 64 keys, and steps of
    the combination that a few splits cross."""
    tiny = tuple(config._replace(split_keys=64) for config in configs.PREFILL)
    monkeypatch.setattr(configs, "PREFILL", tiny if device.type == "cuda" else configs.PREFILL)
    monkeypatch.setattr(configs, "PREFILL_COMBINE_SPLITS", 2)
    monkeypatch.setattr(configs, "PREFILL_COMBINE_LSE", 2)


def in_8_bits(inputs, cache_dtype, per_token):
    """The same inputs with quantised caches; extreme values beyond the lengths."""
    found = {}
    for side in "kv":
        cache = inputs[f"{side}_cache"].nan_to_num()
        stored, found[f"{side}_scale"] = quantized(cache, cache_dtype, per_token=per_token)
        for row, length in zip(stored, inputs["seq_lens"].tolist(), strict=True):
            _spoil(row[length:])
        found[f"{side}_cache"] = stored
    return inputs | found


def mixed(case, make, draw, generator):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    inputs = make(NEW, CACHED, heads=(2, 1), dtype=dtype)
    every = every_option(draw, 2, len(NEW))
    if case == "int8 in pages":
        inputs = in_8_bits(inputs, torch.int8, per_token=True)
        return in_pages(inputs, 8, generator) | {"sinks": every["sinks"]}
    if case == "float8":
        return in_8_bits(inputs, torch.float8_e4m3fn, per_token=False) | {"softcap": 1.5}
    if case == "pages, a window and sinks":
        inputs = in_pages(inputs, 16, generator)
        return inputs | {"window": (45, None), "sinks": every["sinks"]}
    return inputs | (every | {"causal": False} if case == "every option" else {})


MIXED = ("bfloat16", "pages, a window and sinks", "every option", "int8 in pages", "float8")


@pytest.mark.parametrize("case", MIXED)
def test_a_mixed_batch(case, make, draw, generator):
    """Within the budget, and each sequence with the bits that it has alone."""
    inputs = mixed(case, make, draw, generator)
    assert_within_budget(inputs)
    together, lse = prefill_attention(**inputs, return_lse=True)
    bounds = inputs["cu_seqlens_q"].tolist()
    for b in (0, 3, 4):
        rows, one = slice(bounds[b], bounds[b + 1]), slice(b, b + 1)
        alone = inputs | {
            "q": inputs["q"][rows],
            "cu_seqlens_q": inputs["cu_seqlens_q"][b : b + 2] - bounds[b],
        }
        by_sequence = ["seq_lens", "alibi_slopes"]
        by_sequence += ["block_table"] if "block_table" in inputs else ["k_cache", "v_cache"]
        alone |= {name: inputs[name][one] for name in by_sequence if name in inputs}
        out, lse_alone = prefill_attention(**alone, return_lse=True)
        assert torch.equal(out, together[rows]) and torch.equal(lse_alone, lse[:, rows])


@pytest.mark.parametrize("window", (None, (70, None)))
def test_no_bits_depend_on_the_plan(window, make, monkeypatch, device):
    """Not on how many programs share the splits, their order, and how much memory there is."""
    inputs = make((1, 40, 5), (150, 110, 20), heads=(3, 1)) | {"window": window}
    wanted = prefill_attention(**inputs)
    assert_within_budget(inputs)
    for programs in (1, 1000):
        monkeypatch.setattr(configs, "PREFILL_PROGRAMS_PER_SM", programs)
        assert torch.equal(prefill_attention(**inputs), wanted)
    wide = {x: torch.cat((inputs[x], inputs[x] * math.nan), 1) for x in ("k_cache", "v_cache")}
    assert torch.equal(prefill_attention(**inputs | wide), wanted)
    if device.type == "cpu":
        backwards = Backwards(prefill._launch_prefill, monkeypatch)
        monkeypatch.setattr(prefill, "_launch_prefill", backwards)
        assert torch.equal(prefill_attention(**inputs), wanted)
        assert backwards.num_launches == 1
    kept = list(counters._of_stream.values())
    assert kept and not any(x.any() for x in kept)


def after(inputs, num_new, device):
    """The same sequence in a call with its last num_new tokens only."""
    bounds = ints(0, num_new, device=device)
    return prefill_attention(**inputs | {"q": inputs["q"][-num_new:], "cu_seqlens_q": bounds})


@pytest.mark.parametrize("window", (None, (84, None)))
def test_which_chunks_give_a_token_the_same_bits(window, make, monkeypatch, device):
    """Chunks of a prompt of at most SPLIT tokens, and longer ones; for as many keys as a split has,
    all chunks."""
    inputs = make((SPLIT + 56,), (60,), heads=(2, 1)) | {"window": window}
    longest = prefill_attention(**inputs)
    assert_within_budget(inputs)
    assert torch.equal(after(inputs, SPLIT + 1, device), longest[-SPLIT - 1 :])
    short = after(inputs, SPLIT, device)
    for num_new in (1, SPLIT - 1):
        assert torch.equal(after(inputs, num_new, device), short[-num_new:])
    assert not torch.equal(short, longest[-SPLIT:])
    wide = tuple(config._replace(split_keys=256) for config in configs.PREFILL)
    monkeypatch.setattr(configs, "PREFILL", wide)
    assert torch.equal(prefill_attention(**inputs), longest)
    for num_new in (SPLIT, SPLIT + 1):
        assert torch.equal(after(inputs, num_new, device), longest[-num_new:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's programs can be left out")
def test_nothing_is_combined_before_all_have_come(make, monkeypatch):
    from triton.runtime import interpreter

    launch, builder = prefill._launch_prefill, interpreter.interpreter_builder
    forwards, set_grid_dim = builder.set_grid_idx, builder.set_grid_dim

    def without_the_first(grid, **arguments):
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(x + 1, y, z))
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: set_grid_dim(x + 1, y, z))
        launch((grid[0] - 1,), **arguments)

    inputs = make((2, 3), (200, 200), heads=(2, 1))
    monkeypatch.setattr(counters, "_of_stream", {})
    monkeypatch.setattr(prefill, "_launch_prefill", without_the_first)
    sevens = lambda x, **options: torch.empty_like(x, **options).fill_(7.0)  # noqa: E731
    monkeypatch.setattr(prefill.torch, "empty_like", sevens)
    out = prefill_attention(**inputs)
    assert (out[:2] == 7.0).all()  # as allocated
    assert (out[2:] != 7.0).all()


def test_partial_results_do_not_overlap(make):
    """Where they lie by sequences: most new tokens belong to one whose keys are not split."""
    assert_within_budget(make((SPLIT, 2, 140), (30, 40, 0), heads=(1, 1)))


def test_the_memory_of_partial_results():
    """Bounded by the new tokens, and by the most that sequences have whose keys are split."""
    config = configs.prefill_config("sm_90", 2, 2, 128)._replace(split_keys=2048)

    def plan(total_q, num_sequences, capacity, window_left=None):
        sizes = total_q, num_sequences, 8, 8
        return prefill._plan_splits(sizes, capacity, window_left, config)

    assert plan(2048, 64, 2048).num_tokens == 0  # one split
    assert plan(2048, 64, 32768)[1:4] == (16, 2048, 0)
    assert plan(2048, 3, 32768)[1:4] == (16, 3 * SPLIT, SPLIT)
    assert plan(30, 1, 32768)[1:4] == (16, 30, 0)
    assert plan(30, 1, 32768, window_left=4096).num_slots == 4
    assert plan(2048, 64, 1 << 20).programs_per_sequence <= 1 + 8 * 200 // (64 * 8)
