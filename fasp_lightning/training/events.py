"""The work of one pruning event: check its data, prune the model, measure its perplexity."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.perplexity import exp_nll
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.pruner import FASPPruner
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.text.batches import TokenBatch, read_batch
from fasp_lightning.training.calibration import Draw
from fasp_lightning.training.metrics import Perplexity
from fasp_lightning.training.progress_bar import pruning_bar
from fasp_lightning.training.trainer.random_state import isolated_random_state
from fasp_lightning.training.trainer.surgery import eagerly, prune_attached, validation_loaders

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_data(trainer: Trainer, model: PreTrainedModel, draw: Draw, validation_batches: int) -> None:
    """Read a calibration batch and a batch of each validation loader, to refuse at the start what events cannot read.

    Args:
        trainer: In ``on_train_start``.
        model: The causal LM.
        draw: The calibration sequences of the first event.
        validation_batches: Batches of each validation loader that perplexity is measured on; with 0 none is read.

    Raises:
        FaspError: If a batch holds no token ids, or the model cannot take it.
    """
    with isolated_random_state():
        processes, inputs = Processes.everyone(), ModelInputs(model)
        with processes.together():
            inputs.check(read_batch(next(draw.batches(processes.rank, processes.count))), "calibration data")
            for loader in validation_loaders(trainer) if validation_batches else ():
                for batch in islice(loader, 1):
                    inputs.check(_read_validation(batch), "validation data")


def prune_model(
    trainer: Trainer, model: PreTrainedModel, config: PruningConfig, draw: Draw, attribute: str | None
) -> PruningReport:
    """Prune the model in a Trainer's run; optimizer states and averaged weights follow.

    Calibration computes in the dtype of the weights, also where the Trainer's precision is mixed: least squares on
    rounded inputs restores no better for the rounded model, and the choice of units is the same. Perplexities, which
    are compared with those of validation, are measured as the Trainer validates.

    Args:
        trainer: Between two optimizer steps, its DDP taken off.
        model: The causal LM in its LightningModule.
        config: Settings, the sparsity of this event in it.
        draw: The calibration sequences of the event. Where reading them draws random numbers (a data set, a collate
            function), these depend on the draw's seed; the run's own random state stays.
        attribute: Path of the model in its LightningModule, or ``None`` where it is the only one.
    """
    processes = Processes.everyone()

    def prune() -> PruningReport:
        batches = draw.batches(processes.rank, processes.count)
        with pruning_bar(trainer, f"pruning to {config.sparsity:.1%}") as progress:
            return FASPPruner(config).prune(model, batches, progress, processes)

    with isolated_random_state():
        torch.manual_seed(draw.seed)
        kv_groups = config.attention == "kv_groups"
        report: PruningReport = prune_attached(trainer, model, prune, attribute, kv_groups)
    return report


def validation_perplexity(trainer: Trainer, model: PreTrainedModel, batches: int) -> float | None:
    """Perplexity on the first validation batches of every loader, over all processes.

    Args:
        trainer: Its validation loaders are read; the random state of its run stays.
        model: The causal LM.
        batches: How many batches of each loader, in each process.

    Returns:
        exp(Σ NLL / predicted tokens); ``None`` if there is no validation data.
    """
    with isolated_random_state():
        loaders = validation_loaders(trainer)
        if not loaders or batches == 0:
            return None
        metric, processes = Perplexity(sync_on_compute=False), Processes.everyone()
        autocast = trainer.precision_plugin.forward_context()
        with processes.together(), evaluating(model), eagerly(), autocast:
            for loader in loaders:
                for batch in islice(loader, batches):
                    _update(metric, model, batch)
        nll, tokens = processes.total(float(metric.nll_sum), float(metric.tokens))
    return exp_nll(nll / tokens) if tokens else None


def _update(metric: Perplexity, model: PreTrainedModel, batch: Any) -> None:
    given = _read_validation(batch)
    logits = model(**ModelInputs(model).checked(given, "validation data"), use_cache=False).logits
    metric.to(logits.device).update(logits, given.targets.to(logits.device))


def _read_validation(batch: Any) -> TokenBatch:
    return read_batch(batch, "validation data", "or set validation_batches=0")
