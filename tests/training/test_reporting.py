"""What a user sees of an event: a table, and TensorBoard."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from runs import FFN_ONLY, UserModule, half, loader, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model

from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.reporting import LAYOUT

TITLES = ("step", "sparsity", "(all)", "parameters", "before", "pruned", "recovered", "seconds")


def fit(tmp_path: Any, *callbacks: Any, **options: Any) -> None:
    run = trainer(tmp_path, *callbacks, **{"enable_progress_bar": True, **options})
    run.fit(UserModule(tiny_model("llama").train()), loader(), loader(4))


def test_table_is_printed_above_the_bar(tmp_path: Any, capsys: Any) -> None:
    fit(tmp_path, half(3), TQDMProgressBar())
    shown = capsys.readouterr()
    assert all(title in shown.out + shown.err for title in TITLES)


def test_table_is_logged_where_there_is_no_bar(tmp_path: Any, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, half(3), enable_progress_bar=False)
    assert all(title in caplog.text for title in TITLES)


def scalars_of(logger: TensorBoardLogger, name: str) -> list[tuple[int, float]]:
    """(step, value) of each point of a chart, in the order in which they were logged."""
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_an_event_at_step_0_is_a_vertical_line_in_tensorboard(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    fit(tmp_path, half(0, validation_batches=1), logger=logger, enable_progress_bar=False)
    (first, dense), (second, pruned), (last, end) = scalars_of(logger, "fasp/sparsity")
    assert (first, second, last) == (0, 0, 10)
    assert dense == 0 < pruned == end
    assert [value for _, value in scalars_of(logger, "fasp_width/model.layers.0.mlp.down_proj")] == [48, 24, 24]
    assert [step for step, _ in scalars_of(logger, "fasp/perplexity")] == [0, 0, 10]


def test_an_event_at_step_0_has_both_structures_in_a_csv(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path, name="run", version="0")
    fit(tmp_path, half(0), logger=logger, enable_progress_bar=False)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fasp/sparsity"]]
    assert [row["step"] for row in rows] == ["0", "0", "10"]
    assert [float(row["fasp_width/model.layers.1.mlp.down_proj"]) for row in rows] == [48, 24, 24]


def test_tensorboard_has_the_whole_story(tmp_path: Any) -> None:
    schedule = [{"step": 2, "sparsity": 0.1}, {"step": 6, "sparsity": 0.2}]
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    callback = FASPPruning(schedule, FFN_ONLY, calibration_sequences=8)
    fit(tmp_path, callback, logger=logger, enable_progress_bar=False, val_check_interval=5)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = events.Tags()["scalars"]

    def steps(name: str) -> list[int]:
        return [event.step for event in events.Scalars(name)]

    assert steps("fasp/perplexity_before") == steps("fasp/perplexity_pruned") == [2, 6]
    assert steps("fasp/perplexity") == steps("fasp/sparsity") == [1, 2, 5, 6, 10]  # stairs
    assert steps("fasp/perplexity_recovered") == [6, 10]
    for block in (0, 1):
        assert steps(f"fasp_width/model.layers.{block}.mlp.down_proj") == [1, 2, 5, 6, 10]
        assert steps(f"fasp_error/model.layers.{block}.mlp.down_proj") == [2, 6]
    assert "val_loss" in scalars
    assert "fasp/events/text_summary" in events.Tags()["tensors"]
    patterns = [one for charts in LAYOUT.values() for _, found in charts.values() for one in found]
    missing = [one for one in patterns if not any(re.fullmatch(one, name) for name in scalars)]
    assert missing == ["train_loss", "train_kl", "^fasp/kl$"]  # which this module does not log: it has no teacher
