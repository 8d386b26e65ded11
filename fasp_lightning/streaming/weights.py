"""Weights that the engine is given a block at a time, and that are kept as soon as a block is pruned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fasp_lightning.checkpoints.streaming.model import StreamedModel
from fasp_lightning.checkpoints.streaming.writing import write_shard
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.blocks.samples import Stored
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.pruning.blocks.weights import PrunedBlock, Weights
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.own_text.cache import weights_digest
from fasp_lightning.pruning.own_text.writing import text_at_hand
from fasp_lightning.pruning.report import PairReport
from fasp_lightning.staging import read_json, staged, staged_file, write_json
from fasp_lightning.streaming.journal import Journal
from fasp_lightning.structure.pair import ResolvedPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

TOGETHER = "states.pt"
"""Hidden states that were in memory, all of them."""


class StreamedWeights(Weights):
    """Blocks from a checkpoint's shards, or from those of the last round, and into shards of this one.

    Args:
        streamed: The model.
        journal: Where finished blocks go.
    """

    def __init__(self, streamed: StreamedModel, journal: Journal) -> None:
        self._streamed = streamed
        self.journal = journal
        self._round = 0
        self._states: Path | None = None  # what the last finished block returns

    def home(self, pairs: list[list[ResolvedPair]]) -> torch.device:
        """Where parts are filled."""
        return self._streamed.device

    def require(self, model: PreTrainedModel) -> None:
        """Weights that are in files can be pruned."""

    def own_text(self, config: OwnTextConfig, starts: Tensor | None) -> list[Tensor]:
        """Own text from its cache.

        Raises:
            FaspError: If it is not there.
        """

        def at_hand() -> list[Tensor]:
            found = self.text_at_hand(config, starts)
            if found is None:
                raise FaspError(
                    "own_text must be in its cache where the model is streamed, got none: sampling would read the "
                    "whole model for each token; set own_text to null, or let another machine fill own_text.cache_dir"
                )
            return found

        return self.once("own-text", at_hand)

    def text_at_hand(self, config: OwnTextConfig, starts: Tensor | None) -> list[Tensor] | None:
        """Own text from its cache, or ``None``."""
        streamed = self._streamed

        def digest(model: PreTrainedModel) -> str:
            return weights_digest(model, streamed.tensors())

        return text_at_hand(streamed.model, config, starts, digest)

    def placed(self, module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """A block, held; what is left of a model without its blocks is filled where it is called."""
        paths = [path for path in self._streamed.blocks if self._streamed.parts[path].module is module]
        return self._streamed.held(paths[0]) if paths else nullcontext()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What was made under a name in this round."""
        return self.journal.once(f"{self._round}-{name}", make)

    def start_round(self, number: int) -> list[PrunedBlock]:
        """What an earlier run has made of the first blocks in a round."""
        self._round = number
        return [self._read(index) for index in range(self.journal.done(number))]

    def take_over(self, index: int, pairs: list[ResolvedPair], done: PrunedBlock) -> None:
        """Give a block the shapes that an earlier run has given it, and the weights."""
        super().take_over(index, pairs, done)
        names = read_json(self._record(index))["names"]
        self._streamed.move(self._streamed.blocks[index], self._shard(index), names)

    def take_up(self, hidden: list[Stored], store: TensorStore) -> list[Stored]:
        """What the last finished block returns."""
        done = self.journal.done(self._round)
        if done in (0, len(self._streamed.blocks)):
            return hidden
        self._states = folder = self._states_before(done)
        for stored in hidden:
            store.drop(stored)
        return [store.put(state) for state in _states_in(folder, len(hidden))]

    def finish(self, index: int, pairs: list[ResolvedPair], done: PrunedBlock, hidden: list[Stored]) -> None:
        """Write a block and what it returns, and then that it is done; beside the computing."""
        path, number, before = self._streamed.blocks[index], self._round, self._states
        state = self._streamed.state(path)
        shard, record = self._shard(index), self._record(index)
        told = _plain(done, list(state))
        self._states = after = self._states_before(index + 1) if index + 1 < len(self._streamed.blocks) else None
        states = [] if after is None else [_second_name(stored, after, at) for at, stored in enumerate(hidden)]

        def write() -> None:
            write_shard(state, shard)
            with staged_file(record) as new:
                write_json(new, told)
            if after is not None:
                with staged(after) as stage:
                    _put(states, stage)
            self.journal.note(number, index + 1)
            if before is not None:
                shutil.rmtree(before, ignore_errors=True)

        self._streamed.disk.write(write, sum(tensor.nbytes for tensor in state.values()))
        self._streamed.move(path, shard, list(state))

    def _read(self, index: int) -> PrunedBlock:
        record = read_json(self._record(index))
        kept = [torch.tensor(units, dtype=torch.long) for units in record["kept"]]
        return PrunedBlock(kept, [PairReport(**entry) for entry in record["entries"]], record["warnings"])

    def _shard(self, index: int) -> Path:
        return self.journal.folder / f"{self._round}-block-{index}.safetensors"

    def _record(self, index: int) -> Path:
        return self._shard(index).with_suffix(".json")

    def _states_before(self, index: int) -> Path:
        return self.journal.folder / f"{self._round}-states-{index}"


def _plain(done: PrunedBlock, names: list[str]) -> dict[str, Any]:
    kept = [units.tolist() for units in done.kept]
    return {"names": names, "kept": kept, "entries": list(map(asdict, done.entries)), "warnings": done.warnings}


def _second_name(stored: Stored, folder: Path, number: int) -> Stored:
    """A file that the engine will remove soon, under another name; a tensor in memory as it is."""
    if not isinstance(stored, Path):
        return stored
    name = folder.with_name(f"{folder.name}-{number}.pt")
    name.unlink(missing_ok=True)
    try:
        os.link(stored, name)
    except OSError:  # another disk, or a file system without such names
        shutil.copyfile(stored, name)
    return name


def _put(states: list[Stored], folder: Path) -> None:
    """Write tensors into one file, which the disk takes sooner than many; move those that are files already."""
    tensors = {at: stored.cpu() for at, stored in enumerate(states) if not isinstance(stored, Path)}
    if tensors:
        torch.save(tensors, folder / TOGETHER)
    for at, stored in enumerate(states):
        if isinstance(stored, Path):
            stored.rename(folder / f"{at}.pt")


def _states_in(folder: Path, count: int) -> Iterator[Tensor]:
    file = folder / TOGETHER
    together = torch.load(file, mmap=True, weights_only=True) if file.exists() else {}
    for at in range(count):
        yield together[at] if together else torch.load(folder / f"{at}.pt", weights_only=True)
