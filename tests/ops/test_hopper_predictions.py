"""Predictions about the kernels for Hopper (`bench/hopper_compiled.py`): its model, its page."""

import itertools

import pytest
from test_compile import BENCH


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def step(opcode, **changes):
    from binary import Scheduled

    return Scheduled(opcode, 1, (), None, None, False, None)._replace(**changes)


def consumer(own, next_turn):
    """Products of 256 cycles in a turn of their own, then a softmax of 192 cycles."""
    return (
        *(step("MUFU.EX2"),) * 24,
        step("BAR", meets=(own, 256, True)),
        *(step("HGMMA.64x128x16", closes_group=True),) * 4,
        step("BAR", meets=(next_turn, 256, False)),
        step("WARPGROUP", groups_left=0),
        step("BAR", meets=("2", 128, True)),  # of the group alone
    )


def test_consumers_that_take_turns_hide_each_others_softmax():
    from simulation import simulate_consumers

    pair = simulate_consumers([consumer("8", "9"), consumer("9", "8")])
    alone = simulate_consumers([[s for s in consumer("8", "9") if not s.meets]])
    assert pair.tensor_cycles == 2 * alone.tensor_cycles == 512
    assert alone.cycles > 256 + 192 and 512 <= pair.cycles < 1.05 * 512


def test_a_turn_that_nobody_passes_is_a_deadlock(monkeypatch):
    import simulation

    monkeypatch.setattr(simulation, "_MOST_CYCLES", 10_000)
    with pytest.raises(RuntimeError, match="deadlock"):
        simulation.simulate_consumers([consumer("8", "9"), consumer("9", "9")])


@pytest.mark.parametrize(("seq_len", "percent"), [(1024, 75), (2048, 84), (4096, 93), (8192, 96)])
def test_the_order_of_blocks_keeps_the_sms_busy(seq_len, percent):
    from balance import Shape
    from hopper_schedule import tiles_of_blocks, useful_share

    shape = Shape(batch=1, num_q_heads=64, num_kv_heads=8, seq_len=seq_len)
    assert 100 * useful_share(shape, 128, 128, step_cycles=2185.0) >= percent - 2
    dealt = [list(tiles_of_blocks(shape, 128, 128, True, p, 132)) for p in range(132)]
    blocks = seq_len // 128
    assert sorted(itertools.chain(*dealt)) == sorted(64 * list(range(1, blocks + 1)))
    sums = [sum(tiles) for tiles in dealt]
    assert max(sums) - min(sums) <= 2 * blocks


@pytest.mark.parametrize(
    ("sizes", "least"), [((4, 32, 32, 2048), 0.82), ((1, 64, 64, 4096), 0.91)], ids=str
)
def test_sections_of_heads_cost_little_balance(sizes, least):
    """Each of the sections begins with blocks like those with which the last one ends."""
    from balance import FORWARD, Shape, section_of
    from hopper_schedule import useful_share

    shape = Shape(*sizes)
    assert section_of(FORWARD, shape) < shape.batch * shape.num_q_heads
    assert useful_share(shape, 128, 128, step_cycles=2185.0) >= least


def test_a_version_replaces_its_own_section_only():
    from hopper_compiled import INTRODUCTION, page

    first = page("", "## Triton 3.7.1\n\nold")
    both = page(first, "## Triton 3.6.0\n\nother")
    assert both.index("other") < both.index("old") and both.count(INTRODUCTION) == 1
    assert page(both, "## Triton 3.7.1\n\nnew") == both.replace("old", "new")
    assert page(both, "## Triton 3.6.0\n\nother") == both


def test_sections_are_in_the_order_of_versions():
    from hopper_compiled import page

    found = page(page("", "## Triton 3.10.0\n\nnew"), "## Triton 3.9.1\n\nold")
    assert found.index("3.9.1") < found.index("3.10.0")


@pytest.mark.parametrize("name", ["other.md", "binary.md", ".", "missing/page.md"])
def test_what_is_no_page_is_refused_before_anything_is_compiled(
    monkeypatch, tmp_path, capsys, name
):
    import hopper_compiled

    (tmp_path / "other.md").write_text("# Another text\n", encoding="utf-8")
    (tmp_path / "binary.md").write_bytes(b"\xff")
    monkeypatch.setattr(hopper_compiled.interpreter, "is_enabled", lambda: False)
    monkeypatch.setattr(hopper_compiled, "hopper_binaries", None)
    with pytest.raises(SystemExit):
        hopper_compiled.main(["--write", str(tmp_path / name)])
    assert "--write: " in capsys.readouterr().err
    assert (tmp_path / "other.md").read_text(encoding="utf-8") == "# Another text\n"
