"""What a pruning needs to know of the model as it is: the calibration set, own text in it, and the loss sensitivity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.samples import spread_samples
from fasp_lightning.pruning.blocks.sensitivity import fisher_scores
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.config import PruningConfig, needs_sensitivity
from fasp_lightning.pruning.own_text.writing import calibration_starts, mixed, own_text
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Meter, Stopwatch
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prepared:
    """What prunings of the same model to several sparsities share: plain data, and tensors on the CPU.

    Attributes:
        batches: Calibration batches, own text among them.
        sensitivity: (units left,) loss sensitivity of each pair of each block; ``None`` where no setting asks for it.
    """

    batches: list[Any]
    sensitivity: list[list[Tensor]] | None

    def check(self, pairs: list[list[ResolvedPair]], config: PruningConfig) -> None:
        """Refuse what was prepared for another model, or with other settings.

        Raises:
            FaspError: If there is no sensitivity where ``config`` needs it, or one of other shapes.
        """
        if self.sensitivity is None:
            if needs_sensitivity(config):
                raise FaspError("batches must be prepared with the score and allocation that they are pruned with")
            return
        found = [[scores.numel() for scores in block] for block in self.sensitivity]
        if found != [[pair.kept.numel() for pair in block] for block in pairs]:
            raise FaspError("batches must be prepared with this model as it is, or a copy of it; prepare them anew")


def prepare(
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    batches: Iterable[Any],
    config: PruningConfig,
    store: TensorStore,
    *,
    processes: Processes,
    watch: Stopwatch,
    meter: Meter,
    passes: int = 0,
) -> Prepared:
    """Let the model write its own text, and measure the loss sensitivity of its units.

    Args:
        model: The model as it is.
        pairs: Its pairs.
        batches: Calibration batches, read once.
        config: ``own_text``, ``score``, ``allocation``, ``sensitivity_tokens`` and ``micro_batch_size`` are read.
        store: Where tensors are kept, and on which device to compute.
        processes: Those that call this together.
        watch: Counts seconds by phase.
        meter: Counts units of work.
        passes: Passes over the calibration set that will follow.

    Raises:
        FaspError: If there is no calibration batch, or a gradient or logit is not finite.
    """
    alone = config.own_text is not None and config.own_text.share == 1
    with processes.together():
        batches = [] if alone else list(batches)  # own text alone needs no other
    if config.own_text is not None:
        with watch.phase("own text"), evaluating(model):
            written = own_text(model, config.own_text, processes, calibration_starts(batches, processes))
            batches = mixed(batches, written, config.own_text.share, processes)
    if not needs_sensitivity(config):
        return Prepared(batches, None)
    with watch.phase("sensitivity"), evaluating(model):
        with processes.together():
            samples = capture(model, spec_for(model), batches, config.micro_batch_size, store)
        chosen = spread_samples(samples, config.sensitivity_tokens, processes)
        meter.expect(len(chosen) * len(pairs) + len(samples) * passes)
        sensitivity = fisher_scores(
            model, pairs, chosen, store, processes=processes, tick=lambda block: meter.tick(block, "sensitivity")
        )
    return Prepared(batches, sensitivity)
