"""Which columns go, learned: the divergence from the model itself says how open each gate should be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.distillation import TopK, distillation_loss, top_k
from fasp_lightning.ops.likelihood import IGNORED
from fasp_lightning.pruning.blocks.capture import micro_batches
from fasp_lightning.pruning.blocks.samples import Sample, hold_back, spread_samples
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.config import LearningConfig, PruningConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.learned.gates import Gates
from fasp_lightning.pruning.learned.state import LearningState, StateFile
from fasp_lightning.pruning.report import LearningReport
from fasp_lightning.structure.modes import evaluating, frozen
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.resolve import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK_EVERY = 10
"""Steps from one look at the held-back tokens, at which the state is kept too, to the next."""

HELD_TOKENS = 4096
"""Of the held-back tokens so many are looked at: what two states of the gates differ by there is the same on all."""

HELD_TOP_K = 128
"""Likeliest tokens by which the divergence on held-back tokens is measured, as the model's logits are kept for them."""

FORWARDS = 3
"""What a step costs, in forwards of its tokens: the model as it is, with gates, and back to these."""

log = logging.getLogger(__name__)


def forward_tokens(learning: LearningConfig) -> int:
    """About how many tokens could go forward through the model in the time that the learning takes."""
    looks = 1 + -(-learning.steps // CHECK_EVERY) + 1  # the model as it is, and the gates at the start and then
    return FORWARDS * learning.steps * learning.tokens + looks * HELD_TOKENS


def require_whole(session: Session, pairs: list[list[ResolvedPair]]) -> None:
    """Refuse a model that would have to go through the compute device block by block.

    Raises:
        FaspError: If it is elsewhere.
    """
    here = device_of(pairs)
    if here != torch.empty(0, device=session.device).device:  # "cuda" is that of some index
        raise FaspError(
            f"score='learned' must have the whole model where it computes, got the model on {here} and "
            f"device={str(session.device)!r}; move the model there, or score by 'fisher', which goes block by block"
        )


def learn_scores(
    session: Session,
    model: PreTrainedModel,
    pairs: list[list[ResolvedPair]],
    batches: Iterable[Any],
    sensitivity: list[list[Tensor]],
    budget: Budget,
    config: PruningConfig,
) -> tuple[list[list[Tensor]], LearningReport]:
    """Learn the scores of all units: those whose best let the model diverge least from what it is without gates.

    The model runs in evaluation mode; its weights, modes, gradients and ``requires_grad`` are as before afterwards,
    also after an error.

    Args:
        session: Where to compute; its processes call this together, each with batches of its own, and gradients are
            the mean over all of them.
        model: The causal LM, wholly on the device, pruned before or not.
        pairs: Its pairs, one list a block.
        batches: Calibration batches, own text among them; each text counts by its weight.
        sensitivity: (units left,) loss sensitivity of each pair of each block, by which the scores start.
        budget: The uniform widths.
        config: ``learning``, ``allocation``, ``head_balance``, ``multiple_of`` and ``micro_batch_size`` are read.

    Returns:
        For each pair of each block (units left,) float64 scores, that are read as loss sensitivity is; and a report.

    Raises:
        FaspError: If the divergence is not finite, or the activations find no room on the device.
        RuntimeError: If another process raised an error.
    """
    gates = Gates(pairs, budget, sensitivity, config)
    with session.processes.together():
        samples = _samples(model, batches, config)
    with evaluating(model), frozen(model):
        learning = _Learning(session, model, gates, samples, budget, config)
        state = learning.run()
    before, after = state.divergences[0], state.divergences[state.chosen]
    log.info("columns learned: divergence %.4f -> %.4f, of step %d", before, after, state.chosen)
    found = LearningReport(config.learning.steps, state.chosen, learning.held_tokens, before, after)
    return gates.scores(state.best), found


def _samples(model: PreTrainedModel, batches: Iterable[Any], config: PruningConfig) -> list[Sample]:
    """The calibration set in pieces of one step each; one in four of each text is held back."""
    inputs = ModelInputs(model)
    pieces = micro_batches(batches, config.micro_batch_size, config.learning.tokens)
    return hold_back(
        Sample(
            number,
            piece.source,
            {name: value.cpu() for name, value in inputs(piece).items()},
            piece.weight,
            targets=piece.targets.cpu(),
        )
        for number, piece in enumerate(pieces)
    )


class _Learning:
    """The steps, and the looks at the held-back tokens between them."""

    def __init__(
        self,
        session: Session,
        model: PreTrainedModel,
        gates: Gates,
        samples: list[Sample],
        budget: Budget,
        config: PruningConfig,
    ) -> None:
        self.session, self.model, self.gates, self.settings = session, model, gates, config.learning
        self.learned = [sample for sample in samples if not sample.held_back]
        held = [sample for sample in samples if sample.held_back]
        if not session.processes.total(len(held))[0]:
            held = self.learned  # too few to hold some back
        self.held = spread_samples(held, HELD_TOKENS, session.processes)
        self.file = StateFile.of(session.processes, model, samples, budget, config)
        weights = [sample.weight * sample.tokens for sample in self.learned]
        mass, count = session.processes.total(sum(weights), len(weights))
        self.mean_weight = mass / max(count, 1)
        self.held_tokens = int(session.processes.total(sum(_predicted(sample) for sample in self.held))[0])

    def run(self) -> LearningState:
        """Go from the state on disk, or the start, to the last step; returns the state at the end."""
        steps = self.settings.steps
        state = self.file.read() or LearningState(self.gates.offsets)
        self.gates.offsets = state.offsets.requires_grad_()
        optimizer = torch.optim.Adam([state.offsets])
        if state.optimizer:
            optimizer.load_state_dict(state.optimizer)
        self._count(state.step)
        teachers = [] if steps in state.divergences else self._teachers()
        while steps not in state.divergences:
            if state.step not in state.divergences and (state.step % CHECK_EVERY == 0 or state.step == steps):
                state.note(self._held_divergence(teachers), optimizer)
                self.file.write(state)
            if state.step < steps:
                self._step(state.step, optimizer)
                state.step += 1
        return state

    def _step(self, step: int, optimizer: torch.optim.Adam) -> None:
        """One step on the next piece of each process."""
        steps, rate = self.settings.steps, self.settings.rate
        gradient = torch.zeros_like(self.gates.offsets)
        with self.session.processes.together(), _roomy(self.settings.tokens):
            if self.learned:
                gradient = self._gradient(self.learned[self._place(step)])
        self.session.processes.add(gradient)
        self.gates.offsets.grad = gradient / self.session.processes.count
        optimizer.param_groups[0]["lr"] = rate * (steps - step) / steps
        optimizer.step()
        self.gates.offsets.grad = None
        self._count()

    def _count(self, steps: int = 1) -> None:
        """Show steps as done: each takes as much as some passes of a sample through every block."""
        for _ in range(steps):
            for block in range(len(self.gates.pairs)):
                self.session.progress.count(block, "learning")

    def _place(self, step: int) -> int:
        """Which piece is next: each once, in another order every time."""
        epoch, place = divmod(step, len(self.learned))
        order = torch.randperm(len(self.learned), generator=torch.Generator().manual_seed(self.settings.seed + epoch))
        return int(order[place])

    def _gradient(self, sample: Sample) -> Tensor:
        """∂/∂δ of the divergence on one piece, which counts by its text's weight."""
        teacher = self._logits(sample)
        with torch.enable_grad(), self.gates.attached():
            loss = distillation_loss(self._logits(sample), teacher, _targets(sample, teacher))
            _require_finite(loss)
            (gradient,) = torch.autograd.grad(loss, [self.gates.offsets])
        return gradient * (sample.weight * sample.tokens / self.mean_weight)

    def _teachers(self) -> list[TopK]:
        """What the model without gates says on the held-back tokens."""
        with self.session.processes.together(), _roomy(self.settings.tokens):
            return [_likeliest(self._logits(sample)) for sample in self.held]

    def _held_divergence(self, teachers: list[TopK]) -> float:
        """Mean over the held-back tokens, each counting by its weight."""
        total = mass = 0.0
        with self.session.processes.together(), self.gates.attached():
            for sample, teacher in zip(self.held, teachers, strict=True):
                logits = self._logits(sample)
                loss = distillation_loss(logits, teacher, _targets(sample, logits))
                _require_finite(loss)
                weight = sample.weight * _predicted(sample)
                total, mass = total + weight * float(loss), mass + weight
        total, mass = self.session.processes.total(total, mass)
        return total / max(mass, 1e-30)

    def _logits(self, sample: Sample) -> Tensor:
        """The model's, in one forward."""
        embeddings: Any = self.model.get_input_embeddings()
        inputs = {name: value.to(embeddings.weight.device) for name, value in sample.inputs.items()}
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


@contextmanager
def _roomy(tokens: int) -> Iterator[None]:
    """Say what to do where the activations of so many tokens find no room.

    Raises:
        FaspError: If they don't.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FaspError(
            f"learning.tokens must be few enough for the device, got {tokens}: the activations of the whole model find "
            "no room there; lower it, shorten the sequences, or score by 'fisher'"
        ) from error


def _likeliest(logits: Tensor) -> TopK:
    return top_k(logits, min(HELD_TOP_K, logits.shape[-1] - 1))


def _targets(sample: Sample, logits: Tensor) -> Tensor:
    """(batch, seq) labels, where the logits are."""
    return sample.targets.to(logits.device)  # type: ignore[union-attr]  # all samples here have them


def _predicted(sample: Sample) -> int:
    """How many tokens the divergence is a mean over."""
    return int((sample.targets[:, 1:] != IGNORED).sum())  # type: ignore[index]


def _require_finite(divergence: Tensor) -> None:
    if not divergence.isfinite():
        raise FaspError(
            "the divergence from the model without gates must be finite, got NaN or Inf; run the model in float32 or "
            "bfloat16, or score by 'fisher'"
        )
