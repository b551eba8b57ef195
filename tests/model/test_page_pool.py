"""Pages, references, and what is kept for whom."""

import random

import pytest

from llama2.cache.page_pool import OutOfPages, PagePool, page_digests


def digests(*tokens: int, page_size: int = 1) -> list[bytes]:
    return list(page_digests(tokens, page_size))


def test_a_digest_is_of_everything_up_to_its_page():
    whole = digests(1, 2, 3, 4, 5, page_size=2)
    assert len(whole) == 2
    assert digests(1, 2, 3, 4, page_size=2) == whole
    assert digests(1, 2, 3, 5, page_size=2)[0] == whole[0]
    assert digests(1, 2, 3, 5, page_size=2)[1] != whole[1]
    assert digests(0, 2, 3, 4, page_size=2)[1] != whole[1]
    assert digests(1, 2, 3, 4, page_size=4) != whole[1:]
    assert list(page_digests([3, 4], 2, whole[0])) == whole[1:]
    assert digests() == digests(1, page_size=2) == []


def test_pages_come_back():
    pool = PagePool(3)
    first = pool.take(2)
    assert pool.num_free == 1 and [pool.references(page) for page in first] == [1, 1]
    with pytest.raises(OutOfPages, match="num_pages: expected 2 free pages; got 1"):
        pool.take(2)
    assert pool.num_free == 1
    pool.refer(first)
    pool.release(first)
    assert pool.num_free == 1
    pool.release(first)
    assert pool.num_free == 3 and sorted(pool.take(3)) == [0, 1, 2]


def test_named_contents_are_found_until_pages_run_out():
    pool, names = PagePool(3), digests(7, 8, 9)
    pages = pool.take(2)
    for page, name in zip(pages, names, strict=False):
        pool.name(page, name)
    assert pool.find(names) == pages
    pool.release(pages)
    assert pool.num_free == 3 and pool.find(names) == pages and pool.num_taken(pages) == 2
    (blank,) = pool.take(1)
    assert blank not in pages and pool.find(names) == pages
    assert pool.take(1) == pages[1:]  # what only its predecessor leads to goes first
    assert pool.find(names) == pages[:1]
    pool.refer(pages[:1])
    assert pool.num_free == 0 and pool.find(names) == pages[:1]


def test_the_least_recently_used_content_goes_first():
    pool, names = PagePool(3), [digests(i)[0] for i in range(3)]
    pages = pool.take(3)
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
        pool.release([page])
    pool.refer([pages[0]])
    pool.release([pages[0]])
    taken = pool.take(2)
    assert taken == [pages[1], pages[2]]
    assert [bool(pool.find([name])) for name in names] == [True, False, False]


def test_what_is_forgotten_is_not_found_and_leaks_nothing():
    pool = PagePool(3)
    pages = pool.take(2)
    for page, name in zip(pages, (b"a", b"b"), strict=True):
        pool.name(page, name)
    pool.release(pages[1:])
    pool.forget()
    assert pool.find([b"a"]) == [] and pool.num_free == 2
    pool.release(pages[:1])
    assert pool.num_free == 3 and sorted(pool.take(3)) == [0, 1, 2]


def test_a_run_ends_where_a_page_is_missing():
    pool, names = PagePool(2), digests(1, 2, 3)
    first, second = pool.take(2)
    pool.name(first, names[0])
    pool.name(second, names[2])
    assert pool.find(names) == [first]


def test_the_first_page_of_a_name_keeps_it():
    pool, (name,) = PagePool(2), digests(1)
    first, second = pool.take(2)
    pool.name(first, name)
    pool.name(second, name)
    pool.release([second])
    assert pool.find([name]) == [first] and pool.take(1) == [second]


def test_two_thousand_random_uses_leak_no_page():
    rng, pool = random.Random(0), PagePool(40)
    held: list[list[int]] = []
    refusals = shared = 0
    for _ in range(2000):
        action = rng.choice(["take", "find", "fork", "release", "release"])
        names = digests(*(rng.randrange(2) for _ in range(rng.randrange(1, 6))))
        if action == "take":
            free = pool.num_free
            try:
                pages = pool.take(len(names))
            except OutOfPages:
                refusals += 1
                assert pool.num_free == free < len(names)
                continue
            for page, name in zip(pages, names, strict=True):
                assert pool.references(page) == 1
                pool.name(page, name)
            held.append(pages)
        elif action == "find":
            pages = pool.find(names)
            shared += len(pages)
            free, taken = pool.num_free, pool.num_taken(pages)
            pool.refer(pages)
            assert pool.num_free == free - taken
            held.append(pages)
        elif held and action == "fork":
            pages = rng.choice(held)
            pool.refer(pages)
            held.append(list(pages))
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        in_use = [page for pages in held for page in pages]
        assert all(pool.references(page) == in_use.count(page) for page in range(40))
        assert pool.num_free == 40 - len(set(in_use))
    assert refusals > 50 and shared > 50, "the test must meet both"
    for pages in held:
        pool.release(pages)
    assert pool.num_free == 40 and sorted(pool.take(40)) == list(range(40))
