"""`make test` runs few of a test's combinations, in which all values or pairs of values are met."""

import itertools
from types import SimpleNamespace

import pytest
from combinations import covering, mark_the_rest

DIMENSIONS = (range(4), "abc", (None, True), ("x", "y", "z"))
PRODUCT = list(itertools.product(*DIMENSIONS))


@pytest.mark.parametrize(("at_once", "fewest"), ((1, 4), (2, 12)))
def test_everything_is_met_in_few(at_once, fewest):
    chosen = covering(PRODUCT, at_once)
    assert chosen <= set(PRODUCT) and fewest <= len(chosen) <= 1.5 * fewest
    for some in itertools.combinations(range(len(DIMENSIONS)), at_once):
        met = {tuple(combination[i] for i in some) for combination in chosen}
        assert met == set(itertools.product(*(DIMENSIONS[i] for i in some)))


def test_values_are_met_about_equally_often():
    chosen = covering(list(itertools.product(range(9), "abc")), 1)
    assert sorted(letter for _, letter in chosen) == list("aaabbbccc")


def test_combinations_that_do_not_exist_are_not_asked_for():
    some = [("a", 1), ("a", 2), ("b", 1)]
    assert covering(some, 2) == set(some)


class Item:
    """What is asked of one of pytest's."""

    def __init__(self, name, mark=None, **params):
        self.nodeid, self.marks = f"{name}[{params}]", []
        self.callspec = SimpleNamespace(params=params)
        self.get_closest_marker = {"covering": mark}.get
        self.add_marker = self.marks.append


def test_the_rest_of_each_group_is_marked():
    mark = pytest.mark.covering(1, each="group").mark
    product = list(itertools.product("gh", "abc", (1, 2, 3)))
    items = [Item("marked", mark, group=g, letter=a, number=n) for g, a, n in product]
    others = [Item("other", letter=a) for a in "abc"] + [Item("named", mark, group="g", letter="a")]
    mark_the_rest([*items, *others])
    assert not any(item.marks for item in others)
    for group in "gh":
        run = [item.callspec.params for item in items if not item.marks]
        run = [params for params in run if params["group"] == group]
        assert sorted(params["letter"] for params in run) == ["a", "b", "c"]
        assert sorted(params["number"] for params in run) == [1, 2, 3]
    assert all(item.marks in ([], ["long"]) for item in items)
