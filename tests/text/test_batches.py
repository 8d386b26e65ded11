"""The forms that a batch may have, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from fasp_lightning.text.batches import as_inputs, check_vocabulary, weight_of

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": None}])
def test_ids_alone_have_no_mask(batch: Any) -> None:
    input_ids, mask = as_inputs(batch)
    assert input_ids is IDS
    assert mask is None


@pytest.mark.parametrize("mapping", [dict, BatchEncoding])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_a_mapping_gives_its_ids_and_mask(mapping: type, dtype: torch.dtype) -> None:
    input_ids, mask = as_inputs(mapping({"labels": -IDS, "input_ids": IDS, "attention_mask": MASK.to(dtype)}))
    assert input_ids is IDS
    assert mask is not None
    assert mask.tolist() == MASK.tolist()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([[1, 2, 3]], TypeError, "got list"),
        ("text", TypeError, "got str"),
        ({"input_ids": [[1, 2]]}, TypeError, "got list"),
        ({"tokens": IDS}, ValueError, r"'input_ids'.*\['tokens'\]"),
        (IDS.int(), ValueError, r"int64, got torch\.int32.*\.long\(\)"),
        (IDS.float(), ValueError, r"int64, got torch\.float32"),
        (IDS[0], ValueError, r"got shape \(3,\)"),
        (IDS[None], ValueError, r"got shape \(1, 2, 3\)"),
        (IDS[:0], ValueError, r"at least one token, got shape \(0, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1]]}, TypeError, "attention_mask must be a tensor"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, ValueError, r"\(2, 3\), got \(1, 3\)"),
        ({"input_ids": IDS, "attention_mask": MASK.float()}, ValueError, r"got torch\.float32"),
    ],
)
def test_anything_else_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_inputs(batch)


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, {"input_ids": IDS, "weight": None}])
def test_a_batch_without_a_weight_counts_once(batch: Any) -> None:
    assert weight_of(batch) == 1.0


@pytest.mark.parametrize("weight", [2, 0.25, 1e9])
def test_a_weight_is_any_positive_number(weight: float) -> None:
    assert weight_of({"input_ids": IDS, "weight": weight}) == weight


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (0, ValueError, "weight of a batch must be positive and finite, got 0; leave"),
        (-1.5, ValueError, r"got -1\.5"),
        (float("inf"), ValueError, "got inf"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "got bool"),
        (torch.ones(2), TypeError, "weight of a batch must be one number, got Tensor; put"),
    ],
)
def test_any_other_weight_is_refused(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weight_of({"input_ids": IDS, "weight": weight})


@pytest.mark.parametrize("outside", [-1, 7, 2**40])
def test_an_id_outside_the_vocabulary_is_named(outside: int) -> None:
    ids = IDS.clone()
    ids[1, 1] = outside
    with pytest.raises(ValueError, match=rf"\[0, 7\).*got {outside};"):
        check_vocabulary(ids, 7)


def test_every_id_of_the_vocabulary_passes() -> None:
    check_vocabulary(torch.arange(7)[None], 7)
