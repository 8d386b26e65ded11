"""The engine: block after block, later blocks seeing the ones already pruned."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fasp_lightning.ops.devices import device_function
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.blocks.weights import Weights
from fasp_lightning.pruning.budget.allocation import adaptive_budget, influence_budget
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.budget.steps import budgets_in_turn
from fasp_lightning.pruning.budget.widths import budget_towards, decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.learned.learning import learn_scores, require_whole
from fasp_lightning.pruning.prepare import Prepared, prepare
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Progress, peak_memory
from fasp_lightning.pruning.report import LearningReport, PruningReport
from fasp_lightning.pruning.round import PruningRound, passes_over, round_configs
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import adopt_plan, record_plan, resolve_pruned

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pruner:
    """The engine; see :class:`fasp_lightning.FASPPruner`, which prunes folders, too.

    Args:
        config: The settings; the defaults prune 20 %.
    """

    def __init__(self, config: PruningConfig | None = None) -> None:
        self.config = config or PruningConfig()
        self._weights = Weights()

    @own_modes()
    def prune(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any] | Prepared,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> PruningReport:
        """Prune ``model`` in place. Afterwards it carries its plan, which ``model.fasp_plan`` shows.

        The plan stands in the model's config (as ``config.fasp``; the config is a copy from then on), so every way of
        saving keeps it: :func:`~fasp_lightning.save_pruned`, which chooses the form, as ``save_pretrained``,
        ``push_to_hub`` and the checkpoints of a ``transformers.Trainer``, which
        :func:`~fasp_lightning.load_pruned` reads. Stock code, too, loads them where it can build the shapes, and
        refuses those of value dims or uneven blocks as a size mismatch. Sparsity counts from the original model,
        whoever loaded it; a zero-filled one that stock code loaded loses its zeros first.

        Whatever stops it half-way, a Ctrl-C included, the pairs cut so far stay cut, each wholly, the model's plan and
        config say which, and the model runs, and can be pruned further and saved.

        Args:
            model: A Hugging Face causal LM of a registered family, pruned before or not.
            batches: Any iterable of (batch, seq) token ids or of mappings with ``input_ids`` and optionally
                ``attention_mask``, ``position_ids``, ``labels``, ``weight`` (how much each of its tokens counts) and
                ``source`` (the name of its text: each text has its share of the tokens that are held back, or that loss
                sensitivity is measured on); read once. Padding, on either side, enters no statistic; a label of −100
                takes its token out of the loss whose sensitivity is measured, not out of the statistics. Or a single
                batch, or what :meth:`prepare` made of them.
            progress: Called after each pass of a sample through a block.
            processes: Those that hold copies of this model and call this together, each with batches of its own:
                statistics are summed, one solves, all cut alike. By default this process alone.

        Returns:
            Widths, errors, seconds and memory.

        Raises:
            FaspError: Before the first batch is read, if the family is unknown, its shapes do not fit, or are others
                than the plan in its config says, or the sparsity cannot be reached; later, if an activation is not
                finite (the message names the layer).
            RuntimeError: If another process raised an error.
        """
        weights = self._weights
        pairs = self._pairs(model)
        budget = decide_budget(model, self.config, pairs)
        weights.require(model)
        report = PruningReport.of_budget(budget, self.config.to_dict())
        if not budget.changes:
            record_plan(model, pairs)
            return report
        configs = round_configs(budget, self.config)
        if len(configs) > 1 and budget.attention == "kv_groups":  # few steps: a later round may be out of reach
            list(budgets_in_turn(model, configs, budget_towards))
        session = Session.start(self.config, pairs, progress, processes, weights)
        if self.config.score == "learned":
            require_whole(session, pairs)
        start = time.perf_counter()
        if reset := device_function(session.device, "reset_peak_memory_stats"):
            reset(session.device)
        for number, config in enumerate(configs):
            budget = budget_towards(model, config, pairs)
            if not budget.changes:
                continue  # rounded to the widths that are there
            session.progress.passes = passes_over(budget)
            session.progress.later_rounds = len(configs) - 1 - number
            done = weights.start_round(number)
            given = batches if isinstance(batches, Prepared) else prepare(session, model, pairs, batches, config)
            given.check(pairs, config)
            if given.influence is not None:
                budget = influence_budget(budget, pairs, given.influence, config)
            learned: list[LearningReport] = []
            if config.score == "learned":
                given, learned = _learned(session, model, pairs, given, budget, config)
            if config.allocation == "adaptive":
                budget = adaptive_budget(budget, pairs, given.sensitivity, config)
            found = PruningReport.of_budget(budget, self.config.to_dict())
            found.learning = learned
            PruningRound(session, model, pairs, config, budget, found).prune(given, done)
            report = report.followed_by(found)
            batches = given.batches
        report.seconds = {**session.clock.seconds, "total": time.perf_counter() - start}
        report.peak_memory = peak_memory(session.device)
        model.fasp_report = report.to_dict()  # type: ignore[assignment]  # saved along
        return report

    @own_modes()
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
            progress: Called after each pass of a sample through a block.
            processes: Those that call this together.

        Raises:
            FaspError: As :meth:`prune`.
            RuntimeError: If another process raised an error.
        """
        pairs = self._pairs(model)
        decide_budget(model, self.config, pairs)  # refuses what could not be pruned afterwards
        self._weights.require(model)
        session = Session.start(self.config, pairs, progress, processes, self._weights)
        return prepare(session, model, pairs, batches, self.config)

    def _pairs(self, model: PreTrainedModel) -> list[list[ResolvedPair]]:
        adopt_plan(model)
        return resolve_pruned(model, whole=self.config.whole)


def pruner_on(weights: Weights, config: PruningConfig) -> Pruner:
    """The engine on weights that are not, or not all, in this process's memory.

    Args:
        weights: Where they are.
        config: The settings.
    """
    pruner = Pruner(config)
    pruner._weights = weights
    return pruner


def _learned(
    session: Session,
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    given: Prepared,
    budget: Budget,
    config: PruningConfig,
) -> tuple[Prepared, list[LearningReport]]:
    """What was prepared, with learned scores in place of the loss sensitivity that they started from."""
    with session.clock.phase("learning"):
        scores, report = learn_scores(session, model, pairs, given.batches, given.sensitivity, budget, config)
    return replace(given, sensitivity=scores), [report]
