"""Texts are mixed in the proportion of their weights."""

from __future__ import annotations

import pytest

from fasp_lightning.text.mixing import next_text, shares_of


def test_a_weight_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a sequence of an epoch of 10, got \[10, 0\]; raise the smallest weight"):
        shares_of([10, 10], [1, 0.001], 10)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1.0, 1.0, 1.0]])
def test_any_number_of_choices_is_near_the_shares(weights: list[float]) -> None:
    counts = [0] * len(weights)
    for chosen in range(1, 200):
        counts[next_text(weights, counts)] += 1
        exact = [chosen * weight / sum(weights) for weight in weights]
        assert all(abs(count - share) <= 1 for count, share in zip(counts, exact, strict=True))


def test_choices_agree_with_the_shares_of_an_epoch() -> None:
    weights, counts = [0.5, 0.3, 0.2], [0, 0, 0]
    for _ in range(100):
        counts[next_text(weights, counts)] += 1
    assert counts == shares_of([1, 1, 1], weights, 100)


def test_weights_count_relative_to_each_other() -> None:
    for counts in ([0, 0], [3, 1], [1, 3]):
        assert next_text([2.0, 1.0], counts) == next_text([20.0, 10.0], counts)


@pytest.mark.parametrize("total", [10, 11, 97])
def test_shares_add_up_to_the_epoch(total: int) -> None:
    assert sum(shares_of([10, 20, 30], [1.0, 2.0, 4.0], total)) == total
