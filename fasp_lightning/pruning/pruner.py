"""The engine: block after block, later blocks seeing the ones already pruned."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.ops.scores import magnitude_score, wanda_score
from fasp_lightning.ops.selection import select_columns
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.capture import Sample, capture
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.placement import placed
from fasp_lightning.pruning.plan import record_plan, resolve_pruned
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.replay import BlockReplay
from fasp_lightning.pruning.report import PairReport, PruningReport, Stopwatch, peak_memory
from fasp_lightning.pruning.restore import Restored, restore_pair
from fasp_lightning.pruning.standins import evaluating
from fasp_lightning.pruning.store import TensorStore
from fasp_lightning.pruning.widths import PairWidth, plan_widths
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressEvent:
    """Where a pruning is.

    Attributes:
        block: Index of the block, from 0.
        blocks: Number of blocks.
        phase: ``"statistics"`` or ``"apply"``.
        done: Units of work done.
        total: Units of work in all: calibration pieces times passes over them.
    """

    block: int
    blocks: int
    phase: str
    done: int
    total: int


Progress = Callable[[ProgressEvent], None]


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
        batches: Iterable[Any],
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> PruningReport:
        """Prune ``model`` in place. Afterwards it carries its plan as ``model.fasp_plan``.

        If this raises half-way, the blocks done so far stay pruned and the model's plan says so.

        Args:
            model: A Hugging Face causal LM of a registered family, pruned before or not.
            batches: Any iterable of (batch, seq) token ids or of mappings with ``input_ids`` and optionally
                ``attention_mask``; read once. Padding enters no statistic.
            progress: Called after each unit of work.
            processes: Those that hold copies of this model and call this together, each with batches of its own:
                statistics are summed, one solves, all cut alike. By default this process alone.

        Returns:
            Widths, errors, seconds and memory.

        Raises:
            ValueError: Before the first batch is read, if the family is unknown, its shapes do not fit or the
                sparsity cannot be reached; later, if an activation is not finite (the message names the layer).
            RuntimeError: If another process raised an error.
        """
        widths = plan_widths(model, self.config)
        report = PruningReport.of_widths(widths, self.config.to_dict())
        pairs = resolve_pruned(model, kv_groups=widths.attention == "kv_groups")
        _require_weights(model)
        device = torch.device(self.config.device) if self.config.device else _device_of(pairs)
        if widths.parameters_after == widths.parameters_before:
            record_plan(model, pairs)
            return report
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        run = _Run(self.config, device, report, progress, len(pairs), processes or Processes())
        with evaluating(model), TensorStore(self.config.offload, device) as store:
            try:
                with run.processes.together(), run.watch.phase("capture"):
                    samples = capture(model, spec_for(model), batches, self.config.micro_batch_size, store)
                run.start(samples, widths.pairs)
                for index, block in enumerate(pairs):
                    run.prune_block(index, block, widths.pairs[index], samples, store, spec_for(model).attention)
            finally:
                record_plan(model, pairs)
        report.seconds = {**run.watch.seconds, "total": time.perf_counter() - start}
        report.peak_memory = peak_memory(device)
        model.fasp_report = report.to_dict()  # type: ignore[assignment]  # saved along
        return report


class _Run:
    """One call of :meth:`FASPPruner.prune`: settings, clock, progress and report."""

    def __init__(
        self,
        config: PruningConfig,
        device: torch.device,
        report: PruningReport,
        progress: Progress | None,
        blocks: int,
        processes: Processes,
    ) -> None:
        self.config = config
        self.device = device
        self.report = report
        self.watch = Stopwatch(device)
        self.processes = processes
        self._progress = progress
        self._blocks = blocks
        self._done = self._total = 0

    def start(self, samples: list[Sample], widths: tuple[tuple[PairWidth, ...], ...]) -> None:
        """Count the work, and warn if the calibration set is small."""
        cut = [pair for block in widths for pair in block if pair.after < pair.before]
        self._total = len(samples) * (len(cut) + self._blocks)
        self.report.tokens = int(self.processes.total(sum(sample.tokens for sample in samples))[0])
        widest = max((pair.columns for pair in cut), default=0)
        if self.report.tokens < widest:
            self.warn(
                f"{self.report.tokens} calibration tokens are fewer than the {widest} columns of the widest pair: the "
                "restoration will fit them and little else; give more text or raise damping"
            )

    def warn(self, message: str) -> None:
        """Tell the user now, and in the report."""
        self.report.warnings.append(message)
        warnings.warn(message, stacklevel=4)

    def tick(self, block: int, phase: str) -> None:
        """One unit of work is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(ProgressEvent(block, self._blocks, phase, self._done, self._total))

    def prune_block(
        self,
        index: int,
        pairs: list[ResolvedPair],
        widths: tuple[PairWidth, ...],
        samples: list[Sample],
        store: TensorStore,
        attention: str | None,
    ) -> None:
        """Statistics, selection, restoration and cut of each pair; then the block's output for the next block."""
        block = pairs[0].block
        replay = BlockReplay(block, index, pairs, attention, store, self.watch)
        with placed(block, self.device):
            for pair, width in zip(pairs, widths, strict=True):
                if width.after == width.before:
                    continue
                start = time.perf_counter()
                statistics = GramStatistics(pair.columns, self.device)
                with self.processes.together():
                    for sample in samples:
                        replay.record(pair, sample, statistics)
                        self.tick(index, "statistics")
                statistics.join(self.processes.add)
                kept = self._cut(pair, width, statistics)
                self.report.pairs[-1].seconds = time.perf_counter() - start
                with self.processes.together():
                    replay.finish(pair, kept, samples)
            with self.processes.together():
                for sample in samples:
                    replay.advance(sample)
                    self.tick(index, "apply")

    def _cut(self, pair: ResolvedPair, width: PairWidth, statistics: GramStatistics) -> Tensor:
        """Choose, restore and cut; returns the positions kept among the consumer's columns so far."""
        if not statistics.is_finite():
            raise ValueError(
                f"activations must be finite, got NaN or Inf at the input of {width.layer}; "
                "check the checkpoint, or run the model in float32 or bfloat16"
            )
        with self.watch.phase("solve"):
            units, restored, entry = self.processes.first(lambda: self._decide(pair, width, statistics))
        if entry.damping > self.config.damping or entry.solver == "eigh":
            self.warn(f"{width.layer}: the gram was singular; solved by {entry.solver} with damping {entry.damping:g}")
        self.report.pairs.append(entry)
        columns = self._columns(pair, units)
        with self.watch.phase("cut"):
            pair.cut(units)
            pair.assign(*restored)
        log.debug("%s: %d -> %d, error %.4f", width.layer, width.before, width.after, entry.error_after)
        return columns

    def _decide(
        self, pair: ResolvedPair, width: PairWidth, statistics: GramStatistics
    ) -> tuple[Tensor, Restored, PairReport]:
        """Which units stay, and the restored weights, in the dtype of the model's."""
        units = self._select(pair, width, statistics)
        restored, entry = restore_pair(pair, width, self._columns(pair, units), statistics, self.config)
        return units, restored.like(pair.consumer.weight), entry

    def _columns(self, pair: ResolvedPair, units: Tensor) -> Tensor:
        """Where the units' columns are among those left."""
        return torch.searchsorted(pair.layout.columns(pair.kept), pair.layout.columns(units)).to(self.device)

    def _select(self, pair: ResolvedPair, width: PairWidth, statistics: GramStatistics) -> Tensor:
        """Units to keep, in original numbering; a unit's score is the sum over the columns it feeds."""
        norms = statistics.norms()
        if self.config.score == "wanda":
            scores = wanda_score(pair.weight, norms)
        else:
            scores = magnitude_score(pair.weight) * (norms > 0)  # a dead column goes first, whatever its weights
        groups = pair.layout.groups
        scores = pair.layout.unit_scores(scores, pair.kept)
        return pair.kept[select_columns(scores, width.after // groups, groups)]


def _device_of(pairs: list[list[ResolvedPair]]) -> torch.device:
    return next(pairs[0][0].block.parameters()).device


def _require_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model must have its weights in memory, got {name} on the meta device; load it fully first"
            )
