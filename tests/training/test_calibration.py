"""Which sequences an event is calibrated on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import HALF_FFN, UserModule, half, loader, trainer
from tiny import random_tokens, tiny_model
from tiny_pruning import basic
from torch.utils.data import DataLoader, IterableDataset

from fasp_lightning import FASPPruner
from fasp_lightning.training.calibration import Draw


def drawn(draw: Draw, *process: int) -> torch.Tensor:
    """All token ids of one process's part."""
    return torch.cat([one["input_ids"] for one in draw.batches(*process)])


def test_calibration_is_drawn_anew_for_each_event_from_the_seed_alone() -> None:
    data = loader(40)

    def draw(event: int, seed: int = 0) -> list[Any]:
        return drawn(Draw(data, 8, seed, event)).tolist()

    torch.manual_seed(1)
    first, state = draw(0), torch.get_rng_state()
    assert first == draw(0)
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 8
    assert first != draw(1)
    assert first != draw(0, seed=1)


def test_processes_split_the_draw_of_one() -> None:
    data = loader(40)
    whole = drawn(Draw(data, 8, 0, 3))
    parts = [drawn(Draw(data, 8, 0, 3), rank, 2) for rank in (0, 1)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


def test_iterable_training_data_gives_each_event_its_window() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return (torch.full((3,), index) for index in range(100))

    data = DataLoader(Stream(), batch_size=2)
    windows = [drawn(Draw(data, 4, 0, event))[:, 0].tolist() for event in (0, 1)]
    assert windows == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_loader_that_does_not_batch_by_itself_gives_as_many_sequences() -> None:
    data = DataLoader([random_tokens(4, seed=seed) for seed in range(6)], batch_size=None)
    assert len(drawn(Draw(data, 8, 0, 0))) == 8


@pytest.mark.parametrize(
    "batch",
    [{"input_ids": random_tokens(), "labels": random_tokens()}, (random_tokens(), 1), [{"input_ids": random_tokens()}]],
    ids=["mapping", "tuple", "list"],
)
def test_batches_of_users_are_understood(batch: Any) -> None:
    data = DataLoader([batch], batch_size=1, collate_fn=lambda found: found[0])
    (found,) = Draw(data, 1, 0, 0).batches()
    assert torch.equal(found["input_ids"], random_tokens())


def test_own_calibration_data_is_used(tmp_path: Any) -> None:
    class WithCalibration(UserModule):
        def calibration_dataloader(self) -> Any:
            return DataLoader([random_tokens(1, seed=seed)[0] for seed in range(50, 54)], batch_size=2)

    module = WithCalibration(tiny_model("llama").train(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer(tmp_path, half(0), max_steps=1).fit(module, loader())
    expected = tiny_model("llama")
    config = basic(HALF_FFN, attention="none")
    FASPPruner(config).prune(expected, [random_tokens(1, seed=seed) for seed in range(50, 54)])
    assert module.lm.fasp_plan == expected.fasp_plan


def test_all_that_a_batch_holds_reaches_the_engine() -> None:
    tokens = random_tokens(1)
    batch = {"input_ids": tokens, "position_ids": torch.arange(12)[None] % 5, "labels": tokens, "weight": 2.0}
    data = DataLoader([batch], batch_size=1, collate_fn=lambda found: found[0])
    (found,) = Draw(data, 1, 0, 0).batches()
    assert found == batch
