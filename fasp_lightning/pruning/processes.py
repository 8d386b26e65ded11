"""Pruning in several processes: each runs its own part of the calibration set, one solves, all cut alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from fasp_lightning.errors import FaspError, FaspProcessError

T = TypeVar("T")


class Processes:
    """The processes that hold copies of the same model; by default this one alone.

    Every method is a collective call: all processes make it, in the same order, or those that do wait for ever. So work
    that can fail in one of them alone stands in :meth:`together`. The properties need no other process.

    Args:
        group: Their process group; ``None`` is a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @classmethod
    def everyone(cls) -> Processes:
        """All processes of ``torch.distributed`` if it runs, else this one alone."""
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if running else None)

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return 0 if self._group is None else dist.get_rank(self._group)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that computes what all need."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        if self._group is None:
            return
        sent = tensor.to(self._wire)
        dist.all_reduce(sent, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)

    def total(self, *values: float) -> list[float]:
        """Sums of some numbers over the processes, in float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.add(sums)
        return sums.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that each process does for itself; an error in one of them is raised in all.

        Without it, a process that raised would leave the others waiting in their next collective call until the
        backend's time-out, and its error would be lost in theirs.

        Raises:
            FaspProcessError: In the other processes, with the message, if it was a refusal.
            RuntimeError: Likewise, if it was another error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        mine = None if error is None else (f"{type(error).__name__}: {error}", isinstance(error, FaspError))
        errors = self.gather(mine)
        if error is not None:
            raise error
        for rank, found in enumerate(errors):
            if found is not None:
                message, refused = found
                raise (FaspProcessError if refused else RuntimeError)(f"process {rank} stopped with {message}")

    def from_first(self, value: T | None) -> T:
        """What the first process has, in all of them.

        Only the first one computes what all need (a solve, a look into a cache), so that rounding on different hardware
        cannot make their copies of the model differ.

        Args:
            value: Plain data and tensors; that of the other processes is not looked at. Tensors arrive on the CPU.
        """
        if self._group is None:
            return value  # type: ignore[return-value]  # of the first process, which has it
        # pickled on a GPU, a tensor would arrive on the first process's device in all of them
        box: list[Any] = [tree_map(_on_cpu, value) if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What each process has, in all of them, by rank; plain data and tensors."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    @property
    def _wire(self) -> torch.device:
        """Where the backend takes tensors from."""
        kinds = dist.Backend.backend_capability.get(dist.get_backend(self._group), ["cpu"])
        if "cpu" in kinds:
            return torch.device("cpu")
        return torch.device(kinds[0], torch.accelerator.current_device_index())


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
