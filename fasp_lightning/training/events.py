"""The work of one pruning event: check its data, prune the model, measure its perplexity."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.perplexity import exp_nll
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.pruner import pruner_on
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.text.batches import TokenBatch, read_batch
from fasp_lightning.training.calibration import Draw
from fasp_lightning.training.distilling.distiller import Distiller
from fasp_lightning.training.distilling.loss import summed_divergence
from fasp_lightning.training.metrics import Perplexity
from fasp_lightning.training.progress_bar import pruning_bar
from fasp_lightning.training.sharding.weights import weights_of
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
        bar = pruning_bar(trainer, f"pruning to {config.sparsity:.1%}")
        with bar as progress, weights_of(model, trainer.lightning_module, trainer.optimizers) as weights:
            return pruner_on(weights, config).prune(model, batches, progress, processes)

    with isolated_random_state():
        torch.manual_seed(draw.seed)
        report: PruningReport = prune_attached(trainer, model, prune, attribute, config.whole)
    return report


class Quality(NamedTuple):
    """What a model is worth on validation batches; ``None`` where it was not measured.

    Attributes:
        perplexity: exp(Σ NLL / predicted tokens).
        divergence: Mean KL from the teacher over the same tokens.
    """

    perplexity: float | None = None
    divergence: float | None = None


def validation_quality(
    trainer: Trainer, model: PreTrainedModel, batches: int, distiller: Distiller | None = None
) -> Quality:
    """Perplexity, and divergence from a teacher, on the first validation batches of every loader, over all processes.

    Args:
        trainer: Its validation loaders are read; the random state of its run stays.
        model: The causal LM.
        batches: How many batches of each loader, in each process.
        distiller: Has the teacher that is asked; a batch that it has no answer for leaves no divergence.

    Returns:
        Both figures, none if there is no validation data.
    """
    with isolated_random_state():
        loaders = validation_loaders(trainer)
        if not loaders or batches == 0:
            return Quality()
        examiner = distiller.examiner if distiller else None
        metric, processes, divergence, unknown = Perplexity(sync_on_compute=False), Processes.everyone(), 0.0, 0
        autocast = trainer.precision_plugin.forward_context()
        with processes.together():  # all read first: a sharded model's forward waits for the other processes
            read = [_read_validation(batch) for loader in loaders for batch in islice(loader, batches)]
            inputs_of = ModelInputs(model)
            checked = [inputs_of.checked(given, "validation data") for given in read]
        with processes.together(), evaluating(model), eagerly(), autocast:
            for given, inputs in zip(read, checked, strict=True):
                logits: Tensor = model(**inputs, use_cache=False).logits
                moved = given.to(logits.device)
                metric.to(logits.device).update(logits, moved.targets)
                if distiller and examiner and examiner.knows(moved):
                    divergence += summed_divergence(logits, examiner, moved, distiller.config)
                else:
                    unknown += 1
        nll, kl, tokens, missed = processes.total(float(metric.nll_sum), divergence, float(metric.tokens), unknown)
    if not tokens:
        return Quality()
    return Quality(exp_nll(nll / tokens), None if missed else kl / tokens)


def _read_validation(batch: Any) -> TokenBatch:
    return read_batch(batch, "validation data", "or set validation_batches=0")
