"""Samples of products of parameters: ``make test`` runs the sample of a test, ``make laws`` the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest

Case = Mapping[str, str]


def mark_the_rest(items: Sequence[pytest.Item]) -> None:
    """Leave what is not in its test's sample to ``make laws``.

    A test asks for a sample with ``@pytest.mark.sampled`` (each value of each parameter) or
    ``@pytest.mark.sampled(pairs=True)`` (each pair of values of any two parameters).
    """
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        cases = [{name: repr(value) for name, value in item.callspec.params.items()} for item in product]
        taken = covering(cases, **product[0].get_closest_marker("sampled").kwargs)
        for index in set(range(len(product))) - taken:
            product[index].add_marker(pytest.mark.laws)


def covering(cases: Sequence[Case], pairs: bool = False) -> set[int]:
    """A small sample that holds each value that any case has, spread evenly over pairs of values.

    Args:
        cases: Name and value of each parameter of each case; not every product need be there.
        pairs: The sample holds each pair of values too.

    Returns:
        Indices of the sample, the same for the same cases.
    """
    values, couples = ([set(combinations(sorted(case.items()), size)) for case in cases] for size in (1, 2))
    wanted = couples if pairs and len(cases[0]) > 1 else values
    missing, used = set().union(*wanted), Counter[object]()
    taken: set[int] = set()
    while missing:

        def gain(index: int) -> tuple[int, int, int]:
            return len(wanted[index] & missing), -sum(used[couple] for couple in couples[index]), -index  # noqa: B023

        best = max(set(range(len(cases))) - taken, key=gain)
        missing -= wanted[best]
        used.update(couples[best])
        taken.add(best)
    return taken
