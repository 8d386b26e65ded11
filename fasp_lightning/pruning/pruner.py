"""The engine: block after block, later blocks seeing the ones already pruned."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.samples import hold_back
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.budget.allocation import adaptive_widths
from fasp_lightning.pruning.budget.widths import WidthPlan, plan_widths, widths_towards
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.prepare import Prepared, prepare
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Meter, Progress, Stopwatch, peak_memory
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.pruning.round import PruningRun, passes_over
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FASPPruner:
    """Prunes a causal LM in place, in one pass over its blocks (FASP: Fast and Accurate Structured Pruning).

    Args:
        config: The settings; the defaults prune 20 %.
    """

    def __init__(self, config: PruningConfig | None = None) -> None:
        self.config = config or PruningConfig()

    def prune(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any] | Prepared,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> PruningReport:
        """Prune ``model`` in place. Afterwards it carries its plan as ``model.fasp_plan``.

        If this raises half-way, the blocks done so far stay pruned and the model's plan says so.

        Args:
            model: A Hugging Face causal LM of a registered family, pruned before or not.
            batches: Any iterable of (batch, seq) token ids or of mappings with ``input_ids`` and optionally
                ``attention_mask`` and ``weight`` (how much each of its tokens counts); read once. Padding enters no
                statistic. Or what :meth:`prepare` made of them.
            progress: Called after each unit of work.
            processes: Those that hold copies of this model and call this together, each with batches of its own:
                statistics are summed, one solves, all cut alike. By default this process alone.

        Returns:
            Widths, errors, seconds and memory.

        Raises:
            FaspError: Before the first batch is read, if the family is unknown, its shapes do not fit or the
                sparsity cannot be reached; later, if an activation is not finite (the message names the layer).
            RuntimeError: If another process raised an error.
        """
        work = _Work.of(model, self.config, progress, processes)
        if not work.widths.changes:
            record_plan(model, work.pairs)
            return PruningReport.of_widths(work.widths, self.config.to_dict())
        if work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(work.device)
        start = time.perf_counter()
        report = work.prune_in_rounds(batches)
        report.seconds = {**work.watch.seconds, "total": time.perf_counter() - start}
        report.peak_memory = peak_memory(work.device)
        model.fasp_report = report.to_dict()  # type: ignore[assignment]  # saved along
        return report

    def prepare(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> Prepared:
        """What prunings of copies of one model to several sparsities share: own text and loss sensitivity.

        Args:
            model: The model, which stays as it is.
            batches: As for :meth:`prune`, as the other arguments.
            progress: Called after each unit of work.
            processes: Those that call this together.

        Raises:
            FaspError: As :meth:`prune`.
            RuntimeError: If another process raised an error.
        """
        return _Work.of(model, self.config, progress, processes).prepare(batches)


@dataclass(frozen=True)
class _Work:
    """What one call computes with, all of it checked."""

    model: PreTrainedModel
    config: PruningConfig
    widths: WidthPlan
    pairs: list[list[ResolvedPair]]
    device: torch.device
    processes: Processes
    watch: Stopwatch
    meter: Meter

    @classmethod
    def of(
        cls, model: PreTrainedModel, config: PruningConfig, progress: Progress | None, processes: Processes | None
    ) -> _Work:
        widths = plan_widths(model, config)
        pairs = resolve_pruned(model, kv_groups=widths.attention == "kv_groups")
        _require_weights(model)
        device = torch.device(config.device) if config.device else _device_of(pairs)
        meter = Meter(progress, len(pairs))
        return cls(model, config, widths, pairs, device, processes or Processes(), Stopwatch(device), meter)

    def prune_in_rounds(self, batches: Iterable[Any] | Prepared) -> PruningReport:
        """Each round with sensitivity and statistics of what the last one left; own text is the original's."""
        report: PruningReport | None = None
        steps = self._rounds()
        for index, sparsity in enumerate(steps):
            work = self._towards(sparsity, report is None)
            if not work.widths.changes:
                continue  # rounded to the widths that are there
            self.meter.rounds_left = len(steps) - 1 - index
            if not isinstance(batches, Prepared):
                batches = work.prepare(batches, passes_over(work.widths.pairs))
            batches.check(work.pairs, work.config)
            found = work.prune(batches)
            report = found if report is None else report.followed_by(found)
            batches = batches.batches
        assert report is not None
        report.config = self.config.to_dict()
        return report

    def _rounds(self) -> list[float]:
        """Sparsities from the present one to the one asked for, in even steps."""
        widths, last = self.widths, self.config.sparsity
        present = (widths.original_parameters - widths.parameters_before) / widths.linear_parameters
        rounds = self.config.rounds
        return [*(present + (last - present) * done / rounds for done in range(1, rounds)), last]

    def _towards(self, sparsity: float, first: bool) -> _Work:
        """The same work with another sparsity, on the model as it is now."""
        own = self.config.own_text if first else None
        config = replace(self.config, sparsity=sparsity, own_text=own)
        widths = widths_towards(self.model, config)
        pairs = resolve_pruned(self.model, kv_groups=widths.attention == "kv_groups")
        return replace(self, config=config, widths=widths, pairs=pairs)

    def prepare(self, batches: Iterable[Any], passes: int = 0) -> Prepared:
        with TensorStore(self.config.offload, self.device) as store:
            return prepare(
                self.model,
                self.pairs,
                batches,
                self.config,
                store,
                processes=self.processes,
                watch=self.watch,
                meter=self.meter,
                passes=passes,
            )

    def prune(self, prepared: Prepared) -> PruningReport:
        config, widths, spec = self.config, self.widths, spec_for(self.model)
        if config.allocation == "adaptive":
            assert prepared.sensitivity is not None
            widths = adaptive_widths(widths, self.pairs, prepared.sensitivity, config)
        report = PruningReport.of_widths(widths, config.to_dict())
        run = PruningRun(config, self.device, report, self.processes, self.watch, self.meter)
        with evaluating(self.model), TensorStore(config.offload, self.device) as store:
            with self.processes.together(), self.watch.phase("capture"):
                samples = capture(self.model, spec, prepared.batches, config.micro_batch_size, store)
            if config.damping == "auto":
                hold_back(samples)
            try:
                run.prune_blocks(self.pairs, widths.pairs, prepared.sensitivity, samples, store, spec.attention)
            finally:
                record_plan(self.model, self.pairs)
        return report


def _device_of(pairs: list[list[ResolvedPair]]) -> torch.device:
    return next(pairs[0][0].block.parameters()).device


def _require_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise FaspError(
                f"model must have its weights in memory, got {name} on the meta device; load it fully first"
            )
