"""One pass over the blocks: statistics, kept units, restoration and cut of each pair."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.blocks.replay import BlockReplay
from fasp_lightning.pruning.blocks.samples import Sample
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.budget.widths import PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.finite import require_finite
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Meter, Stopwatch
from fasp_lightning.pruning.report import PairReport, PruningReport
from fasp_lightning.pruning.restore import Restored, restore_pair
from fasp_lightning.pruning.select import select_units
from fasp_lightning.structure.modes import placed
from fasp_lightning.structure.pair import ResolvedPair

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningRun:
    """One pass of :meth:`fasp_lightning.FASPPruner.prune`: settings, clock, progress and report.

    Attributes:
        config: The settings.
        device: The compute device.
        report: Filled as pairs are cut.
        processes: Those that prune together.
        watch: Counts seconds by phase.
        meter: Counts units of work.
    """

    config: PruningConfig
    device: torch.device
    report: PruningReport
    processes: Processes
    watch: Stopwatch
    meter: Meter

    def prune_blocks(
        self,
        pairs: list[list[ResolvedPair]],
        widths: tuple[tuple[PairWidth, ...], ...],
        sensitivity: list[list[Tensor]] | None,
        samples: list[Sample],
        store: TensorStore,
        attention: str | None,
    ) -> None:
        """Prune block after block, later ones seeing what is left of the earlier ones.

        Args:
            pairs: The pairs of each block.
            widths: Their widths.
            sensitivity: Their loss sensitivity, if it was measured.
            samples: The calibration set.
            store: Where its tensors are kept.
            attention: Path of the attention module in a block.
        """
        self._start(samples, widths)
        for index, block in enumerate(pairs):
            replay = BlockReplay(block[0].block, index, block, attention, store, self.watch)
            with placed(block[0].block, self.device):
                for place, (pair, width) in enumerate(zip(block, widths[index], strict=True)):
                    if width.after < width.before:
                        scores = None if sensitivity is None else sensitivity[index][place]
                        self._prune_pair(replay, pair, width, scores, samples)
                with self.processes.together():
                    for sample in samples:
                        replay.advance(sample)
                        self.meter.tick(index, "apply")

    def _start(self, samples: list[Sample], widths: tuple[tuple[PairWidth, ...], ...]) -> None:
        """Count the work, and warn if the calibration set is small."""
        cut = cut_pairs(widths)
        self.meter.expect(len(samples) * passes_over(widths))
        self.report.tokens = int(self.processes.total(sum(sample.tokens for sample in samples))[0])
        widest = max((pair.columns for pair in cut), default=0)
        if self.report.tokens < widest:
            self._warn(
                f"{self.report.tokens} calibration tokens are fewer than the {widest} columns of the widest pair: the "
                "restoration will fit them and little else; give more text or raise damping"
            )

    def _warn(self, message: str) -> None:
        """Tell the user now, and in the report."""
        self.report.warnings.append(message)
        warnings.warn(message, stacklevel=7)

    def _prune_pair(
        self,
        replay: BlockReplay,
        pair: ResolvedPair,
        width: PairWidth,
        sensitivity: Tensor | None,
        samples: list[Sample],
    ) -> None:
        """Statistics, selection, restoration and cut of one pair."""
        start = time.perf_counter()
        fitted = GramStatistics(pair.columns, self.device)
        held = GramStatistics(pair.columns, self.device) if self.config.damping == "auto" else None
        with self.processes.together():
            for sample in samples:
                replay.record(pair, sample, held if held and sample.held_back else fitted)
                self.meter.tick(replay.index, "statistics")
        for statistics in filter(None, (fitted, held)):
            statistics.join(self.processes.add)
            require_finite("activations", statistics.is_finite(), width.layer)

        def decide() -> tuple[Tensor, Restored, PairReport]:
            units = select_units(pair, width, fitted, sensitivity, self.config)
            restored, entry = restore_pair(pair, width, self._columns(pair, units), fitted, held, self.config)
            return units, restored.like(pair.consumer.weight), entry

        with self.watch.phase("solve"):
            units, restored, entry = self.processes.first(decide)
        if restored.singular:
            self._warn(f"{width.layer}: the gram was singular; solved by {entry.solver} with damping {entry.damping:g}")
        columns = self._columns(pair, units)
        with self.watch.phase("cut"):
            pair.cut(units)
            pair.assign(restored.factors, restored.bias)
        log.debug("%s: %d -> %d, error %.4f", width.layer, width.before, width.after, entry.error_after)
        entry.seconds = time.perf_counter() - start
        self.report.pairs.append(entry)
        with self.processes.together():
            replay.finish(pair, columns, samples)

    def _columns(self, pair: ResolvedPair, units: Tensor) -> Tensor:
        """Where the units' columns are among those left."""
        return torch.searchsorted(pair.layout.columns(pair.kept), pair.layout.columns(units)).to(self.device)


def passes_over(widths: tuple[tuple[PairWidth, ...], ...]) -> int:
    """How often a pruning goes over its calibration set: for each pair that is cut, and for each block's outputs."""
    return len(cut_pairs(widths)) + len(widths)


def cut_pairs(widths: tuple[tuple[PairWidth, ...], ...]) -> list[PairWidth]:
    """Those that lose something."""
    return [pair for block in widths for pair in block if pair.after < pair.before]
