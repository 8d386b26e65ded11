"""Where in which epoch a loader is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fasp_lightning.training.trainer.resuming import BatchProgress


class Position:
    """Where in which epoch a loader is.

    It counts epochs by itself as soon as it was resumed: Lightning 2.6, run by ``max_steps`` and resumed from the
    end of an epoch, passes over a number.

    Args:
        progress: Says which of the batches given out have been trained on: after a checkpoint that was written
            in the middle of a training step, on an exception say, that batch must come again.

    Attributes:
        epoch: Number of the epoch.
        given: Batches given to the training in it.
    """

    def __init__(self, progress: BatchProgress | None = None) -> None:
        self.epoch = self.given = 0
        self.progress = progress or BatchProgress()
        self._told = 0
        self._ahead = 0  # of what Lightning tells
        self._loaded: dict[str, int] | None = None

    def begin(self, told: int, batches: int) -> bool:
        """Start an iteration: of a new epoch, or of what is left of the one in which a run was stopped.

        Args:
            told: The epoch according to Lightning.
            batches: Batches of a whole epoch.

        Returns:
            Whether there is anything to give.
        """
        if self.progress.over:
            return False
        loaded, self._loaded = self._loaded, None
        self.given = 0
        if loaded is not None:
            unfinished = told == loaded["told"] and loaded["batches"] < batches
            self._ahead = loaded["epoch"] + (0 if unfinished else 1) - told
            self.given = loaded["batches"] if unfinished else 0
        self.epoch, self._told = told + self._ahead, told
        return True

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batches of it that were trained on."""
        if self._loaded is not None:  # nothing was given since
            return dict(self._loaded)
        return {"epoch": self.epoch, "told": self._told, "batches": max(0, self.given - self.progress.in_flight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        self._loaded = {key: state[key] for key in ("epoch", "told", "batches")}


def warn_of_another_order(state: dict[str, Any], order: str) -> None:
    """Say that a resumed run won't see what the stopped one would have seen."""
    if state["order"] != order:
        rank_zero_warn(
            "the checkpoint was written with another text, tokenizer, seq_len, batch_size, seed or number of "
            "processes: the training sequences are not those that the stopped run would have gone on with"
        )
