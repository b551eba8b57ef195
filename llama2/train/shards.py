"""Token shards on disk, and batches from a weighted mixture of them, without loading them whole.

A shard is a `.npy` file of token ids, integers `[num_tokens]`; a source is a shard or a directory
of them. Documents follow each other, each from BOS to EOS.
"""

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.storage import reading
from llama2.train.pretrain import TrainConfig

_OPEN_SHARDS = 64  # each holds a file descriptor
_EDGE = 2**16  # ids at each end of a shard that go into its checksum
_WEIGHTS = (1e-100, 1e100)  # their sums and shares neither overflow nor underflow


def write_shards(
    folder: Path, arrays: Iterable[np.ndarray], *, vocab_size: int, shard_tokens: int = 2**26
) -> None:
    """Writes the ids of `arrays`, one after another, as a directory of shards.

    Ids are uint16 if the vocabulary allows, otherwise uint32. The directory gets its name once it
    is complete; leftovers of a killed process are overwritten.

    Args:
        arrays: integers `[num_tokens]` each, such as documents.
        shard_tokens: ids per shard; the last may have fewer.
    Raises:
        FileExistsError: `folder` exists.
        ValueError: an array is not integers `[num_tokens]`, an id is not in [0, vocab_size), or
            there are no ids.
    """
    if folder.exists():
        raise FileExistsError(
            f"{folder}: expected a path that does not exist; got a file or directory"
        )
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: expected at least 1; got {shard_tokens}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shard = np.empty(shard_tokens, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)
    filled = num_shards = 0
    for number, tokens in enumerate(arrays):
        _check_kind(f"arrays[{number}]", tokens)
        _check_ids(f"arrays[{number}]", tokens, vocab_size)
        while len(tokens):
            taken, tokens = np.split(tokens, [shard_tokens - filled])
            shard[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == shard_tokens:
                np.save(partial / f"shard-{num_shards:05}.npy", shard)
                filled, num_shards = 0, num_shards + 1
    if filled:
        np.save(partial / f"shard-{num_shards:05}.npy", shard[:filled])
    elif not num_shards:
        raise ValueError("arrays: expected at least one id; got none")
    os.replace(partial, folder)


def _check_kind(name: str, tokens: np.ndarray) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected integers [num_tokens]; got {tokens.dtype} {list(tokens.shape)}"
        )


def _check_ids(name: str, tokens: np.ndarray, vocab_size: int) -> None:
    for value in (tokens.min(), tokens.max()) if len(tokens) else ():
        if not 0 <= value < vocab_size:
            raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}; got {value}")


def _open(file: Path) -> np.ndarray:
    """Returns a memory-mapped shard."""
    with reading(file, "expected a whole .npy file of integers;"):
        shard = np.lib.format.open_memmap(file, mode="r")  # never unpickles, unlike np.load
    _check_kind(str(file), shard)
    return shard


def _opener() -> Callable[[Path], np.ndarray]:
    """Returns an `_open` that keeps the most recently used shards open."""
    return lru_cache(_OPEN_SHARDS)(_open)


class TokenSource:
    """The windows of one source: `seq_len + 1` ids each, overlapping by one.

    Every id of a shard except the first is predicted in one window, except ids at the end that do
    not fill one; no window spans two shards. Shards are in the order of their names.

    Attributes:
        files: the shards.
        num_tokens: ids in all shards.
        num_windows: windows in all shards.

    Args:
        path: a `.npy` file, or a directory whose `.npy` files are the shards.
        open_shard: memory-maps a file; sources may share one, and with it the open files.
    Raises:
        FileNotFoundError: there is no `.npy` file.
        ValueError: a shard is not a complete `.npy` file of integers `[num_tokens]`, or no shard
            fills a window.
    """

    def __init__(
        self,
        path: Path,
        seq_len: int,
        vocab_size: int,
        open_shard: Callable[[Path], np.ndarray] | None = None,
    ) -> None:
        self.files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not self.files or not self.files[0].is_file():
            raise FileNotFoundError(
                f"{path}: expected a .npy file or a directory of them; got none"
            )
        self._seq_len, self._vocab_size = seq_len, vocab_size
        self._open = _opener() if open_shard is None else open_shard
        lengths = [len(self._open(file)) for file in self.files]
        self.num_tokens = sum(lengths)
        # The cumulative number of windows at the end of each shard.
        self._ends = np.cumsum([max(length - 1, 0) // seq_len for length in lengths])
        self.num_windows = int(self._ends[-1])
        if not self.num_windows:
            raise ValueError(
                f"{path}: expected a shard of more than seq_len ({seq_len}) ids; "
                f"got {max(lengths)} at most"
            )

    def window(self, index: int) -> np.ndarray:
        """Returns window `index`, from 0 to num_windows − 1, as int64 `[seq_len + 1]`.

        Raises:
            ValueError: an id is not in the vocabulary; names the shard.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        start = (index - first) * self._seq_len
        ids = self._open(self.files[number])[start : start + self._seq_len + 1]
        _check_ids(str(self.files[number]), ids, self._vocab_size)
        return ids.astype(np.int64)

    def crc32(self) -> int:
        """Returns the CRC-32 of the shards' lengths and of the ids at both ends, not of all ids."""
        value = 0
        for file in self.files:
            shard = self._open(file)
            for part in (np.array([len(shard)]), shard[:_EDGE], shard[-_EDGE:]):
                value = zlib.crc32(part.astype("<i8").tobytes(), value)
        return value


class Mixture:
    """The batches of a run from several sources in proportion to their weights.

    Row n = step · batch_size + i of the run is chosen by stride scheduling: the j-th row of source
    s has the deadline (j + ½) / w_s, where the weights w sum to 1; rows are ordered by deadline,
    ties by s. Of the first n rows, source s has n · w_s, within ½ + w_s · num_sources / 2. Its j-th
    row is a window chosen by a permutation per source and epoch, so that every window is used once
    before any is repeated. All of this is determined by the step and the configuration: a resumed
    run needs no state.

    Reference: Waldspurger and Weihl 1995, MIT/LCS/TM-528.

    Args:
        sources: paths, as for `TokenSource`, and weights, which need not sum to 1.
        config: its batch_size, seq_len and seed, that of the permutations, are used.
        vocab_size: ids must be below it.
        texts: digests of the texts from which the sources were made, for the run's identity:
            `TokenSource.crc32` does not cover all ids.
    Raises:
        FileNotFoundError, ValueError: as `TokenSource`; a weight is not in [1e-100, 1e100], a shard
            occurs twice, or there is no source.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path, float]],
        config: TrainConfig,
        vocab_size: int,
        texts: list[str] | None = None,
    ) -> None:
        if not sources:
            raise ValueError("sources: expected at least one; got none")
        for path, weight in sources:
            if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
                raise ValueError(
                    f"{path}: expected a positive weight, from {_WEIGHTS[0]} to {_WEIGHTS[1]}; "
                    f"got {weight}"
                )
        self._names = [str(path) for path, _ in sources]
        sizes, open_shard = (config.seq_len, vocab_size), _opener()
        self._sources = [TokenSource(path, *sizes, open_shard) for path, _ in sources]
        seen = set()
        for file in (file for source in self._sources for file in source.files):
            if file.resolve() in seen:
                raise ValueError(f"sources: expected every shard once; got {file} twice")
            seen.add(file.resolve())
        total = math.fsum(weight for _, weight in sources)
        self._weights = [weight / total for _, weight in sources]
        self._config, self._texts = config, texts
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of the current epoch, by source

    def counts(self, num_rows: int) -> list[int]:
        """Returns how many of the first `num_rows` rows of a run come from each source."""
        # By the time t the sources have Σ floor(t · w + ½) rows, within half their number of t. So
        # these are less than num_rows, and all due before the last of those.
        time = num_rows - len(self._weights)
        counts = [max(0, math.floor(time * weight + 0.5)) for weight in self._weights]
        while sum(counts) < num_rows:
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: Sequence[int]) -> int:
        deadlines = [(n + 0.5) / w for n, w in zip(counts, self._weights, strict=True)]
        return deadlines.index(min(deadlines))

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """Returns (s, j) of each row of a batch: it is the j-th row of source s in this run, both
        from 0."""
        counts, rows = self.counts(step * self._config.batch_size), []
        for _ in range(self._config.batch_size):
            source = self._next(counts)
            rows.append((source, counts[source]))
            counts[source] += 1
        return rows

    def batch(self, step: int) -> Tensor:
        """Returns int64 `[batch_size, seq_len + 1]`.

        Raises:
            ValueError: an id is not in the vocabulary; names the shard.
        """
        windows = [self._sources[s].window(self._window_of(s, j)) for s, j in self.rows_of(step)]
        return torch.from_numpy(np.stack(windows))

    def _window_of(self, source: int, row: int) -> int:
        num_windows = self._sources[source].num_windows
        epoch, place = divmod(row, num_windows)
        if self._orders.get(source, (None,))[0] != epoch:
            order = np.arange(num_windows, dtype=np.uint32)
            np.random.default_rng([self._config.seed, source, epoch]).shuffle(order)
            self._orders[source] = (epoch, order)
        return int(self._orders[source][1][place])

    def shares(self, steps: int) -> dict[str, tuple[int, float]]:
        """Returns (tokens, epochs) of each source in the first `steps` steps, by its path."""
        counts = self.counts(steps * self._config.batch_size)
        return {
            name: (count * self._config.seq_len, count / source.num_windows)
            for name, source, count in zip(self._names, self._sources, counts, strict=True)
        }

    def identity(self) -> dict[str, Any]:
        return {
            "num_tokens": [source.num_tokens for source in self._sources],
            "crc32": [source.crc32() for source in self._sources],
            "weights": self._weights,
            "texts": self._texts,
        }
