"""The loader of streamed training text, which resumes at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fasp_lightning.errors import FaspError
from fasp_lightning.text.token_stream import TokenStream, as_batch
from fasp_lightning.training.loaders.position import Position, warn_of_another_order
from fasp_lightning.training.trainer.resuming import BatchProgress


class StreamLoader:
    """Cuts an endless stream into epochs of equal length; its state travels with the batches.

    An epoch begins where the last one ended. Every process gives the same number of batches, so none waits for
    another at the end. It has the ``sampler`` by which Lightning tells a loader the epoch.

    Args:
        stream: The batches.
        batches: Batches of an epoch.
        num_workers: Worker processes that read ahead.
        progress: See :class:`Position`.
        gather: Makes a list of what each process has: a checkpoint is written by one of them.
        order: Names what decides on the order; resuming with another one is warned of.
        check: Refuses (batch_size, seq_len) token ids before they are given out.
    """

    def __init__(
        self,
        stream: TokenStream,
        batches: int,
        num_workers: int = 0,
        progress: BatchProgress | None = None,
        gather: Callable[[Any], list[Any]] = lambda state: [state],
        order: str = "",
        check: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.check = check or (lambda ids: None)
        self.stream, self.batches, self.num_workers = stream, batches, num_workers
        self.position, self.gather, self.order = Position(progress), gather, order
        self.epoch = 0
        self._states = list(stream.states)
        self._turn = 0
        self._undo: tuple[int, Any] | None = None

    @property
    def sampler(self) -> StreamLoader:
        """Itself: who is told the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield what is left of the epoch; as a generator it begins at the first ``next``."""
        if not self.position.begin(self.epoch, self.batches):
            return
        self.stream.states, self.stream.turn = list(self._states), self._turn
        loader = DataLoader(
            self.stream,
            batch_size=None,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # without a batch_size it gets no list
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else each epoch draws a seed from the global random state
        )
        for batch in islice(loader, self.batches - self.position.given):
            self.check(batch["input_ids"])
            self._note(batch["worker"], batch["state"])
            yield as_batch(batch["input_ids"])

    def _note(self, worker: int, state: Any) -> None:
        """Remember that a worker's batch is given out, and how it was before."""
        self._undo = (worker, self._states[worker])
        self._states[worker] = state
        self._turn = (worker + 1) % self.stream.workers
        self.position.given += 1

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch and in the text, of all processes, as plain data.

        All processes must call it, as they must ``Trainer.save_checkpoint``.
        """
        states, turn = list(self._states), self._turn
        if self._undo is not None and self.position.progress.in_flight:
            worker, before = self._undo
            states[worker], turn = before, worker
        ranks = self.gather({"states": states, "turn": turn})
        return {**self.position.state_dict(), "order": self.order, "shards": self.stream.shards, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there in the next iteration.

        Raises:
            FaspError: If it is of text that was not streamed, or of another number of processes × workers, among which
                the text was divided.
        """
        if "ranks" not in state:
            raise FaspError(
                "a stream must be resumed from a checkpoint of a stream, got one whose training text was cached; set "
                "streaming to false, or give the weights alone"
            )
        ranks = len(state["ranks"])
        if (state["shards"], ranks) != (self.stream.shards, self.stream.shards // self.stream.workers):
            raise FaspError(
                f"a stream must be resumed with the processes and num_workers it was stopped with ({ranks} and "
                f"{state['shards'] // ranks}), got {self.stream.shards // self.stream.workers} and "
                f"{self.stream.workers}; the text is divided among them (num_workers 0 counts as 1)"
            )
        warn_of_another_order(state, self.order)
        self.position.load_state_dict(state)
        mine = state["ranks"][self.stream.rank]
        self._states, self._turn, self._undo = list(mine["states"]), mine["turn"], None


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    """Stands for a collate function: the stream's batches are whole."""
    return batch
