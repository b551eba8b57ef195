"""Detection of near-duplicate texts by MinHash and locality-sensitive hashing."""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from llama2.extras import how_to_install

THRESHOLD = 0.8
LEAST_THRESHOLD = 0.1

_SHINGLE = 5  # words
_PERMUTATIONS = 128
_SEED = 1
_LEAST_RECALL = 0.999
_CHUNK = 2**14  # shingles at once; each takes 8 bytes per permutation
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplication loses no bits


class NearDuplicates:
    """A set of kept texts that detects near-duplicates of them.

    Two texts are near-duplicates if the sets A and B of their shingles, five words in a row without
    regard to case and punctuation, have |A ∩ B| / |A ∪ B| ≥ `threshold`; texts of fewer than five
    words only if they are equal. A word is a match of `\\w+`; in scripts without spaces that is a
    whole phrase.

    Candidate pairs are those whose MinHash signatures agree in a band of r values. r is the largest
    number that finds a pair exactly at the threshold with a probability of at least 99.9 %; more
    similar pairs are found with a higher probability. The exact similarity, on 64-bit hashes of
    shingles, then decides, so that nothing is dropped by chance. Seeds and hashes are fixed: the
    same texts in the same order give the same result. Memory is 8 bytes per distinct shingle, about
    as much as the text.

    References: Broder 1997, "On the resemblance and containment of documents"; Lee et al. 2022,
    arXiv:2107.06499.

    Args:
        threshold: similarity from 0.1 to 1.
    Raises:
        ImportError: a package of the extra `data` is missing.
        ValueError: the threshold is not in that range.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        if not LEAST_THRESHOLD <= threshold <= 1:
            raise ValueError(f"threshold: expected from {LEAST_THRESHOLD} to 1; got {threshold}")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ImportError(
                f"finding near-duplicates needs {error.name}; {how_to_install('data')}"
            ) from error
        self._threshold = threshold
        # Shingles are 64-bit hashes already.
        self._empty = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int, scheme="affine64")
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._kept: list[np.ndarray] = []
        self._kept_short: set[bytes] = set()

    def is_near(self, text: str, *, keep: bool) -> bool:
        """Returns whether `text` is a near-duplicate of one that was kept.

        Args:
            keep: add `text` to the kept texts if it is not a near-duplicate.
        """
        shingles = _shingles(text)
        if not len(shingles):
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
            found = digest in self._kept_short
            if keep:
                self._kept_short.add(digest)
            return found
        signature = self._empty.copy()
        for start in range(0, len(shingles), _CHUNK):
            signature.update_batch(shingles[start : start + _CHUNK].tolist())
        found = any(
            self._are_near(shingles, self._kept[number]) for number in self._index.query(signature)
        )
        if keep and not found:
            self._index.insert(len(self._kept), signature)
            self._kept.append(shingles)
        return found

    def _are_near(self, some: np.ndarray, others: np.ndarray) -> bool:
        shorter, longer = sorted((len(some), len(others)))
        if shorter < self._threshold * longer:
            return False
        common = len(np.intersect1d(some, others, assume_unique=True))
        return common >= self._threshold * (shorter + longer - common)


def near_duplicates(texts: Iterable[str], threshold: float = THRESHOLD) -> list[int]:
    """Returns the indices of the texts to drop, so that no kept text is a near-duplicate of an
    earlier kept one.

    The first of several near-duplicates is kept. Each dropped text is a near-duplicate of a kept
    one, not only of another dropped one. See `NearDuplicates`.

    Returns:
        Indices in ascending order.
    Raises:
        ImportError, ValueError: as `NearDuplicates`.
    """
    kept = NearDuplicates(threshold)
    return [index for index, text in enumerate(texts) if kept.is_near(text, keep=True)]


def _bands(threshold: float) -> tuple[int, int]:
    """Returns (bands, r values in each): for texts exactly as similar as the threshold, at least
    one band agrees with probability 1 − (1 − threshold^r)^bands."""
    for r in range(_PERMUTATIONS // 2, 1, -1):
        bands = _PERMUTATIONS // r
        if 1 - (1 - threshold**r) ** bands >= _LEAST_RECALL:
            return bands, r
    return _PERMUTATIONS, 1


def _shingles(text: str) -> np.ndarray:
    """Returns uint64 `[num_shingles]`, the hashes of the distinct shingles in ascending order."""
    hashes = [_word_hash(word) for word in _WORD.findall(text.casefold())]
    count = max(0, len(hashes) - _SHINGLE + 1)
    words, shingles = np.array(hashes, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
    for place in range(_SHINGLE):  # a polynomial modulo 2^64
        shingles = shingles * np.uint64(_FACTOR) + words[place : place + count]
    return np.unique(shingles)


@lru_cache(2**20)
def _word_hash(word: str) -> int:
    data = word.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
