"""Near-duplicates, beside a search among all pairs by sets of words."""

import json
import os
import random
import subprocess
import sys

import pytest
from combinations import long

from llama2.train.near_duplicates import _shingles, near_duplicates


def words(seed, count):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh", k=6)) for _ in range(count)]


def similarity(some, others):
    """Jaccard's, of the sets of five words in a row."""
    one, other = (
        {tuple(text.split()[n : n + 5]) for n in range(len(text.split()) - 4)}
        for text in (some, others)
    )
    return len(one & other) / len(one | other)


def test_near_duplicates():
    base = words(0, 200)
    changed = list(base)
    changed[100] = "other"  # 5 of 196 shingles: 191 / 201
    far = list(base)
    far[10::20] = ["other"] * 10  # 50 of 196: 146 / 246
    texts = [" ".join(text) for text in (base, words(1, 200), changed, far, base)]
    texts.append(",\n".join(base).upper())
    assert similarity(texts[0], texts[2]) == pytest.approx(191 / 201)
    assert similarity(texts[0], texts[3]) == pytest.approx(146 / 246)
    assert near_duplicates(texts, 0.8) == [2, 4, 5]
    assert near_duplicates(iter(texts), 0.96) == [4, 5]
    assert near_duplicates(texts, 1) == [4, 5]
    assert near_duplicates(texts, 0.5) == [2, 3, 4, 5]
    assert near_duplicates(reversed(texts), 0.8) == [1, 3, 5]


@pytest.mark.parametrize("threshold", [long(0.1), 0.5, 0.8, long(0.95)])
def test_near_duplicates_are_all_pairs_that_are_similar_enough(threshold):
    """Beside a search among all pairs; some lie just above and just below the threshold."""
    texts = []
    for seed in range(10):
        base = words(seed, 320)
        for changed in (0, 1, 2, 3, 9, 20, 40, 62):
            other = list(base)
            for place in random.Random(seed).sample(range(0, 320, 5), changed):
                other[place] = f"x{place}y{changed}"
            texts.append(" ".join(other))
    kept, expected = [], []
    for number, text in enumerate(texts):
        group = number // 8  # others share no words
        if any(similarity(text, texts[n]) >= threshold for n in kept if n // 8 == group):
            expected.append(number)
        else:
            kept.append(number)
    assert 0 < len(expected) < len(texts)
    assert near_duplicates(texts, threshold) == expected


def test_short_texts_are_duplicates_if_equal():
    texts = ["", "a b c d", "a b c d", "A b c d", "a b c d e", "a b c d e", "...", "", "\ud800"]
    assert near_duplicates(texts, 0.1) == [2, 5, 7]


def test_a_chain_is_cut_where_the_text_between_is_dropped():
    """What is dropped is near a text that stays."""
    base = words(0, 104)  # 100 shingles
    first, middle, last = base[:104], base[8:] + words(1, 8), base[16:] + words(1, 16)
    texts = [" ".join(text) for text in (first, middle, last)]
    assert similarity(*texts[:2]) > 0.8 and similarity(*texts[1:]) > 0.8
    assert similarity(texts[0], texts[2]) < 0.8
    assert near_duplicates(texts, 0.8) == [1]


def test_hashes_are_the_same_in_every_process():
    script = "from llama2.train.near_duplicates import _shingles as shingles\n"
    script += "print(shingles('a b c d E f, é').tolist())"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    hashes = _shingles("A B c d e f - É").tolist()
    assert json.loads(found.stdout) == hashes and len(hashes) == 3


@pytest.mark.parametrize("threshold", [0, 0.05, 1.01, float("nan")])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match=r"threshold: expected from 0\.1 to 1; got"):
        near_duplicates([], threshold)
