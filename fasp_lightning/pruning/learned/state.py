"""The state of the learning, and its file under a key of all that decides on it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.pruning.blocks.samples import Sample
from fasp_lightning.pruning.budget.budget import Budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.own_text.cache import read_checked, weights_digest, write_checked
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.staging import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
"""Goes into every key: a change of the learning makes old files unused."""

READ = ("allocation", "head_balance", "multiple_of", "sensitivity_tokens", "micro_batch_size")
"""Settings that decide on the scores beside those of the learning itself and the budget."""


@dataclass
class LearningState:
    """Where the learning is.

    Attributes:
        offsets: (units of all pairs,) float64, what is learned.
        step: Steps that are done.
        divergences: Steps → mean divergence on the held-back tokens after them.
        best: The offsets where it was lowest; the first of them where several were.
        optimizer: Adam's state; empty before the first step.
    """

    offsets: Tensor
    step: int = 0
    divergences: dict[int, float] = field(default_factory=dict)
    best: Tensor | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> int:
        """The step with the lowest divergence."""
        return min(self.divergences, key=lambda step: (self.divergences[step], step))

    def note(self, divergence: float, optimizer: torch.optim.Optimizer) -> None:
        """Take down how well the present offsets do."""
        self.divergences[self.step] = divergence
        if self.chosen == self.step:
            self.best = self.offsets.detach().clone()
        self.optimizer = optimizer.state_dict()


@dataclass(frozen=True)
class StateFile:
    """Where the state is kept, for the first of the processes that learn together.

    Attributes:
        processes: Those.
        path: The file; ``None`` where nothing is kept.
    """

    processes: Processes
    path: Path | None

    @classmethod
    def of(
        cls, processes: Processes, model: PreTrainedModel, samples: list[Sample], budget: Budget, config: PruningConfig
    ) -> StateFile:
        """The file under the key of what decides on the outcome.

        Args:
            processes: Those that learn together; each has samples of its own.
            model: Of which every weight is read.
            samples: The calibration set.
            budget: The uniform widths.
            config: The settings.
        """
        folder = config.learning.cache_dir
        if folder in (None, "auto"):
            return cls(processes, None)
        learning = {name: value for name, value in asdict(config.learning).items() if name != "cache_dir"}
        with processes.together():
            weights, mine = weights_digest(model), _digest(samples)
        key = fingerprint(
            FORMAT,
            weights,
            processes.gather(mine),
            asdict(budget),
            learning,
            {name: getattr(config, name) for name in READ},
        )
        return cls(processes, Path(str(folder)).expanduser() / f"{key}.pt")

    def read(self) -> LearningState | None:
        """The state that was kept last, in all processes; ``None`` if there is none, or it is damaged."""
        if self.path is None:
            return None
        return self.processes.from_first(_read(self.path) if self.processes.is_first else None)

    def write(self, state: LearningState) -> None:
        """Keep a state in place of the one before. A file that cannot be written is no error, and the log says so."""
        if self.path is None or not self.processes.is_first:
            return
        buffer = io.BytesIO()
        torch.save({**vars(state), "offsets": state.offsets.detach()}, buffer)
        write_checked(self.path, buffer.getvalue(), "the state of the learning")


def _read(path: Path) -> LearningState | None:
    body = read_checked(path, "columns are learned from the start")
    return None if body is None else LearningState(**torch.load(io.BytesIO(body), weights_only=True))


def _digest(samples: Iterable[Sample]) -> str:
    """Hash the tokens of samples, and all that decides on what they count."""
    digest = hashlib.sha256()
    for sample in samples:
        tensors = {**sample.inputs, "targets": sample.targets}
        for name, tensor in tensors.items():
            if tensor is not None:
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.to(torch.int64).numpy().tobytes())
        digest.update(f"{sample.source} {sample.weight!r} {sample.held_back}\n".encode())
    return digest.hexdigest()
