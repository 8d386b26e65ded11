"""One round of a pruning: a pass over the blocks, with statistics, kept units, restoration and cut of each pair."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fasp_lightning.ops.basis import Basis
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.replay import BlockReplay
from fasp_lightning.pruning.blocks.samples import Sample, Stored, hold_back
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.weights import PrunedBlock
from fasp_lightning.pruning.budget.budget import Budget, PairWidth
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.experts import ExpertsCut
from fasp_lightning.pruning.finite import require_finite
from fasp_lightning.pruning.prepare import Prepared
from fasp_lightning.pruning.report import PairReport, PruningReport
from fasp_lightning.pruning.restore import Restored, restore_pair
from fasp_lightning.pruning.select import activation_scores, select_units
from fasp_lightning.pruning.value_basis import View, views_of
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import recorded
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks, has_module
from fasp_lightning.structure.transaction import all_or_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
"""Warnings point at the line outside this folder that asked for the pruning."""


def round_configs(budget: Budget, config: PruningConfig) -> list[PruningConfig]:
    """The settings of each round: sparsities in even steps from the present one to the one asked for.

    Own text is written in the first round alone, by the original model; later rounds take it over.

    Args:
        budget: The present widths, and those asked for.
        config: ``sparsity`` and ``rounds`` are read.
    """
    first = budget.sparsity_before
    steps = [first + (config.sparsity - first) * done / config.rounds for done in range(1, config.rounds)]
    own_texts = [config.own_text, *(None for _ in steps)]
    return [
        replace(config, sparsity=sparsity, own_text=own)
        for sparsity, own in zip([*steps, config.sparsity], own_texts, strict=True)
    ]


class _Decided(NamedTuple):
    """What becomes of a pair: the units that stay, their columns among those left, and the consumer's new weights.

    Attributes:
        bases: The basis that each KV head's value dims are turned to before; none for the given one.
    """

    units: Tensor
    columns: Tensor
    restored: Restored
    entry: PairReport
    bases: list[Basis]


@dataclass(frozen=True)
class PruningRound:
    """One pass over the blocks of a model.

    Attributes:
        session: Where to compute.
        model: The causal LM.
        pairs: Its pairs; those that are cut know afterwards what is left of them.
        config: The settings of this round.
        budget: The widths to reach.
        report: Filled as pairs are cut.
    """

    session: Session
    model: PreTrainedModel
    pairs: list[list[ResolvedPair]]
    config: PruningConfig
    budget: Budget
    report: PruningReport

    def prune(self, prepared: Prepared, done: Sequence[PrunedBlock] = ()) -> None:
        """Prune block after block, later ones seeing what is left of the earlier ones.

        If this raises half-way, the pairs cut so far stay cut, each wholly, and the model's plan says which.

        Args:
            prepared: The calibration set, and the loss sensitivity where the settings ask for it.
            done: What an earlier run of this round, which was stopped, has made of the first blocks.
        """
        config, session, budget = self.config, self.session, self.budget
        with recorded(self.model, self.pairs), evaluating(self.model), session.store:
            for index, found in enumerate(done):
                session.weights.take_over(index, self.pairs[index], found)
            with session.processes.together(), session.clock.phase("capture"):
                samples, hidden = capture(self.model, prepared.batches, config.micro_batch_size, session.store)
            if config.damping == "auto":
                samples = hold_back(samples)
            session.progress.expect(len(samples) * passes_over(budget, len(done)))
            self._count_tokens(samples, budget)
            self.report.pairs += [entry for found in done for entry in found.entries]
            self.report.warnings += [warning for found in done for warning in found.warnings]
            by_sensitivity = prepared.sensitivity if config.scores_by_sensitivity else None
            hidden = session.weights.take_up(hidden, session.store)
            for index in range(len(done), len(self.pairs)):
                scores = None if by_sensitivity is None else by_sensitivity[index]
                self._prune_block(index, scores, samples, hidden)

    def _count_tokens(self, samples: list[Sample], budget: Budget) -> None:
        """Note the size of the calibration set, and warn if it is small."""
        tokens = int(self.session.processes.total(sum(sample.tokens for sample in samples))[0])
        widest = max((width.columns for width in budget.cut), default=0)
        self.report.tokens = tokens
        if tokens < widest:
            self._warn(
                f"{tokens} calibration tokens are fewer than the {widest} columns of the widest pair: the restoration "
                "will fit them and little else; give more text or raise damping"
            )

    def _prune_block(
        self,
        index: int,
        scores: list[Tensor] | None,
        samples: list[Sample],
        hidden: list[Stored],
    ) -> None:
        """Prune the pairs of one block; what it returns then takes the place of its inputs in ``hidden``."""
        pairs, spec = self.pairs[index], spec_for(self.model)
        block = find_blocks(self.model, spec)[index]
        attention = spec.attention if has_module(block, spec.attention) else None
        replay = BlockReplay(self.session, index, block, pairs, attention, samples, hidden)
        told, entries = len(self.report.warnings), len(self.report.pairs)
        with self.session.weights.placed(block, self.session.device):
            for place, (pair, width) in enumerate(zip(pairs, self.budget.pairs[index], strict=True)):
                if width.after < width.before:
                    self._prune_pair(replay, pair, width, None if scores is None else scores[place])
            with self.session.processes.together():
                for sample in samples:
                    replay.advance(sample.number)
                    self.session.progress.count(index, "apply")
            kept = [pair.kept for pair in pairs]
            done = PrunedBlock(kept, self.report.pairs[entries:], self.report.warnings[told:])
            self.session.weights.finish(index, pairs, done, hidden)

    def _prune_experts(self, replay: BlockReplay, pair: ResolvedExperts, width: PairWidth) -> None:
        """The same of experts; what the block returns is computed from what is left of them."""
        start = time.perf_counter()
        units, restored, entry = ExpertsCut(self.session, replay, pair, width, self.config).decide()
        if entry.scarce:
            few, tokens = ", ".join(map(str, entry.scarce)), f"fewer tokens than its {width.columns} hidden units"
            self._warn(f"{pair.name}.{pair.path}: {tokens} were sent to expert {few}: restored on all tokens")
        if any(one.singular for one in restored):
            self._warn(f"{width.layer}: a gram was singular; solved by {entry.solver} with damping {entry.damping:g}")
        with self.session.clock.phase("cut"), all_or_nothing(pair), self.session.processes.together():
            pair.cut(units)
            pair.assign_each([(one.factors, one.bias) for one in restored])
        log.debug("%s: %d -> %d, error %.4f", width.layer, width.before, width.after, entry.error_after)
        entry.seconds = time.perf_counter() - start
        self.report.pairs.append(entry)

    def _prune_pair(self, replay: BlockReplay, pair: ResolvedPair, width: PairWidth, scores: Tensor | None) -> None:
        """Statistics, selection, restoration and cut of one pair."""
        if isinstance(pair, ResolvedExperts):
            return self._prune_experts(replay, pair, width)
        start, processes, clock = time.perf_counter(), self.session.processes, self.session.clock
        inputs, fitted, held = self._statistics(replay, pair)
        decided: _Decided | None = None
        with processes.together(), clock.phase("solve"):
            for view in views_of(pair, fitted, held, self.config) if processes.is_first else ():
                units, columns = self._select(pair, width, view, scores)
                restored, entry = restore_pair(pair, width, columns, view.fitted, view.held, self.config, view.bases)
                if decided is None or entry.error_after < decided.entry.error_after:
                    decided = _Decided(units, columns, restored.like(pair.consumer.weight), entry, view.bases)
        units, columns, restored, entry, bases = processes.from_first(decided)
        if restored.singular:
            self._warn(f"{width.layer}: the gram was singular; solved by {entry.solver} with damping {entry.damping:g}")
        with clock.phase("cut"), all_or_nothing(pair), processes.together():
            if bases:
                pair.turn(bases)
            pair.cut(units)
            pair.assign(restored.factors, restored.bias)
        errors = entry.error_after, entry.output_error_after
        log.debug("%s: %d -> %d, error %.4f, per output %.4f", width.layer, width.before, width.after, *errors)
        entry.seconds = time.perf_counter() - start
        self.report.pairs.append(entry)
        with processes.together():
            blocks = pair.column_blocks([basis.forward for basis in bases])
            replay.finish(pair, columns.to(self.session.device), inputs, blocks)

    def _select(self, pair: ResolvedPair, width: PairWidth, view: View, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """The units that stay in one basis, and their columns; scores from elsewhere are those of the given basis."""
        if scores is None or view.bases:
            scores = activation_scores(pair, view.fitted, self.config, view.bases)
        units = select_units(pair, width, scores, self.config)
        return units, self._columns(pair, units)

    def _statistics(
        self, replay: BlockReplay, pair: ResolvedPair
    ) -> tuple[list[Stored], GramStatistics, GramStatistics | None]:
        """Recorded consumer inputs, their statistics, and those of the samples held back; sums over all processes."""
        session = self.session
        fitted = GramStatistics(pair.columns, session.device)
        held = GramStatistics(pair.columns, session.device) if self.config.damping == "auto" else None
        inputs = []
        with session.processes.together():
            for sample in replay.samples:
                statistics = held if held is not None and sample.held_back else fitted
                inputs.append(replay.record(pair, sample.number, statistics))
                session.progress.count(replay.index, "statistics")
        for statistics in filter(None, (fitted, held)):
            statistics.join(session.processes.add)
            require_finite("activations", statistics.is_finite(), pair.layer)
        return inputs, fitted, held

    def _columns(self, pair: ResolvedPair, units: Tensor) -> Tensor:
        """Where the units' columns are among those left."""
        return torch.searchsorted(pair.layout.columns(pair.kept), pair.layout.columns(units)).to(self.session.device)

    def _warn(self, message: str) -> None:
        """Tell the user now, and in the report."""
        self.report.warnings.append(message)
        warnings.warn(message, stacklevel=_frames_inside())


def passes_over(budget: Budget, done: int = 0) -> int:
    """How often a pruning goes over its calibration set: for each pair that is cut, and for each block's outputs.

    Args:
        budget: Its widths.
        done: Blocks that are done already.
    """
    left = budget.pairs[done:]
    return sum(width.after < width.before for block in left for width in block) + len(left)


def _frames_inside() -> int:
    """Stack level of the caller outside this package, seen from where this is called."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith((PACKAGE, contextlib.__file__)):  # decorators
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return level
