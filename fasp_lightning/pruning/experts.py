"""Experts of one block: which hidden units, or which experts, go, and what is left of them restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fasp_lightning.ops.scores import routed_score
from fasp_lightning.ops.selection import select_columns
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.blocks.replay import BlockReplay, Routed
from fasp_lightning.pruning.blocks.samples import Sample
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.budget.budget import PairWidth
from fasp_lightning.pruning.budget.chunks import experts_at_once
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.finite import require_finite
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.pruning.restore import Fit, Restored, entry_of, restore_pair
from fasp_lightning.pruning.select import activation_scores, select_units
from fasp_lightning.structure.experts.resolved import Expert, ResolvedExperts


class CutExperts(NamedTuple):
    """What becomes of the experts of a block.

    Attributes:
        units: (m,) units that stay, ascending, in original numbering.
        restored: The consumer of each expert; none where whole experts go.
        entry: For the report.
    """

    units: Tensor
    restored: list[Restored]
    entry: PairReport


@dataclass(frozen=True)
class ExpertsCut:
    """The decision on the experts of one block.

    Attributes:
        session: Where to compute.
        replay: Of their block, its attention finished.
        pair: The experts, not cut yet.
        width: Their widths.
        config: The settings.
    """

    session: Session
    replay: BlockReplay
    pair: ResolvedExperts
    width: PairWidth
    config: PruningConfig

    def decide(self) -> CutExperts:
        """Go over the calibration set; its tokens as they come to the experts are kept for as long as this takes."""
        routed = []
        with self.session.processes.together(), torch.no_grad():
            for sample in self.replay.samples:
                routed.append(self.replay.route(self.pair, sample.number))
                self.session.progress.count(self.replay.index, "statistics")
        try:
            with torch.no_grad():
                return self._whole(routed) if self.pair.spec.kind == "whole_experts" else self._columns(routed)
        finally:
            for stored in (each for one in routed for each in one):
                self.session.store.drop(stored)

    def _columns(self, routed: Sequence[Routed]) -> CutExperts:
        """Hidden units of each expert, chunk after chunk."""
        processes, size = self.session.processes, self.pair.layout.expert_size
        units, restored, scarce = list[Tensor](), list[Restored](), list[int]()
        step = experts_at_once(self.pair.expert_columns, self.config.damping, self.pair.count)
        for start in range(0, self.pair.count, step):
            chunk = range(start, min(start + step, self.pair.count))
            for index, (fitted, held) in zip(chunk, self._statistics(routed, chunk), strict=True):
                expert, own, config = self.pair.expert(index), held, self.config
                pooled: GramStatistics | None = None
                if fitted.rows + (held.rows if held else 0) < self.pair.expert_columns:
                    own = fitted if held is None else _sum(fitted, held)
                    pooled, config = self._pooled(routed, index, own), replace(self.config, ridge="original")
                    scarce.append(index)
                found: tuple[Tensor, Restored] | None = None
                with processes.together(), self.session.clock.phase("solve"):
                    if processes.is_first:
                        found = self._solve(expert, pooled or fitted, own, config, None if pooled is None else own)
                kept, one = processes.from_first(found)
                units.append(index * size + kept)
                restored.append(one)
        entry = entry_of(self.width, [one.fit for one in restored])
        entry.scarce = scarce
        return CutExperts(torch.cat(units), restored, entry)

    def _solve(
        self,
        expert: Expert,
        statistics: GramStatistics,
        held: GramStatistics | None,
        config: PruningConfig,
        measured: GramStatistics | None,
    ) -> tuple[Tensor, Restored]:
        """Units of one expert that stay, and its restored consumer."""
        count = self.pair.count
        width = replace(self.width, after=self.width.after // count, before=self.width.before // count)
        units = select_units(expert, width, activation_scores(expert, statistics, config), config)
        columns = torch.searchsorted(expert.kept, units).to(self.session.device)
        restored, _ = restore_pair(expert, width, columns, statistics, held, config, measured=measured)
        return units, restored.like(expert.consumer.weight)

    def _statistics(self, routed: Sequence[Routed], chunk: range) -> list[tuple[GramStatistics, GramStatistics | None]]:
        """Of each expert's consumer inputs at the tokens that it is sent, those held back apart; over all processes.

        A token counts by the square of the router's weight: by so much its error enters what the block returns.
        """
        auto = self.config.damping == "auto"
        found = [(self._empty(), self._empty() if auto else None) for _ in chunk]
        with self.session.processes.together(), self.session.clock.phase("gram"):
            for sample, hidden, chosen, weights in self._samples(routed):
                for index, (fitted, held) in zip(chunk, found, strict=True):
                    token, place = torch.where(chosen == index)
                    inputs = self.pair.hidden(index, hidden[token])
                    counted = held if held is not None and sample.held_back else fitted
                    counted.update(inputs, sample.weight * weights[token, place].float().square())
        for statistics in (each for both in found for each in both if each is not None):
            self._join(statistics)
        return found

    def _pooled(self, routed: Sequence[Routed], index: int, own: GramStatistics) -> GramStatistics:
        """Of one expert's consumer inputs at all tokens, each counted as those that it is sent are in the mean."""
        pooled, weight = self._empty(), own.tokens / own.rows if own.rows else 1.0
        with self.session.processes.together(), self.session.clock.phase("gram"):
            for sample, hidden, _, _ in self._samples(routed):
                pooled.update(self.pair.hidden(index, hidden), sample.weight * weight)
        self._join(pooled)
        return pooled

    def _whole(self, routed: Sequence[Routed]) -> CutExperts:
        """Whole experts: those that give the tokens that they are sent least, in the mean."""
        pair, groups = self.pair, self.pair.layout.groups
        totals = torch.zeros(3, pair.count, dtype=torch.float64, device=self.session.device)
        with self.session.processes.together(), self.session.clock.phase("gram"):
            for sample, hidden, chosen, weights in self._samples(routed):
                for index in range(pair.count):
                    token, place = torch.where(chosen == index)
                    outputs = pair.output(index, pair.hidden(index, hidden[token]))
                    given, counted = weights[token, place], float(token.numel())
                    energy = (outputs.double() * given.double().unsqueeze(1)).square().sum()
                    totals[:, index] += sample.weight * torch.stack(
                        [routed_score(outputs, given), energy, energy.new_tensor(counted)]
                    )
        self.session.processes.add(totals)
        require_finite("activations", bool(totals.isfinite().all()), pair.layer)
        norms, energies, tokens = totals.cpu()
        kept = select_columns(norms / tokens.clamp_min(1e-300), self.width.after // groups, groups)
        gone = torch.ones(pair.count, dtype=torch.bool)
        gone[kept] = False
        lost = energies[gone].sum()[None]
        fit = Fit(energies.sum()[None], lost, lost, 0.0, "none")
        return CutExperts(pair.kept[kept], [], entry_of(self.width, [fit]))

    def _samples(self, routed: Sequence[Routed]) -> Iterator[tuple[Sample, Tensor, Tensor, Tensor]]:
        """Each sample with its tokens as they come to the experts, on the compute device."""
        get = self.session.store.get
        for sample, one in zip(self.replay.samples, routed, strict=True):
            yield sample, get(one.hidden), get(one.chosen), get(one.weights)

    def _empty(self) -> GramStatistics:
        return GramStatistics(self.pair.expert_columns, self.session.device)

    def _join(self, statistics: GramStatistics) -> None:
        statistics.join(self.session.processes.add)
        require_finite("activations", statistics.is_finite(), self.pair.layer)


def _sum(first: GramStatistics, second: GramStatistics) -> GramStatistics:
    """Statistics of both; the first one takes in the second."""
    first.add(second)
    return first
