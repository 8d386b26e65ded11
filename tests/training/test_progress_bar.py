"""A pruning shows how far it is, beside Lightning's own bar."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from runs import UserModule, half, loader, trainer
from tiny import tiny_model

from fasp_lightning.training.progress_bar import pruning_bar


def fit(tmp_path: Any, *callbacks: L.Callback, **options: Any) -> None:
    """A run that shows a bar."""
    run = trainer(tmp_path, *callbacks, **{"enable_progress_bar": True, **options})
    run.fit(UserModule(tiny_model("llama").train()), loader(), loader(4))


def test_tqdm_shows_the_pruning_between_training_bars(tmp_path: Any, capsys: Any) -> None:
    fit(tmp_path, half(3), TQDMProgressBar())
    shown = capsys.readouterr()
    assert "pruning to 26.5%" in shown.err + shown.out
    assert "block 2/2, apply" in shown.err + shown.out


def test_rich_shows_the_pruning_as_a_task_of_its_own(tmp_path: Any) -> None:
    seen: list[tuple[str, float | None, float]] = []

    class Bar(RichProgressBar):
        def refresh(self, hard: bool = False) -> None:
            super().refresh(hard)
            assert self.progress is not None
            seen.extend((task.description, task.total, task.completed) for task in self.progress.tasks)

    bar = Bar()
    fit(tmp_path, half(3), bar)
    pruning = [entry for entry in seen if "pruning to 26.5%" in entry[0]]
    assert pruning[-1][1:] == (16, 16)  # 4 batches, statistics and output of 2 blocks
    assert "pruning" not in seen[-1][0]  # it is gone when the training goes on


def test_there_is_no_progress_to_show_where_there_is_no_bar(tmp_path: Any) -> None:
    with pruning_bar(trainer(tmp_path), "pruning") as progress:
        assert progress is None
