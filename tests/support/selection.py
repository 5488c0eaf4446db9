"""Which tests `make test` runs: of every parametrised test a few parameter sets, spread over all that it has.

`--select quick` takes them, `rest` all others, `full` everything. A mark changes the number for a test or a file:
`@pytest.mark.quick(0)` leaves it to `rest`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

SELECTIONS = ("full", "quick", "rest")
COUNT = 4  # parameter sets of a test, if it has no mark


def select(items: list[pytest.Item], selected: str) -> list[pytest.Item]:
    """Those of all collected tests that are in this selection, in their order."""
    if selected == "full":
        return items
    names = quick(items)
    return [item for item in items if (item.nodeid in names) == (selected == "quick")]


def quick(items: list[pytest.Item]) -> set[str]:
    """The names (node ids) of the quick tests."""
    tests = defaultdict(list)
    for item in items:
        tests[item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)].append(item)
    return {item.nodeid for sets in tests.values() for item in spread(sets, count_of(sets[0]))}


def count_of(item: pytest.Item) -> int:
    """How many parameter sets of its test are quick."""
    mark = item.get_closest_marker("quick")
    return COUNT if mark is None else mark.args[0]


def spread(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """`count` of a test's parameter sets: each time the one with most values, and pairs of values, that are new.

    Equally good ones are taken in the order first, last, middle, and so on, so that they spread over a plain list.
    """
    chosen, seen, left = [], set(), [items[i] for i in halving(len(items))]
    while left and len(chosen) < count:
        best = max(left, key=lambda item: len(values(item) - seen))
        left.remove(best)
        chosen.append(best)
        seen |= values(best)
    return chosen


def values(item: pytest.Item) -> set:
    """The values of a parameter set, by their places, and all pairs of them."""
    places = sorted(item.callspec.indices.items()) if hasattr(item, "callspec") else []
    return {*places, *itertools.combinations(places, 2)}


def halving(size: int) -> list[int]:
    """All places of a list: the first, the last, then the middles of what lies between those before."""
    found, gaps = list(dict.fromkeys((0, size - 1))), [(0, size - 1)]
    for first, last in gaps:  # grows
        if last - first > 1:
            middle = (first + last) // 2
            found.append(middle)
            gaps += [(first, middle), (middle, last)]
    return found
