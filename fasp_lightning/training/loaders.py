"""Packed sequences as a map-style data set, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasp_lightning.training.metrics import IGNORED
from fasp_lightning.training.sampling import BLANK, TrainingSampler


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Sequences of several texts end to end, each {"input_ids": (seq_len,), "labels": (seq_len,)}, int64.

    Index `BLANK` is a sequence that no loss and no metric counts.

    Args:
        texts: Data sets with the column input_ids.
    """

    def __init__(self, texts: Sequence[Any]) -> None:
        self.texts = list(texts)
        self.lengths = [len(text) for text in self.texts]
        self._ends = list(accumulate(self.lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == BLANK:
            ids = self[0]["input_ids"]
            return {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), or {BLANK} for a blank sequence, got {index}")
        text = bisect.bisect_right(self._ends, index)
        ids = self.texts[text][index - self._ends[text] + self.lengths[text]]["input_ids"]
        return {"input_ids": ids, "labels": ids.clone()}


class Position:
    """Where in an epoch a loader is: the number of batches that it has given to the training.

    Args:
        in_flight: Says how many of the batches given out (0 or 1) have not been trained on. A checkpoint that
            is written in the middle of a training step, on an exception say, must give that batch again.
    """

    def __init__(self, in_flight: Callable[[], int] | None = None) -> None:
        self.epoch = 0
        self.given = 0
        self.in_flight = in_flight or (lambda: 0)
        self._loaded: tuple[int, int] | None = None

    def begin(self, epoch: int) -> int:
        """Start an iteration, and say how many batches to leave out: those given before the run was stopped."""
        epoch_loaded, given = self._loaded or (epoch, 0)
        self._loaded = None
        self.epoch, self.given = epoch, given if epoch_loaded == epoch else 0
        return self.given

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were trained on."""
        if self._loaded is not None:  # nothing was given since
            return {"epoch": self._loaded[0], "batches": self._loaded[1]}
        return {"epoch": self.epoch, "batches": max(0, self.given - self.in_flight())}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin there."""
        self._loaded = (state["epoch"], state["batches"])


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader of training batches whose `state_dict` is the place in the epoch.

    Loaded into a loader of the same data, seed and batch size, it goes on with the very next batch. Batches
    that workers have prepared are not counted before they are given out. One iteration counts at a time: for
    another purpose than training, make a loader of its own from `dataset`. No random state but its own is
    drawn from.

    Args:
        dataset: Map-style data set.
        sampler: Order of the sequences; it is asked for the epoch.
        batch_size: Sequences of a batch.
        num_workers: Worker processes that read ahead.
        in_flight: See :class:`Position`.
        order: Names what decides on the order; resuming with another one is warned of.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Tensor]],
        sampler: Any,
        batch_size: int,
        num_workers: int = 0,
        in_flight: Callable[[], int] | None = None,
        order: str = "",
    ) -> None:
        self.position = Position(in_flight)
        self.order = order
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            drop_last=True,
            generator=torch.Generator(),  # else each epoch draws a seed from the global random state
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield what is left of the epoch.

        As a generator it begins at the first `next`: Lightning makes the iterator before it tells the epoch.
        """
        start = self.position.begin(getattr(self.sampler, "epoch", 0))
        skipped = 0
        if isinstance(self.sampler, TrainingSampler):
            self.sampler.start = start
        else:  # Lightning's, under overfit_batches
            skipped = start
        for number, batch in enumerate(super().__iter__()):
            if number >= skipped:
                self.position.given += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain data."""
        return {**self.position.state_dict(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there in the next iteration, if that is of the same epoch."""
        warn_of_another_order(state, self.order)
        self.position.load_state_dict(state)


def warn_of_another_order(state: dict[str, Any], order: str) -> None:
    """Say that a resumed run won't see what the stopped one would have seen."""
    if state["order"] != order:
        rank_zero_warn(
            "the checkpoint was written with another text, tokenizer, seq_len, batch_size, seed or number of "
            "processes: the training sequences are not those that the stopped run would have gone on with"
        )
