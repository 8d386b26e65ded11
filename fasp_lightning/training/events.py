"""One pruning event: calibrate, prune, measure, and tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.pruner import FASPPruner
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.pruning.standins import evaluating
from fasp_lightning.training.loss import read_batch
from fasp_lightning.training.metrics import Perplexity
from fasp_lightning.training.progress import pruning_bar
from fasp_lightning.training.surgery import eagerly, prune_attached, validation_loaders

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class EventRecord:
    """What one event did; plain numbers.

    Attributes:
        step: Optimizer steps before it.
        sparsity: Fraction of the original blocks' linear parameters that is gone.
        sparsity_total: Fraction of all original parameters that is gone.
        parameters: Parameters left, adapters not counted.
        perplexity_before: On the validation batches, before; ``None`` without validation data.
        perplexity_pruned: Right after.
        perplexity_recovered: At the next event or the end of the run; ``None`` until then.
        seconds: Of calibration and pruning.
    """

    step: int
    sparsity: float
    sparsity_total: float
    parameters: int
    seconds: float
    perplexity_before: float | None = None
    perplexity_pruned: float | None = None
    perplexity_recovered: float | None = None

    def metrics(self) -> dict[str, float]:
        """Name → value for loggers; what was not measured is left out, and what the model itself shows."""
        told = ("seconds", "perplexity_before", "perplexity_pruned", "perplexity_recovered")
        return {f"fasp/{key}": value for key, value in asdict(self).items() if key in told and value is not None}


def prune_model(
    trainer: Trainer,
    model: PreTrainedModel,
    config: PruningConfig,
    batches: Callable[[Processes], Iterable[Any]],
    seed: int,
    attribute: str | None,
) -> PruningReport:
    """Prune the model in a Trainer's run, with all that hangs on it.

    Args:
        trainer: Between two optimizer steps.
        model: The causal LM in its LightningModule.
        config: Settings, the sparsity of this event in it.
        batches: This process's calibration batches.
        seed: What a data set or collate function draws comes from here; the run's own random state stays.
        attribute: Where the model is.
    """
    processes = Processes.everyone()

    def prune() -> PruningReport:
        with pruning_bar(trainer, f"pruning to {config.sparsity:.1%}") as progress:
            return FASPPruner(config).prune(model, batches(processes), progress, processes)

    with isolate_rng():
        torch.manual_seed(seed)
        report: PruningReport = prune_attached(trainer, model, prune, attribute)
    return report


def validation_perplexity(trainer: Trainer, model: PreTrainedModel, batches: int) -> float | None:
    """Perplexity on the first validation batches of every loader, over all processes.

    Args:
        trainer: Its validation loaders are read, its run's random state stays.
        model: The causal LM.
        batches: How many of each loader, in each process.

    Returns:
        exp(Σ NLL / predicted tokens); ``None`` if there is no validation data.
    """
    with isolate_rng():
        loaders = validation_loaders(trainer)
        if not loaders or batches == 0:
            return None
        metric, processes = Perplexity(sync_on_compute=False), Processes.everyone()
        with processes.together(), evaluating(model), eagerly():
            for loader in loaders:
                for batch in islice(loader, batches):
                    _update(metric, model, batch)
        nll, tokens = processes.total(float(metric.nll_sum), float(metric.tokens))
    return math.exp(min(nll / tokens, 700.0)) if tokens else None


def _update(metric: Perplexity, model: PreTrainedModel, batch: Any) -> None:
    inputs, labels = read_batch(batch[0] if isinstance(batch, (list, tuple)) else batch)
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
    metric.to(logits.device).update(logits, labels.to(logits.device))
