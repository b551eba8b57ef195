"""Texts that are nearly those that came before: MinHash and locality-sensitive hashing."""

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

THRESHOLD = 0.8
LEAST_THRESHOLD = 0.1

_SHINGLE = 5  # words
_PERMUTATIONS = 128
_SEED = 1
_LEAST_RECALL = 0.999
_CHUNK = 2**14  # shingles at once, each of which is 8 bytes for every permutation
_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word of a shingle loses bits


class NearDuplicates:
    """Texts that were kept, and whether another is a near-duplicate of one of them.

    Two texts are near-duplicates if the sets A and B of their shingles, five words in a row without
    regard to case and punctuation, have |A ∩ B| / |A ∪ B| ≥ `threshold`; texts of less than five
    words, if they are equal. A word is what `\\w+` matches: in scripts without spaces a whole
    phrase is one.

    Pairs are proposed by MinHash signatures, of which a band of r values has to agree: r is as
    large as finds a pair just at the threshold with a probability of at least 99.9 %, of more
    similar texts more. Their true similarity then decides, of shingles as 64-bit hashes, so that
    nothing is dropped by chance. Seeds and hashes are fixed: the same texts in the same order give
    the same result. Kept are 8 bytes for a distinct shingle, about as much as the text.

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
                f"finding near-duplicates needs {error.name}: pip install gqa-kernels[data]"
            ) from error
        self._threshold = threshold
        # The hashes of the shingles are 64 bits already.
        self._empty = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=int, scheme="affine64")
        self._index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._kept: list[np.ndarray] = []
        self._kept_short: set[bytes] = set()

    def is_near(self, text: str, *, keep: bool) -> bool:
        """Returns whether `text` is a near-duplicate of one that was kept.

        Args:
            keep: from now on `text` is one of those, if it is not.
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
    """Which of the texts to drop so that no near-duplicate of a text that stays comes after it.

    The first of several stays. Each text that is dropped is near one that stays, not only near
    another that is dropped. See `NearDuplicates`.

    Returns:
        indices, in order.
    Raises:
        ImportError, ValueError: as `NearDuplicates`.
    """
    kept = NearDuplicates(threshold)
    return [index for index, text in enumerate(texts) if kept.is_near(text, keep=True)]


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, values in each): of texts just as similar as the threshold, with the probability
    1 − (1 − threshold^r)^bands one band or more agree."""
    for r in range(_PERMUTATIONS // 2, 1, -1):
        bands = _PERMUTATIONS // r
        if 1 - (1 - threshold**r) ** bands >= _LEAST_RECALL:
            return bands, r
    return _PERMUTATIONS, 1


def _shingles(text: str) -> np.ndarray:
    """uint64 `[num_shingles]`: the hashes of the distinct shingles, in ascending order."""
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
