"""Where in which epoch a loader is, whatever number Lightning tells."""

from __future__ import annotations

import pytest

from fasp_lightning.training.loaders.position import Position, warn_of_another_order
from fasp_lightning.training.trainer.resuming import BatchProgress

BATCHES = 5


class Progress(BatchProgress):
    """Of a training that has so many batches in hand, or is over."""

    def __init__(self, in_flight: int = 0, over: bool = False) -> None:
        self._in_flight, self._over = in_flight, over

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def over(self) -> bool:
        return self._over


def after(epoch: int, given: int, progress: BatchProgress | None = None) -> Position:
    """In an epoch, with so many batches given."""
    position = Position(progress or Progress())
    assert position.begin(epoch, BATCHES)
    position.given = given
    return position


def resumed(position: Position) -> Position:
    found = Position(Progress())
    found.load_state_dict(position.state_dict())
    return found


@pytest.mark.parametrize("given", [0, 1, 4])
def test_an_unfinished_epoch_is_gone_on_with(given: int) -> None:
    position = resumed(after(2, given))
    assert position.begin(2, BATCHES)
    assert (position.epoch, position.given) == (2, given)


@pytest.mark.parametrize("told", [2, 3, 4])
def test_a_finished_epoch_is_followed_by_the_next_one_whatever_is_told(told: int) -> None:
    """Lightning repeats a number or passes over one, resumed at an epoch's end."""
    position = resumed(after(2, BATCHES))
    for epoch in range(3, 6):
        assert position.begin(told + epoch - 3, BATCHES)
        assert (position.epoch, position.given) == (epoch, 0)
        position.given = BATCHES


def test_a_state_that_was_loaded_is_given_back_until_a_batch_is() -> None:
    state = after(2, 3).state_dict()
    assert resumed(after(2, 3)).state_dict() == state


def test_a_batch_that_was_not_trained_on_does_not_count() -> None:
    assert after(0, 3, Progress(in_flight=1)).state_dict()["batches"] == 2
    assert after(0, 0, Progress(in_flight=1)).state_dict()["batches"] == 0


def test_nothing_is_given_once_the_training_is_over() -> None:
    assert not Position(Progress(over=True)).begin(0, BATCHES)


def test_the_same_order_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    warn_of_another_order({"order": "one"}, "one")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="another text, tokenizer, seq_len, batch_size, seed or number of processes"):
        warn_of_another_order({"order": "one"}, "two")
