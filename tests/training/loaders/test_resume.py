"""The law of the loaders: a run stopped at any batch and resumed sees the batches it would have seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_lightning import silent
from tiny_text import words, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fasp_lightning.text import token_shards, token_stream
from fasp_lightning.text.config import TextConfig
from fasp_lightning.training.data import CausalLMDataModule

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|logging interval|eval mode|val_dataloader|treespec).*")

BATCHES, EPOCHS = 5, 3
STOPS = (1, 3, BATCHES - 1, BATCHES, BATCHES + 1, 2 * BATCHES, 2 * BATCHES + 2)
"""Batches trained before the stop: at the start, in the middle and at the end of an epoch, and beyond."""


class Recorder(L.LightningModule):
    """Notes what it is given; one weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.failing: int | None = None

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        if len(self.seen) == self.failing:
            raise RuntimeError("stopped")
        self.seen.append(batch["input_ids"].clone())
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(L.Callback):
    """Writes a checkpoint after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.written += 1
        trainer.save_checkpoint(self.folder / f"batch{self.written}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch + 1}.ckpt")

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "exception.ckpt")


@pytest.fixture
def texts(tmp_path: Path) -> list[TextConfig]:
    """Two corpora."""
    return [
        TextConfig(write_rows(tmp_path / "one.jsonl", words(60)), epoch_weight=2),
        TextConfig(write_rows(tmp_path / "two.jsonl", words(30, seed=1)), epoch_weight=1),
    ]


@pytest.fixture
def make(texts: list[TextConfig], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any) -> Any:
    """A new datamodule, of the same text each time."""
    monkeypatch.setattr(token_stream, "WINDOW", 6)
    monkeypatch.setattr(token_shards, "GROUP_LENGTH", 200)
    other = write_rows(tmp_path / "other.jsonl", words(30, seed=2))

    def new(streamed: bool, workers: int, **options: Any) -> CausalLMDataModule:
        options = {"seq_len": 16, "batch_size": 2, "sequences_per_epoch": 2 * BATCHES} | options
        return CausalLMDataModule(
            tiny_tokenizer,
            train=texts,
            source=other,
            streaming=streamed,
            num_workers=workers,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return new


def fit(data: CausalLMDataModule, folder: Path, ckpt: Path | None = None, **options: Any) -> Recorder:
    """Train a new recorder, from a checkpoint or from the start."""
    module = Recorder()
    module.failing = options.pop("failing", None)
    trainer_in(folder, **{"max_epochs": EPOCHS, "limit_val_batches": 0} | options).fit(module, data, ckpt_path=ckpt)
    return module


def evaluate(data: CausalLMDataModule, folder: Path, ckpt: Path) -> None:
    trainer_in(folder).validate(Recorder(), data, ckpt_path=ckpt, verbose=False)


def trainer_in(folder: Path, **options: Any) -> L.Trainer:
    return silent(folder, **options)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(
    streamed: bool, workers: int, accumulate: int, make: Any, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole = fit(make(streamed, workers), tmp_path, callbacks=[Saver(tmp_path)], **options).seen
    assert len(whole) == BATCHES * EPOCHS
    for stop in STOPS if workers == 0 else STOPS[1::3]:  # a worker takes a while to start
        resumed = fit(make(streamed, workers), tmp_path, tmp_path / f"batch{stop}.ckpt", **options).seen
        assert same(resumed, whole[stop:]), f"stopped after batch {stop}"


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": EPOCHS * BATCHES}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validation", [0, 1])
def test_a_run_resumed_at_the_end_of_an_epoch_goes_on_with_the_next(
    streamed: bool, limits: dict[str, int], validation: int, make: Any, tmp_path: Path
) -> None:
    limits = limits | {"limit_val_batches": validation}
    whole = fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)], **limits).seen
    for epoch in (1, 2):
        resumed = fit(make(streamed, 0), tmp_path, tmp_path / f"epoch{epoch}.ckpt", **limits).seen
        assert same(resumed, whole[epoch * BATCHES :])


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("validation", [0, 1])
def test_a_run_of_so_many_steps_is_resumed(streamed: bool, validation: int, make: Any, tmp_path: Path) -> None:
    options = {"max_epochs": -1, "max_steps": 12, "limit_val_batches": validation}
    whole = fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)], **options).seen
    assert len(whole) == 12
    for stop in STOPS[:-1]:
        resumed = fit(make(streamed, 0), tmp_path, tmp_path / f"batch{stop}.ckpt", **options).seen
        assert same(resumed, whole[stop:]), f"stopped after batch {stop}"


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_a_batch_that_failed_comes_again(streamed: bool, make: Any, tmp_path: Path) -> None:
    whole = fit(make(streamed, 0), tmp_path).seen
    with pytest.raises(RuntimeError, match="stopped"):
        fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)], failing=7)
    assert same(fit(make(streamed, 0), tmp_path, tmp_path / "exception.ckpt").seen, whole[7:])


def test_a_run_resumed_twice_sees_them_too(make: Any, tmp_path: Path) -> None:
    whole = fit(make(False, 0), tmp_path, callbacks=[Saver(tmp_path)]).seen
    (tmp_path / "second").mkdir()
    fit(make(False, 0), tmp_path, tmp_path / "batch3.ckpt", callbacks=[Saver(tmp_path / "second")])
    assert same(fit(make(False, 0), tmp_path, tmp_path / "second" / "batch5.ckpt").seen, whole[8:])


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_two_workers_share_a_stream_by_turns(streamed: bool, make: Any, tmp_path: Path) -> None:
    whole = fit(make(streamed, 2), tmp_path, callbacks=[Saver(tmp_path)]).seen
    assert same(fit(make(streamed, 2), tmp_path, tmp_path / "batch6.ckpt").seen, whole[6:])


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_epochs_cut_short_are_resumed(streamed: bool, make: Any, tmp_path: Path) -> None:
    whole = fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)], limit_train_batches=3).seen
    assert len(whole) == 3 * EPOCHS
    for stop in (2, 3, 4):
        resumed = fit(make(streamed, 0), tmp_path, tmp_path / f"batch{stop}.ckpt", limit_train_batches=3).seen
        assert same(resumed, whole[stop:])


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_loaders_made_anew_each_epoch_change_nothing(streamed: bool, make: Any, tmp_path: Path) -> None:
    anew = fit(make(streamed, 0), tmp_path, reload_dataloaders_every_n_epochs=1).seen
    assert same(anew, fit(make(streamed, 0), tmp_path).seen)


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_evaluating_a_checkpoint_does_not_move_a_later_training(streamed: bool, make: Any, tmp_path: Path) -> None:
    whole = fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)]).seen
    data = make(streamed, 0)
    evaluate(data, tmp_path, tmp_path / "batch3.ckpt")
    assert same(fit(data, tmp_path).seen, whole)


def test_the_same_batches_are_overfitted_each_epoch(make: Any, tmp_path: Path) -> None:
    seen = fit(make(False, 0), tmp_path, overfit_batches=2).seen
    assert same(seen[:2], seen[2:4])


def test_a_text_that_was_only_copied_is_not_warned_of(make: Any, tmp_path: Path, recwarn: Any) -> None:
    fit(make(False, 0), tmp_path, callbacks=[Saver(tmp_path)])
    os.utime(tmp_path / "one.jsonl", (1, 1))
    fit(make(False, 0), tmp_path, tmp_path / "batch3.ckpt")
    assert not [warning for warning in recwarn if "gone on with" in str(warning.message)]


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "stream"])
def test_another_seed_is_warned_of(streamed: bool, make: Any, tmp_path: Path) -> None:
    fit(make(streamed, 0), tmp_path, callbacks=[Saver(tmp_path)])
    with pytest.warns(UserWarning, match="not those that the stopped run would have gone on with"):
        fit(make(streamed, 0, seed=1), tmp_path, tmp_path / "batch3.ckpt")


def test_a_stream_is_not_resumed_with_other_workers(make: Any, tmp_path: Path) -> None:
    fit(make(True, 2), tmp_path, callbacks=[Saver(tmp_path)])
    with pytest.raises(ValueError, match=r"num_workers it was stopped with \(1 and 2\), got 1 and 1"):
        fit(make(True, 1), tmp_path, tmp_path / "batch3.ckpt")
