"""What a pruning did, in figures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.perplexity import PerplexityResult

SAME = 0.005
"""Relative difference of two perplexities up to which they count as equal: other calibration samples differ by more."""


@dataclass
class PairReport:
    """One pair of one block.

    Attributes:
        layer: Path of the consumer.
        kind: ``"ffn"``, ``"value"``, ``"groups"``, ``"experts"`` or ``"whole_experts"``.
        width_before: Units before this pruning.
        width_after: Units after it.
        basis: ``"given"``, or ``"principal"`` where the value dims were turned before they were cut.
        error_before: ‖WX − W_M X_M‖/‖WX‖, the relative reconstruction error without restoration; of whole experts what
            those that went had given, as a part of what all had, each token's other experts as they were.
        error_after: ‖WX − ŴX_M‖/‖WX‖, with it.
        output_error_before: Root mean square of the same ratio of each output of the consumer, at most 1 each. Where a
            few tokens of massive activations hold most of ‖WX‖, this tells what happens to the rest.
        output_error_after: That, with restoration.
        damping: Damping that was used; 0 if nothing was solved.
        solver: ``"cholesky"``, ``"eigh"`` or ``"none"``.
        seconds: Wall-clock seconds of statistics, solve and cut.
        scarce: Experts that fewer tokens than hidden units were sent to: they are restored on all tokens.
    """

    layer: str
    kind: str
    width_before: int
    width_after: int
    basis: str
    error_before: float
    error_after: float
    output_error_before: float
    output_error_after: float
    damping: float
    solver: str
    seconds: float
    scarce: list[int] = field(default_factory=list)


@dataclass
class LearningReport:
    """Columns that were learned, in one round.

    Attributes:
        steps: Optimizer steps.
        chosen: Steps of the scores that were taken, those with the lowest divergence.
        tokens: Held-back calibration tokens that it was measured on.
        divergence_before: KL from the model as it was to the one without the units that were to go at the start, in
            nats a token, nothing restored.
        divergence_after: The same with the units that go.
    """

    steps: int
    chosen: int
    tokens: int
    divergence_before: float
    divergence_after: float


@dataclass
class TextReport:
    """Perplexity on one text that the calibration did not see.

    Attributes:
        name: The text.
        domain: ``"calibrated"`` if it comes from a source of the calibration text, else ``"other"``.
        before: Of the model before this pruning.
        after: Of the pruned model.
        unrestored: Of a model with the same columns and the weights as they were; ``None`` if not measured.
        bos: Token that every sequence began with, which is not predicted; ``None`` where it began with the text.
    """

    name: str
    domain: str
    before: PerplexityResult
    after: PerplexityResult
    unrestored: PerplexityResult | None = None
    bos: str | None = None

    @property
    def restoration_effect(self) -> int:
        """−1 if restoration lowered the perplexity, 1 if it raised it, 0 if neither, or if that was not measured."""
        if self.unrestored is None:
            return 0
        change = self.after.perplexity / self.unrestored.perplexity - 1
        return 0 if abs(change) < SAME else int(math.copysign(1, change))


def restoration_warning(texts: list[TextReport]) -> str | None:
    """The warning where restoration raised the perplexity of a text; what it lowered is named beside it.

    Args:
        texts: Those that were measured.
    """
    steps: dict[int, list[str]] = {-1: [], 0: [], 1: []}  # by the effect of restoration
    for text in texts:
        if text.unrestored is not None:
            step = f"{text.name} from {text.unrestored.perplexity:.2f} to {text.after.perplexity:.2f}"
            steps[text.restoration_effect].append(step)
    if not steps[1]:
        return None
    lowered = f"; it lowered that of {', '.join(steps[-1])}" if steps[-1] else ""
    return (
        f"restoration raised the perplexity of {', '.join(steps[1])}{lowered}: it fits the calibration text; mix "
        "other text or own text into the calibration, raise damping, or set restoration to none"
    )


@dataclass
class PruningReport:
    """Outcome of :meth:`fasp_lightning.FASPPruner.prune`.

    Attributes:
        sparsity: Fraction of the original blocks' linear parameters that is gone.
        sparsity_total: Fraction of all original parameters that is gone.
        parameters_before: All parameters before this pruning; tied ones count once.
        parameters_after: All parameters after it.
        tokens: Calibration tokens, padding left out.
        pairs: One entry for each pair that was cut, in the order of the cuts.
        seconds: Wall-clock seconds by phase: learning, capture, forward, gram, solve, cut, apply, and total.
        peak_memory: Bytes: ``"rss"`` of the process (its highest so far) and of the accelerator, such as ``"cuda"``.
        warnings: What the user should know.
        config: The settings.
        evaluation: Perplexity on each text that was measured: ``fasp prune`` fills it, the engine measures none.
        learning: One entry a round in which columns were learned.
    """

    sparsity: float
    sparsity_total: float
    parameters_before: int
    parameters_after: int
    tokens: int = 0
    pairs: list[PairReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: list[TextReport] = field(default_factory=list)
    learning: list[LearningReport] = field(default_factory=list)

    @classmethod
    def of_budget(cls, budget: Budget, config: dict[str, Any]) -> PruningReport:
        """A report with the figures that are known in advance."""
        return cls(
            budget.sparsity, budget.sparsity_total, budget.parameters_before, budget.parameters_after, config=config
        )

    def followed_by(self, later: PruningReport) -> PruningReport:
        """The report of two prunings of one model as if they were one.

        Args:
            later: Of the pruning that followed; its figures are those of the outcome.
        """
        pairs, warnings = self.pairs + later.pairs, self.warnings + later.warnings
        learning, before = self.learning + later.learning, self.parameters_before
        return replace(later, parameters_before=before, pairs=pairs, warnings=warnings, learning=learning)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)
