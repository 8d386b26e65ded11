"""Index arithmetic of a pair, against arrays whose entries say where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasp_lightning.structure.layout import PairLayout

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


def test_ffn_unit_feeds_its_column() -> None:
    assert layout("ffn", None).columns(torch.tensor([2, 5])).tolist() == [2, 5]


def test_size_is_the_head_size_or_the_width() -> None:
    assert (layout("value", None).size, layout("ffn", None).size) == (SIZE, WIDTH)
