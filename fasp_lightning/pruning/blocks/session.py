"""What one call of the engine computes with, made once and handed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.blocks.weights import Weights
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Progress, Stopwatch, WorkCounter
from fasp_lightning.structure.pair import ResolvedPair


@dataclass(frozen=True)
class Session:
    """The one owner of a run's device, tensors, processes, clock and progress.

    Attributes:
        device: The compute device.
        store: Where the calibration set's tensors are kept between two uses; empty outside a ``with`` block of it.
        processes: Those that prune together.
        clock: Counts seconds by phase.
        progress: Counts passes of samples through blocks.
        weights: Where the model's weights are.
    """

    device: torch.device
    store: TensorStore
    processes: Processes
    clock: Stopwatch
    progress: WorkCounter
    weights: Weights

    @classmethod
    def start(
        cls,
        config: PruningConfig,
        pairs: list[list[ResolvedPair]],
        progress: Progress | None = None,
        processes: Processes | None = None,
        weights: Weights | None = None,
    ) -> Session:
        """Start the clock.

        Args:
            config: ``device`` and ``offload`` are read.
            pairs: The model's pairs; where they are is the compute device, if the settings name none.
            progress: Called after each pass of a sample through a block.
            processes: Those that prune together; by default this process alone.
            weights: Where the model's weights are; by default in memory.
        """
        weights = weights or Weights()
        here = weights.home(pairs)
        device = torch.device(config.device) if config.device else here
        store, clock = TensorStore(config.offload, device), Stopwatch(device)
        return cls(device, store, processes or Processes(), clock, WorkCounter(progress, len(pairs)), weights)
