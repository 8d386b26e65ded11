"""Index arithmetic of a pair, against arrays whose entries say where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasp_lightning.structure.layout import Cuts, PairLayout

SIZE, GROUPS, REPEATS = 4, 2, 3
HEADS = GROUPS * REPEATS
WIDTH = GROUPS * SIZE
UNITS = torch.arange(WIDTH).reshape(GROUPS, SIZE)
QUERIES = torch.full((HEADS * SIZE,), -1)
KEYS = torch.full((WIDTH,), -2)

PRODUCERS = {  # for each row the unit that it makes, or a negative number
    ("value", None): UNITS.flatten(),
    ("value", "concatenated"): torch.cat([QUERIES, KEYS, UNITS.flatten()]),
    ("value", "interleaved"): torch.cat(
        [torch.cat([QUERIES[: REPEATS * SIZE], KEYS[:SIZE], UNITS[group]]) for group in range(GROUPS)]
    ),
    ("ffn", None): torch.arange(WIDTH),
    ("ffn", "concatenated"): torch.cat([torch.arange(WIDTH), torch.arange(WIDTH)]),
}


def layout(kind: str, fused: str | None) -> PairLayout:
    groups, repeats = (GROUPS, REPEATS) if kind == "value" else (1, 1)
    rows = (len(PRODUCERS[kind, fused]),)
    return PairLayout(kind, WIDTH, groups, repeats, fused, rows if fused else rows * 2)


def where(made_by: Tensor, units: Tensor) -> list[int]:
    return torch.isin(made_by, units).nonzero().flatten().tolist()


@pytest.mark.parametrize("units", [[0], [1, 3, 4, 6], list(range(WIDTH))], ids=["one", "some", "all"])
@pytest.mark.parametrize(("kind", "fused"), PRODUCERS)
def test_rows_of_units_are_those_that_make_them(kind: str, fused: str | None, units: list[int]) -> None:
    made_by, wanted = PRODUCERS[kind, fused], torch.tensor(units)
    found = layout(kind, fused)
    assert sorted(found.unit_rows(0, wanted).tolist()) == where(made_by, wanted)
    others = torch.tensor([-1, -2])  # queries and keys stay
    assert found.rows(0, wanted).tolist() == where(made_by, torch.cat([others, wanted]))


@pytest.mark.parametrize("units", [[0], [1, 3, 4, 6], list(range(WIDTH))], ids=["one", "some", "all"])
def test_value_unit_feeds_a_column_of_each_query_head_of_its_group(units: list[int]) -> None:
    columns = UNITS.repeat_interleave(REPEATS, dim=0).flatten()  # as repeat_kv hands the values on
    assert layout("value", None).columns(torch.tensor(units)).tolist() == where(columns, torch.tensor(units))


GROUP_ROWS = {  # for each producer, the KV group that each of its rows is part of
    None: [torch.arange(GROUPS).repeat_interleave(REPEATS * SIZE), *[torch.arange(GROUPS).repeat_interleave(SIZE)] * 2],
    "interleaved": [torch.arange(GROUPS).repeat_interleave((REPEATS + 2) * SIZE)],
}
GROUP_ROWS["concatenated"] = [torch.cat(GROUP_ROWS[None])]


def groups_layout(fused: str | None) -> PairLayout:
    return PairLayout("groups", GROUPS, 1, REPEATS, fused, tuple(len(rows) for rows in GROUP_ROWS[fused]))


@pytest.mark.parametrize("units", [[0], [1], [0, 1]], ids=["first", "last", "all"])
@pytest.mark.parametrize("fused", GROUP_ROWS)
def test_rows_of_kv_groups_are_their_queries_keys_and_values(fused: str | None, units: list[int]) -> None:
    found, wanted = groups_layout(fused), torch.tensor(units)
    assert found.head_size == SIZE
    for producer, part_of in enumerate(GROUP_ROWS[fused]):
        assert sorted(found.unit_rows(producer, wanted).tolist()) == where(part_of, wanted)
        assert found.rows(producer, wanted).tolist() == where(part_of, wanted)


def test_kv_group_feeds_all_columns_of_its_query_heads() -> None:
    columns = torch.arange(GROUPS).repeat_interleave(REPEATS * SIZE)
    assert groups_layout(None).columns(torch.tensor([1])).tolist() == where(columns, torch.tensor([1]))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 4, 5, 6]], ids=["all", "uneven"])
def test_score_of_a_value_dim_is_the_sum_over_its_columns(kept: list[int]) -> None:
    found, units = layout("value", None), torch.tensor(kept)
    owners = UNITS.repeat_interleave(REPEATS, dim=0).flatten()
    owners = owners[torch.isin(owners, units)]
    scores = torch.rand(len(owners), dtype=torch.float64)
    expected = torch.stack([scores[owners == unit].sum() for unit in units])
    torch.testing.assert_close(found.unit_scores(scores, units), expected)


def test_score_of_a_kv_group_is_the_sum_over_its_columns() -> None:
    scores = torch.arange(REPEATS * SIZE, dtype=torch.float64)
    assert groups_layout(None).unit_scores(scores, torch.tensor([1])).tolist() == [scores.sum()]


def test_score_of_an_ffn_unit_is_that_of_its_column() -> None:
    assert layout("ffn", None).unit_scores(torch.tensor([3.0, 1.0]), torch.tensor([2, 5])).tolist() == [3.0, 1.0]


def test_ffn_unit_feeds_its_column() -> None:
    assert layout("ffn", None).columns(torch.tensor([2, 5])).tolist() == [2, 5]


def test_size_is_the_head_size_or_the_width() -> None:
    assert (layout("value", None).size, layout("ffn", None).size) == (SIZE, WIDTH)


def test_cuts_add_up() -> None:
    ffn, value = frozenset({"ffn"}), frozenset({"value"})
    assert Cuts(ffn) | Cuts(value, uneven=True) == Cuts(ffn | value, uneven=True)
    assert Cuts(ffn, uneven=True) | Cuts() == Cuts(ffn, uneven=True)


def test_nothing_is_cut_of_a_whole_model() -> None:
    assert Cuts() == Cuts(frozenset(), uneven=False)
