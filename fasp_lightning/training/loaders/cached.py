"""Packed sequences as a map-style data set, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasp_lightning.ops.likelihood import IGNORED
from fasp_lightning.text.shuffling import BLANK, TrainingSampler
from fasp_lightning.training.loaders.position import Position, warn_of_another_order
from fasp_lightning.training.trainer.resuming import BatchProgress


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Sequences of several texts end to end, each {"input_ids": (seq_len,), "labels": (seq_len,)}, int64.

    Index ``BLANK`` is a sequence that no loss and no metric counts.

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


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader of training batches whose ``state_dict`` is the place in the epoch.

    Loaded into a loader of the same data, seed and batch size, it goes on with the very next batch. Batches
    that workers have prepared are not counted before they are given out. One iteration counts at a time: for
    another purpose than training, make a loader of its own from ``dataset``. No random state but its own is
    drawn from.

    Args:
        dataset: Map-style data set.
        batch_size: Sequences of a batch.
        sampler: Order of the sequences; it is asked for the epoch.
        progress: See :class:`Position`.
        order: Names what decides on the order; resuming with another one is warned of.
        options: Of the ``DataLoader``; Lightning, which makes it anew for ``overfit_batches``, gives all of them.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Tensor]],
        batch_size: int,
        sampler: Any,
        progress: BatchProgress | None = None,
        order: str = "",
        **options: Any,
    ) -> None:
        self.position = Position(progress)
        self.order = order
        # without a generator each epoch would draw a seed from the global random state
        own: dict[str, Any] = {"drop_last": True, "generator": torch.Generator()}
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **own | options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield what is left of the epoch.

        As a generator it begins at the first ``next``: Lightning makes the iterator before it tells the epoch.
        """
        if not self.position.begin(getattr(self.sampler, "epoch", 0), len(self)):
            return
        skipped = self._skip()
        for number, batch in enumerate(super().__iter__()):
            if number >= skipped:
                self.position.given += 1
                yield batch

    def _skip(self) -> int:
        """Tell the sampler where to begin; if it can't be told, return the number of batches to leave out."""
        if not isinstance(self.sampler, TrainingSampler):  # Lightning's, under overfit_batches
            return self.position.given
        self.sampler.begin(self.position.epoch, self.position.given)
        return 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as plain data."""
        return {**self.position.state_dict(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there in the next iteration, if that is of the same epoch."""
        warn_of_another_order(state, self.order)
        self.position.load_state_dict(state)
