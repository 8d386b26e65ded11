"""Scores and selection."""

from __future__ import annotations

import pytest
import torch

from fasp_lightning.ops.scores import magnitude_score, wanda_score
from fasp_lightning.ops.selection import complement, select_columns


def test_wanda_score_is_its_equation() -> None:
    weight, inputs = torch.randn(4, 6), torch.randn(30, 6)
    magnitude = [sum(abs(weight[i, j].item()) for i in range(4)) for j in range(6)]
    expected = [magnitude[j] * inputs[:, j].double().norm().item() for j in range(6)]
    found = wanda_score(weight, inputs.double().norm(dim=0))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_magnitude_score_does_not_overflow_in_half_precision() -> None:
    weight = torch.full((100, 2), 60000.0, dtype=torch.float16)
    assert torch.equal(magnitude_score(weight), 100 * weight[0].double())


def test_the_best_columns_stay_in_ascending_order() -> None:
    scores = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0])
    assert select_columns(scores, 3).tolist() == [0, 2, 4]


def test_every_group_keeps_the_same_number() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 0.1, 0.2, 0.3])
    assert select_columns(scores, 2, groups=2).tolist() == [0, 1, 4, 5]


def test_ties_go_to_the_lower_index() -> None:
    assert select_columns(torch.ones(1000), 3).tolist() == [0, 1, 2]


def test_dead_columns_go_first() -> None:
    norms = torch.ones(8)
    norms[[2, 5]] = 0
    assert set(complement(select_columns(wanda_score(torch.randn(3, 8), norms), 6), 8).tolist()) == {2, 5}


@pytest.mark.parametrize(("keep", "groups"), [(0, 1), (7, 1), (4, 2), (2, 4)])
def test_impossible_selections_are_refused(keep: int, groups: int) -> None:
    with pytest.raises(ValueError, match="must"):
        select_columns(torch.ones(6), keep, groups)


def test_complement_and_kept_partition_the_columns() -> None:
    kept = torch.tensor([1, 4, 5])
    assert sorted(kept.tolist() + complement(kept, 7).tolist()) == list(range(7))
