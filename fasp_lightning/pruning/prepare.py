"""What a pruning needs to know of the model as it is: the calibration set, own text in it, what units and blocks do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.likelihood import IGNORED
from fasp_lightning.pruning.blocks.capture import capture, micro_batches
from fasp_lightning.pruning.blocks.influence import block_influence
from fasp_lightning.pruning.blocks.rehearsal import rehearse, require_turnable
from fasp_lightning.pruning.blocks.samples import Sample, spread_samples
from fasp_lightning.pruning.blocks.sensitivity import fisher_scores
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.inputs import ModelInputs, check_at_hand
from fasp_lightning.pruning.own_text.generation import first_tokens
from fasp_lightning.pruning.own_text.writing import calibration_starts, mixed, own_text
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.text.batches import CALIBRATION, each_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECES = 8
"""Of one text, loss sensitivity takes this many pieces or more: so it goes at most one in so many beyond its tokens."""


@dataclass(frozen=True)
class Prepared:
    """What prunings of the same model to several sparsities share: plain data, and tensors on the CPU.

    Attributes:
        batches: Calibration batches, own text among them.
        sensitivity: (units left,) loss sensitivity of each pair of each block; empty where no setting asks for it.
        influence: (blocks,) influence of each block; ``None`` where no setting asks for it.
    """

    batches: list[Any]
    sensitivity: list[list[Tensor]]
    influence: Tensor | None = None

    def check(self, pairs: list[list[ResolvedPair]], config: PruningConfig) -> None:
        """Refuse what was prepared for another model, or with other settings.

        Raises:
            FaspError: If there is no sensitivity where ``config`` needs it, or one of other shapes.
        """
        influence = config.allocation == "block_influence"
        if bool(self.sensitivity) < config.needs_sensitivity or (self.influence is not None) != influence:
            raise FaspError("batches must be prepared with the score and allocation that they are pruned with")
        if not self.sensitivity:
            return
        found = [[scores.numel() for scores in block] for block in self.sensitivity]
        if found != [[pair.kept.numel() for pair in block] for block in pairs]:
            raise FaspError("batches must be prepared with this model as it is, or a copy of it; prepare them anew")


def prepare(
    session: Session,
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    batches: Iterable[Any],
    config: PruningConfig,
) -> Prepared:
    """Let the model write its own text, and measure the loss sensitivity of its units and the influence of its blocks.

    Args:
        session: Where to compute; its processes call this together.
        model: The model as it is.
        pairs: Its pairs.
        batches: Calibration batches, read once.
        config: ``own_text``, ``score``, ``allocation``, ``sensitivity_tokens``, ``micro_batch_size`` and
            ``value_basis`` are read.

    Raises:
        FaspError: Before anything is computed, if a batch is refused, there is no token, or the model does not run its
            blocks as it must; later, if a gradient or logit is not finite.
    """
    processes, own = session.processes, config.own_text
    with processes.together():
        alone = own is not None and own.share == 1  # own text needs no other
        given = [] if alone else list(each_batch(batches))
        tokens, example = _read(model, given)
    # the same in all of them: where weights are sharded they run it together, and must stop at the same place
    example = processes.from_first(example)
    with processes.together():
        session.weights.once("rehearsal", lambda: _rehearse(model, pairs, example, config))
    if own is None or own.share < 1:
        _require_tokens(processes.total(tokens)[0], own is not None)
    if own is not None:
        with session.clock.phase("own text"), evaluating(model):
            starts = calibration_starts(given, processes)
            written = session.weights.own_text(own, starts) or own_text(model, own, processes, starts)
            given = mixed(given, written, own.share, processes)
    influence = config.allocation == "block_influence"
    if not (config.needs_sensitivity or influence):
        return Prepared(given, [])
    with session.clock.phase("sensitivity"), evaluating(model), session.store:
        bound = max(1, config.sensitivity_tokens // PIECES)
        with processes.together():
            samples, hidden = capture(model, given, config.micro_batch_size, session.store, bound)
        chosen = spread_samples(samples, config.sensitivity_tokens, processes)
        if config.needs_sensitivity:
            _require_targets(chosen, processes)
        later = sum(1 for _ in micro_batches(given, config.micro_batch_size))
        steps = config.learning.steps if config.score == "learned" else 0
        passes = len(chosen) * (influence + config.needs_sensitivity) + steps
        session.progress.expect(passes * len(pairs) + later * session.progress.passes)
        told = partial(block_influence, session, model, chosen, hidden)
        measure = partial(fisher_scores, session, model, pairs, chosen, hidden)
        found = session.weights.once("influence", told) if influence else None
        scores = session.weights.once("sensitivity", measure) if config.needs_sensitivity else []
        return Prepared(given, scores, found)


def _read(model: PreTrainedModel, batches: list[Any]) -> tuple[int, dict[str, Tensor]]:
    """Refuse batches that cannot be used; returns the number of tokens in this process, and an example of them."""
    inputs = ModelInputs(model)
    check_at_hand(inputs, batches, CALIBRATION)
    tokens, example = 0, {"input_ids": first_tokens(model, 1, torch.Generator())[:, None]}
    for number, batch in enumerate(micro_batches(batches, 1)):
        mask = batch.attention_mask
        tokens += batch.tokens
        if batch.tokens and (number == 0 or (mask is not None and not mask[0, 0])):  # padding on the left may do harm
            example = inputs(batch)
    return tokens, example


def _rehearse(
    model: PreTrainedModel, pairs: list[list[ResolvedPair]], example: dict[str, Tensor], config: PruningConfig
) -> None:
    """Refuse models that cannot be used."""
    rehearse(model, pairs, example)
    if config.value_basis == "principal":
        require_turnable(model, pairs, example)


def _require_tokens(tokens: float, own: bool) -> None:
    if not tokens:
        remedy = "; set own_text.share to 1 to calibrate on own text alone" if own else ""
        raise FaspError(f"batches must hold at least one calibration batch with a token in it, got none{remedy}")


def _require_targets(samples: list[Sample], processes: Processes) -> None:
    """Refuse samples without a loss: every unit would be as good as any other."""
    mine = sum(int((sample.targets[:, 1:] != IGNORED).sum()) for sample in samples if sample.targets is not None)
    (predicted,) = processes.total(mine)
    if not predicted:
        raise FaspError(
            "batches must hold at least one token to predict where loss sensitivity is measured, got none; give "
            "labels that are not all -100 and sequences of two tokens or more, or set score to 'wanda' and allocation "
            "to 'uniform'"
        )
