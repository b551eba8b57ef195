"""Shards of tokens and their mixture: every window once per epoch, by weight, without a state."""

import heapq
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.train.pretrain import TrainConfig
from llama2.train.shards import Mixture, TokenSource, write_shards

CONFIG = TrainConfig(steps=1, batch_size=4, seq_len=8)
VOCAB = 1000


def save(path, tokens, dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(tokens, dtype=dtype))
    return path


@pytest.fixture
def pair(tmp_path):
    """25 windows of ids below 300 in three shards, 7 of ids from 500 on in one."""
    for number, size in enumerate((80, 90, 49)):  # 9, 11 and 6 windows of 8
        save(tmp_path / "a" / f"{number}.npy", np.arange(size) + 100 * number)
    return [(tmp_path / "a", 3.0), (save(tmp_path / "b.npy", np.arange(500, 557)), 1.0)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_written_shards_hold_the_arrays(tmp_path, vocab_size, dtype):
    arrays = [np.arange(n) + vocab_size - n for n in (3, 0, 10, 1, 6)]
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "of-a-killed-process.npy").touch()
    write_shards(tmp_path / "x", iter(arrays), vocab_size=vocab_size, shard_tokens=8)
    shards = [np.load(file) for file in sorted((tmp_path / "x").iterdir())]
    assert [len(shard) for shard in shards] == [8, 8, 4]
    assert {shard.dtype for shard in shards} == {np.dtype(dtype)}
    assert np.array_equal(np.concatenate(shards), np.concatenate(arrays))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(FileExistsError, match="x: expected a path that does not exist"):
        write_shards(tmp_path / "x", arrays, vocab_size=vocab_size)


def test_shards_of_a_killed_process_are_not_there(tmp_path):
    def killed():
        yield np.arange(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "x", killed(), vocab_size=32, shard_tokens=8)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([[1], [2, 32]], r"arrays\[1\]: expected ids from 0 to 31; got 32"),
        ([[-1]], r"arrays\[0\]: expected ids from 0 to 31; got -1"),
        ([[], []], "arrays: expected at least one id; got none"),
        ([[1, 2], [1.5]], r"arrays\[1\]: expected integers \[num_tokens\]; got float64 \[1\]"),
        ([[[1, 2]]], r"arrays\[0\]: expected integers \[num_tokens\]; got int64 \[1, 2\]"),
    ],
)
def test_what_cannot_be_written(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        write_shards(
            tmp_path / "x", [np.array(a) if a else np.array([], int) for a in arrays], vocab_size=32
        )
    assert not (tmp_path / "x").exists()


def test_windows_overlap_by_one_and_never_cross_a_shard(tmp_path):
    sizes = (9, 8, 30, 17)
    for name, size in zip("abcd", sizes, strict=True):
        save(tmp_path / f"{name}.npy", np.arange(size) + 100 * ord(name) - 9700)
    (tmp_path / "README").touch()
    source = TokenSource(tmp_path, 8, VOCAB)
    assert source.num_tokens == sum(sizes)
    starts = [0, 200, 208, 216, 300, 308]
    assert source.num_windows == len(starts)
    for index, start in enumerate(starts):
        assert source.window(index).tolist() == list(range(start, start + 9))
    assert source.window(0).dtype == np.int64


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "u4", "i8"])
def test_integers_of_any_kind(tmp_path, dtype):
    file = save(tmp_path / "x.npy", np.arange(20), dtype)
    assert TokenSource(file, 8, VOCAB).window(1).tolist() == list(range(8, 17))


def test_more_shards_than_are_kept_open(tmp_path):
    for number in range(70):
        save(tmp_path / f"{number:02}.npy", np.arange(9) + number)
    source = TokenSource(tmp_path, 8, VOCAB)
    assert [source.window(n)[0] for n in range(70)] == list(range(70))


def test_many_sources_keep_few_files_open(tmp_path):
    for number in range(3 * 64):
        save(tmp_path / f"{number % 3}" / f"{number}.npy", np.arange(9))
    before = len(os.listdir("/proc/self/fd"))
    data = Mixture([(tmp_path / name, 1.0) for name in "012"], CONFIG, VOCAB)
    data.batch(0)
    assert len(os.listdir("/proc/self/fd")) - before <= 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 9), np.int32), r"expected integers \[num_tokens\]; got int32 \[3, 9\]"),
        (np.zeros(9), r"expected integers \[num_tokens\]; got float64 \[9\]"),
        (np.zeros(8, np.int32), r"more than seq_len \(8\) ids; got 8 at most"),
        (np.zeros(0, np.int32), r"more than seq_len \(8\) ids; got 0 at most"),
        (np.array([{}]), "expected a whole .npy file of integers"),
    ],
)
def test_sources_that_are_none(tmp_path, content, message):
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        TokenSource(tmp_path / "x.npy", 8, VOCAB)


def test_files_that_are_no_shards(tmp_path):
    for path in (tmp_path, tmp_path / "none.npy"):
        with pytest.raises(FileNotFoundError, match=r"expected a \.npy file or a directory"):
            TokenSource(path, 8, VOCAB)
    whole = save(tmp_path / "x.npy", np.arange(500)).read_bytes()
    for content in (whole[:-1], whole[:70], whole[:3], b"", b"PK\3\4" + b"x" * 50, b"text"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npy: expected a whole \.npy file"):
            TokenSource(tmp_path / "x.npy", 8, VOCAB)


@pytest.mark.parametrize(
    ("found", "other"),
    [
        (b"(500,)", b"(500, "),
        (b"'<u2'", b"'<,2'"),
        (b"'<u2'", b"'<02'"),
        (b"(500,), }                     ", b"(%d,), }" % 10**20),
        (b"(500,), }", b"(True,), }"),
    ],
)
def test_damaged_headers(tmp_path, found, other):
    """Which numpy refuses in as many ways: as tokens, as Python, as a type, as sizes."""
    whole = save(tmp_path / "x.npy", np.arange(500)).read_bytes()
    head, rest = whole[:128], whole[128:]
    damaged = head.replace(found, other)
    (tmp_path / "x.npy").write_bytes(damaged[:127].rstrip(b"\n").ljust(127) + b"\n" + rest)
    assert damaged != head
    with pytest.raises(ValueError, match=r"x\.npy: expected a whole \.npy file"):
        TokenSource(tmp_path / "x.npy", 8, VOCAB)


def test_ids_beyond_the_vocabulary_name_their_shard(tmp_path):
    save(tmp_path / "x.npy", [*range(17), 64, *range(16)])
    source = TokenSource(tmp_path, 8, 64)
    source.window(1)
    with pytest.raises(ValueError, match=r"x\.npy: expected ids from 0 to 63; got 64"):
        source.window(2)
    negative = TokenSource(save(tmp_path / "y.npy", [-1] * 9, "i4"), 8, 64)
    with pytest.raises(ValueError, match=r"y\.npy: expected ids from 0 to 63; got -1"):
        negative.window(0)


weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def mixture(weights, **config):
    """Of no sources, for its order alone."""
    made = object.__new__(Mixture)
    made._weights = [weight / sum(weights) for weight in weights]
    made._config = replace(CONFIG, **config)
    return made


@settings(max_examples=100, deadline=None)
@given(weights=weights, batch_size=st.integers(1, 9), start=st.integers(0, 10**9))
def test_rows_are_those_of_a_queue_of_deadlines(weights, batch_size, start):
    """From the first step on, and from a late step on as though all before had been run."""
    some = mixture(weights, batch_size=batch_size)
    w = some._weights
    for first in (0, start):
        counts = some.counts(first * batch_size)
        queue = [((n + 0.5) / w[s], s, n) for s, n in enumerate(counts)]
        heapq.heapify(queue)
        for step in range(first, first + 30):
            for row in some.rows_of(step):
                _, source, number = heapq.heappop(queue)
                assert row == (source, number)
                heapq.heappush(queue, ((number + 1.5) / w[source], source, number + 1))


@settings(max_examples=200, deadline=None)
@given(weights=weights, num_rows=st.integers(0, 10**10))
def test_every_prefix_has_the_weights(weights, num_rows):
    some = mixture(weights)
    counts = some.counts(num_rows)
    assert sum(counts) == num_rows
    for count, weight in zip(counts, some._weights, strict=True):
        assert abs(count - num_rows * weight) <= 0.5 + weight * len(weights) / 2 + 1e-5
    following = some.counts(num_rows + 1)
    assert sorted(b - a for a, b in zip(counts, following, strict=True))[-1] == 1


def test_equal_weights_take_turns():
    assert [s for step in range(3) for s, _ in mixture([2, 2, 2]).rows_of(step)] == [0, 1, 2] * 4


def test_no_window_comes_twice_in_an_epoch_and_epochs_differ(pair):
    data = Mixture(pair, CONFIG, VOCAB)
    firsts = {0: [], 1: []}
    for step in range(4 * 26):
        for row in data.batch(step).tolist():
            assert row == list(range(row[0], row[0] + 9))
            firsts[row[0] >= 500].append(row[0])
    assert len(firsts[0]) == 12 * 26 and len(firsts[1]) == 4 * 26
    for source, num_windows in ((0, 26), (1, 7)):
        epochs = [
            tuple(firsts[source][i : i + num_windows])
            for i in range(0, len(firsts[source]) - num_windows + 1, num_windows)
        ]
        assert {len(set(epoch)) for epoch in epochs} == {num_windows}
        assert len({frozenset(epoch) for epoch in epochs}) == 1
        assert len(set(epochs)) == len(epochs)


def test_batches_depend_on_seed_and_step_alone(pair):
    backwards = Mixture(pair, CONFIG, VOCAB)
    late = [backwards.batch(step) for step in reversed(range(20))][::-1]
    forwards = Mixture(pair, CONFIG, VOCAB)
    assert all(forwards.batch(step).equal(late[step]) for step in range(20))
    other = Mixture(pair, replace(CONFIG, seed=1), VOCAB)
    assert not all(other.batch(step).equal(late[step]) for step in range(3))


def test_shares_are_the_tokens_of_the_batches(pair):
    (a, _), (b, _) = pair
    shares = Mixture(pair, CONFIG, VOCAB).shares(10)
    assert shares == {str(a): (30 * 8, 30 / 26), str(b): (10 * 8, 10 / 7)}


def test_identity_tells_data_apart(pair, tmp_path):
    (a, _), (b, _) = pair
    identity = Mixture(pair, CONFIG, VOCAB).identity()
    assert identity["num_tokens"] == [219, 57] and identity["weights"] == [0.75, 0.25]
    assert Mixture([(a, 6.0), (b, 2.0)], CONFIG, VOCAB).identity() == identity
    assert Mixture([(a, 1.0), (b, 2.0)], CONFIG, VOCAB).identity() != identity
    a.rename(tmp_path / "moved")
    a = tmp_path / "moved"
    assert Mixture([(a, 3.0), (b, 1.0)], CONFIG, VOCAB).identity() == identity
    save(b, [*range(500, 556), 1])
    assert Mixture([(a, 3.0), (b, 1.0)], CONFIG, VOCAB).identity()["crc32"] != identity["crc32"]


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan, 1e-101, 1e101])
def test_weights_are_positive(pair, weight):
    with pytest.raises(ValueError, match=r"a: expected a positive weight, from 1e-100 to 1e"):
        Mixture([(pair[0][0], weight)], CONFIG, VOCAB)


def test_the_smallest_weight_beside_the_largest(pair):
    (a, _), (b, _) = pair
    data = Mixture([(a, 1e-100), (b, 1e100)], CONFIG, VOCAB)
    assert data.counts(10**6) == [0, 10**6]


def test_every_shard_is_there_once(pair):
    for twice in ([*pair, pair[1]], [*pair, (pair[0][0] / "1.npy", 1.0)]):
        with pytest.raises(ValueError, match=r"expected every shard once; got .*\.npy twice"):
            Mixture(twice, CONFIG, VOCAB)
    with pytest.raises(ValueError, match="sources: expected at least one; got none"):
        Mixture([], CONFIG, VOCAB)
