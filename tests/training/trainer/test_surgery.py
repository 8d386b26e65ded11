"""What hangs on the model's shapes and metrics follows a cut in the middle of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import UserModule, half, loader, trainer
from tiny import tiny_model

from fasp_lightning.training.modeling.structure_state import KEY
from fasp_lightning.training.trainer import surgery


def fit_half(tmp_path: Any, *others: L.Callback, **options: Any) -> L.Trainer:
    """A trainer whose run has halved the FFN before step 4."""
    torch.manual_seed(0)
    run = trainer(tmp_path, half(4), *others, **options)
    run.fit(UserModule(tiny_model("llama").train()), loader(), loader(4))
    return run


class Spoiling(L.Callback):
    """Makes the pruned model look worse than the dense one, as it usually does."""

    def __init__(self, *losses: float) -> None:
        self.losses = list(losses)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.log("worse", self.losses.pop(0))


def test_best_is_never_the_dense_model(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="worse", filename="{step}")
    stopping = EarlyStopping("worse", patience=2, check_finite=True)
    options = dict(max_steps=-1, max_epochs=6, limit_train_batches=2, enable_checkpointing=True)
    run = fit_half(tmp_path, Spoiling(1.0, 1.1, 9.0, 8.0, 7.0, 7.5), best, stopping, **options)
    assert run.current_epoch == 6  # the dense model's loss did not end the recovery
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert best.best_model_score == 7.0
    assert state["lm.model.layers.0.mlp.down_proj.weight"].shape[1] == 24
    assert KEY in state


def test_learning_rate_does_not_fall_for_want_of_the_dense_models_loss(tmp_path: Any) -> None:
    class Watching(UserModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.plateau, "monitor": "worse"}}

    module = Watching(tiny_model("llama").train())
    spoiling = Spoiling(1.0, 1.1, 9.0, 8.0, 7.0, 6.0)
    run = trainer(tmp_path, half(4), spoiling, max_steps=-1, max_epochs=6, limit_train_batches=2)
    run.fit(module, loader(), loader(4))
    assert module.plateau.best == 6.0
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-2


def test_stale_metric_of_the_dense_model_is_no_score_of_the_pruned(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="worse", filename="{step}", every_n_train_steps=1)
    options = dict(max_steps=6, limit_train_batches=2, enable_checkpointing=True)
    fit_half(tmp_path, Spoiling(1.0, 1.1, 9.0), best, **options)
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert state["lm.model.layers.0.mlp.down_proj.weight"].shape[1] == 24


def test_pairs_are_resolved_once_for_what_follows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []
    resolve = surgery.resolve_pruned

    def counted(model: Any, **options: Any) -> Any:
        resolved.append(model)
        return resolve(model, **options)

    monkeypatch.setattr(surgery, "resolve_pruned", counted)
    fit_half(tmp_path)
    assert len(resolved) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 20), ({"accumulate_grad_batches": 3}, 7), ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, 3)],
)
def test_steps_of_an_epoch_are_those_that_lightning_does(options: dict[str, Any], expected: int, tmp_path: Any) -> None:
    run = trainer(tmp_path, max_steps=-1, max_epochs=1, **options)
    run.fit(UserModule(tiny_model("llama").train()), loader(), loader(4))
    assert surgery.steps_per_epoch(run) == run.global_step == expected


def test_what_is_published_reaches_callbacks_at_once(tmp_path: Any) -> None:
    class Publishing(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            surgery.publish(trainer, {"found": float(trainer.global_step)})
            seen.append(float(trainer.callback_metrics["found"]))

    seen: list[float] = []
    fit_half(tmp_path, Publishing(), log_every_n_steps=50)
    assert seen == [float(step) for step in range(10)]
