"""What a run with the callback refuses before anything is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from fasp_lightning.errors import FaspError
from fasp_lightning.training.calibration import has_calibration_loader
from fasp_lightning.training.modeling.export import check_export, data_tokenizer
from fasp_lightning.training.recovery import MODES
from fasp_lightning.training.rehearsal import cuts_of
from fasp_lightning.training.sharding.checks import check_sharded_run
from fasp_lightning.training.trainer import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fasp_lightning.training.callback import FASPPruning


def check_arguments(recovery: str, calibration_sequences: int, validation_batches: int) -> None:
    """Refuse arguments of the callback that no run could use.

    Raises:
        FaspError: Naming the first of them.
    """
    if recovery not in MODES:
        raise FaspError(f"recovery must be one of {', '.join(map(repr, MODES))}, got {recovery!r}")
    if calibration_sequences < 1:
        raise FaspError(f"calibration_sequences must be at least 1, got {calibration_sequences}")
    if validation_batches < 0:
        raise FaspError(f"validation_batches must be at least 0, got {validation_batches}")


def check_run(
    trainer: Trainer, module: LightningModule, model: PreTrainedModel, callback: FASPPruning, carried: bool
) -> None:
    """Refuse a Trainer, module or model that the callback could not prune in.

    Args:
        trainer: In ``setup``.
        module: Its LightningModule.
        model: The causal LM in it.
        callback: Its settings are read.
        carried: Whether the module's state dict carried the structure before.

    Raises:
        FaspError: Naming what is wrong.
    """
    checks.check_trainer(trainer)
    check_sharded_run(trainer, module, model, callback.pruning, callback.recovery, callback.export_to is not None)
    checks.check_spawn(trainer, module, carried)
    if not has_calibration_loader(trainer, module):
        checks.check_training_source(trainer)
    cuts = cuts_of(model, callback.schedule, callback.pruning)
    if callback.export_to is not None:
        tokenizer = data_tokenizer(trainer)
        check_export(model, callback.export_to, callback.form, callback.overwrite, cuts, tokenizer)
