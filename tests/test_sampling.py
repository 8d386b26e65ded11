"""A sample of a product holds every value, or every pair of values, and is always the same."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
from sampling import Case, covering, mark_the_rest

NAMES = ("family", "saved", "before")
PRODUCT = [dict(zip(NAMES, values, strict=True)) for values in product("abcdefg", "xy", "123")]
HOLES = [case for case in PRODUCT if case["family"] != "a" or case["saved"] == "x"]


def held(cases: list[Case], size: int) -> set[object]:
    return {part for case in cases for part in combinations(sorted(case.items()), size)}


@pytest.mark.parametrize("cases", [PRODUCT, HOLES], ids=["product", "holes"])
@pytest.mark.parametrize(("pairs", "count"), [(False, 7), (True, 21)])
def test_sample_holds_what_any_case_holds(cases: list[Case], pairs: bool, count: int) -> None:
    sample = [cases[index] for index in covering(cases, pairs)]
    assert len(sample) <= count  # the values, or pairs, of the parameters that have most
    assert held(sample, 2 if pairs else 1) == held(cases, 2 if pairs else 1)


def test_values_are_spread_over_pairs_of_the_other_parameters() -> None:
    sample = [PRODUCT[index] for index in covering(PRODUCT)]
    assert {(case["saved"], case["before"]) for case in sample} == set(product("xy", "123"))


@pytest.mark.parametrize("pairs", [False, True])
def test_one_parameter_is_taken_whole(pairs: bool) -> None:
    assert covering([{"family": value} for value in "abc"], pairs) == {0, 1, 2}


class Item:
    """What a sample needs of pytest's items."""

    def __init__(self, test: str, marker: pytest.Mark | None, **params: int) -> None:
        self.nodeid = f"{test}[{params}]"
        self.callspec = SimpleNamespace(params=params)
        self.markers = [marker] if marker else []

    def get_closest_marker(self, name: str) -> Any:
        return next((marker for marker in self.markers if marker.name == name), None)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.markers.append(marker.mark)


def test_what_a_sample_leaves_out_is_left_to_the_laws() -> None:
    marked = {"sampled": pytest.mark.sampled.mark, "pairs": pytest.mark.sampled(pairs=True).mark, "whole": None}
    items = [Item(test, marked[test], a=a, b=b) for test in marked for a in (1, 2) for b in (3, 4)]
    mark_the_rest(items)
    kept = Counter(item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("laws") is None)
    assert kept == {"sampled": 2, "pairs": 4, "whole": 4}
