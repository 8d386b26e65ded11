"""The forms that a batch may have, and those that are refused."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from fasp_lightning.text.batches import check_vocabulary, each_batch, labelled, read_batch

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": None}])
def test_ids_alone_have_no_mask(batch: Any) -> None:
    found = read_batch(batch)
    assert found.input_ids is IDS
    assert found.attention_mask is None
    assert (found.source, found.tokens) == ("calibration", 6)
    assert set(found.inputs) == {"input_ids"}


@pytest.mark.parametrize("mapping", [dict, BatchEncoding])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_a_mapping_gives_its_ids_and_mask(mapping: type, dtype: torch.dtype) -> None:
    found = read_batch(mapping({"labels": -IDS, "input_ids": IDS, "attention_mask": MASK.to(dtype)}))
    assert found.input_ids is IDS
    assert found.attention_mask is not None
    assert found.attention_mask.tolist() == MASK.tolist()
    assert found.tokens == 5
    assert torch.equal(found.labels, -IDS)


@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("entry", [IDS, {"input_ids": IDS}])
def test_the_first_entry_of_a_sequence_is_read(form: type, entry: Any) -> None:
    """A ``TensorDataset`` gives such batches."""
    assert read_batch(form([entry, MASK])).input_ids is IDS


def test_every_input_of_the_model_is_passed_on() -> None:
    positions = torch.tensor([[0, 1, 0], [0, 1, 2]])
    found = read_batch({"input_ids": IDS, "attention_mask": MASK, "position_ids": positions, "text": ["a", "b"]})
    assert set(found.inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert found.inputs["position_ids"] is positions


def test_without_labels_every_token_but_padding_is_predicted() -> None:
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert read_batch(ids).labels is ids
    assert read_batch({"input_ids": ids, "attention_mask": mask}).labels.tolist() == [[-100, 1, 2], [3, 4, 5]]


def test_a_batch_says_what_it_is_and_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"^validation data must be a tensor of token ids .* got str; set it to 0$"):
        read_batch("text", "validation data", "set it to 0")


def test_batches_of_a_text_name_it() -> None:
    (batch,) = labelled([IDS], "topics (train)", 0.5)
    found = read_batch(batch)
    assert (found.source, found.weight) == ("topics (train)", 0.5)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([[1, 2, 3]], TypeError, "got list"),
        ("text", TypeError, "got str"),
        ({"input_ids": [[1, 2]]}, TypeError, "got list; call the tokenizer with return_tensors='pt'"),
        ({"tokens": IDS}, ValueError, r"'input_ids'.*\['tokens'\]"),
        (IDS.int(), ValueError, r"int64, got torch\.int32.*\.long\(\)"),
        (IDS.float(), ValueError, r"int64, got torch\.float32"),
        ({"input_ids": [IDS[0], IDS[1]]}, TypeError, r"got list of tensors; give the DataLoader .*with_format"),
        (UserDict({"input_ids": IDS.numpy()}), TypeError, r"got ndarray; make one with torch\.as_tensor"),
        (IDS[0], ValueError, r"got shape \(3,\); make a batch of it with \[None\]"),
        (IDS[None], ValueError, r"got shape \(1, 2, 3\)"),
        (IDS[:0], ValueError, r"at least one token, got shape \(0, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1]]}, TypeError, "attention_mask must be a tensor"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, ValueError, r"\(2, 3\), got \(1, 3\)"),
        ({"input_ids": IDS, "attention_mask": MASK.float()}, ValueError, r"got torch\.float32"),
        ({"input_ids": IDS, "labels": [1, 2]}, TypeError, "labels must be a tensor, got list"),
        ({"input_ids": IDS, "labels": IDS[:, :2]}, ValueError, r"labels must have .* \(2, 3\), got \(2, 2\)"),
        ({"input_ids": IDS, "position_ids": IDS.int()}, ValueError, "position_ids must be int64"),
    ],
)
def test_anything_else_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_batch(batch)


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, {"input_ids": IDS, "weight": None}])
def test_a_batch_without_a_weight_counts_once(batch: Any) -> None:
    assert read_batch(batch).weight == 1.0


@pytest.mark.parametrize("weight", [2, 0.25, 1e9])
def test_a_weight_is_any_positive_number(weight: float) -> None:
    assert read_batch({"input_ids": IDS, "weight": weight}).weight == weight


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
        read_batch({"input_ids": IDS, "weight": weight})


@pytest.mark.parametrize("outside", [-1, 7, 2**40])
def test_an_id_outside_the_vocabulary_is_named(outside: int) -> None:
    ids = IDS.clone()
    ids[1, 1] = outside
    with pytest.raises(ValueError, match=rf"\[0, 7\).*got {outside};"):
        check_vocabulary(ids, 7)


def test_every_id_of_the_vocabulary_passes() -> None:
    check_vocabulary(torch.arange(7)[None], 7)


@pytest.mark.parametrize("given", [IDS, {"input_ids": IDS}, BatchEncoding({"input_ids": IDS}), UserDict(input_ids=IDS)])
def test_a_single_batch_is_all_there_are(given: Any) -> None:
    (batch,) = each_batch(given)
    assert read_batch(batch).input_ids is IDS


@pytest.mark.parametrize("given", [[IDS, IDS], torch.stack([IDS, IDS]), iter([{"input_ids": IDS}] * 2)], ids=type)
def test_an_iterable_of_batches_gives_each(given: Any) -> None:
    assert [read_batch(batch).tokens for batch in each_batch(given)] == [6, 6]


@pytest.mark.parametrize("given", ["text", None, 5], ids=str)
def test_what_holds_no_batches_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"must be an iterable .*got {type(given).__name__}; token_batches makes them"):
        each_batch(given)
