"""Packed sequences as a data set, and the loader over them."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import pytest
import torch

from fasp_lightning.ops.likelihood import IGNORED
from fasp_lightning.text.shuffling import BLANK, TrainingSampler
from fasp_lightning.training.loaders.cached import PackedSequences, ResumableLoader


def packed(*lengths: int) -> PackedSequences:
    """Texts of so many sequences; each holds its number, counted over all of them."""
    rows = iter(range(sum(lengths)))
    return PackedSequences([[{"input_ids": torch.full((4,), next(rows))} for _ in range(one)] for one in lengths])


def loader(order: str = "", seed: int = 0) -> ResumableLoader:
    data = packed(7, 6)
    return ResumableLoader(
        data, batch_size=2, sampler=TrainingSampler(data.lengths, data.lengths, 2, seed, 0, 1), order=order
    )


def numbers(batches: Any) -> list[int]:
    return list(chain(*(batch["input_ids"][:, 0].tolist() for batch in batches)))


def test_a_blank_sequence_has_no_label() -> None:
    packed = PackedSequences([[{"input_ids": torch.arange(4)}]])
    assert packed[BLANK]["labels"].tolist() == [IGNORED] * 4
    with pytest.raises(IndexError):
        packed[1]


def test_texts_stand_end_to_end() -> None:
    data = packed(3, 1, 4)
    assert data.lengths == [3, 1, 4]
    assert [int(data[place]["input_ids"][0]) for place in range(len(data))] == list(range(8))


def test_labels_are_a_copy() -> None:
    item = packed(1)[0]
    assert torch.equal(item["input_ids"], item["labels"])
    assert item["input_ids"] is not item["labels"]


def test_an_epoch_gives_each_sequence_once_but_the_rest() -> None:
    found = numbers(loader())
    assert len(found) == len(set(found)) == 12


@pytest.mark.parametrize("stop", [0, 1, 5, 6])
def test_a_state_goes_on_with_the_next_batch(stop: int) -> None:
    whole, stopped, resumed = loader(), loader(), loader()
    list(islice(stopped, stop))
    if stop:
        resumed.load_state_dict(stopped.state_dict())
    if stop == len(whole):  # of the epoch there is nothing left: the next iteration is the next epoch's
        assert resumed.state_dict()["batches"] == stop
        return
    assert numbers(resumed) == numbers(whole)[2 * stop :]


def test_another_order_is_warned_of() -> None:
    state = loader(order="one").state_dict()
    with pytest.warns(UserWarning, match="not those that the stopped run would have gone on with"):
        loader(order="two").load_state_dict(state)


def test_no_global_random_state_is_drawn_from() -> None:
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)
