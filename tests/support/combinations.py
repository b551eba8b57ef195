"""Chooses few of a test's combinations of parameters."""

import functools
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest

long = functools.partial(pytest.param, marks=pytest.mark.long)  # only for `make test-long`


def covering(
    combinations: Sequence[tuple[Hashable, ...]], at_once: int
) -> set[tuple[Hashable, ...]]:
    """Returns combinations in which every value (at_once 1) or every pair of values (2) of all
    combinations is met."""

    def met(combination):
        return set(itertools.combinations(enumerate(combination), at_once))

    def gain(combination):
        return len(met(combination) & missing), -sum(uses[x] for x in enumerate(combination))

    # Shuffled, and of equally good ones the least used, so that no value is more frequent because
    # it is the first.
    shuffled = random.Random(0).sample(combinations, len(combinations))
    missing, chosen = set().union(*map(met, combinations)), set()
    uses: Counter[tuple[int, Hashable]] = Counter()
    while missing:
        best = max(shuffled, key=gain)
        chosen.add(best)
        uses.update(enumerate(best))
        missing -= met(best)
    return chosen


def mark_the_rest(items: Sequence[pytest.Item]) -> None:
    """Of tests with the mark `covering(at_once)`, gives all combinations of parameters but those
    that `covering` chooses the mark `long`; with `each="name"`, separately for each value of the
    parameter of that name. Tests that are named on the command line with their parameters are run,
    because there are no others to choose from."""
    groups: dict[Hashable, dict[tuple[int, ...], pytest.Item]] = defaultdict(dict)
    for item in items:
        if mark := item.get_closest_marker("covering"):
            values = {name: id(value) for name, value in item.callspec.params.items()}
            key = (item.nodeid.partition("[")[0], *mark.args, values.get(mark.kwargs.get("each")))
            groups[key][tuple(values.values())] = item
    for (_, at_once, _), group in groups.items():
        for combination in group.keys() - covering(list(group), at_once):
            group[combination].add_marker("long")
