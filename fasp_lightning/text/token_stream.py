"""Training text that is read, tokenised and packed on the fly, sharded by process and worker, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fasp_lightning.text.mixing import next_text
from fasp_lightning.text.shuffling import generator
from fasp_lightning.text.token_shards import ShardReader
from fasp_lightning.text.tokens import Packing

WINDOW = 256
"""Sequences, at least, that are shuffled at a time. A resumed worker packs its last window again."""

State = dict[str, Any]
"""Plain data: the window's number and start, and how many of its sequences were given."""


class TokenStream(IterableDataset[dict[str, Any]]):
    """Endless batches of packed, mixed and shuffled sequences.

    Worker w of a process reads part ``rank · workers + w`` of every text. The texts are mixed in the exact
    proportion of their weights, and shuffled within windows. Everything depends on the seed, the part and the
    number of parts alone.

    Args:
        texts: Pairs of name and opener of each text.
        weights: Weight of each text; ``None`` weighs them alike.
        packings: How each text is cut.
        batch_size: Sequences of a batch.
        seed: Seed of the shuffling.
        rank: This process.
        world_size: Number of processes.
        workers: Workers of a process, 1 where it reads by itself.

    Attributes:
        states: State of each worker; those that yield first, set before iterating.
        turn: Which worker's batch comes first.
    """

    def __init__(
        self,
        texts: Sequence[tuple[str, Callable[[], Iterable[str]]]],
        weights: Sequence[float] | None,
        packings: Sequence[Packing],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
    ) -> None:
        self.texts, self.packings = list(texts), list(packings)
        self.weights = [1.0] * len(self.texts) if weights is None else list(weights)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.workers, self.shards = rank, workers, workers * world_size
        self.window = -(-WINDOW // batch_size) * batch_size  # no batch lies in two windows
        self.states = [self.start() for _ in range(workers)]
        self.turn = 0

    def start(self) -> State:
        """State of a worker that has given nothing."""
        texts = len(self.texts)
        return {"window": 0, "given": 0, "counts": [0] * texts, "cursors": [[0, 0, 0] for _ in range(texts)]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches: "input_ids" (batch_size, seq_len), the "worker", and its "state" after them."""
        info = get_worker_info()
        # a DataLoader begins with its worker 0, whosever turn it is
        worker = (self.turn + (0 if info is None else info.id)) % self.workers
        state, shard = self.states[worker], self.rank * self.workers + worker
        counts, readers = list(state["counts"]), self._readers(shard, state["cursors"])
        sequences = [iter(reader) for reader in readers]
        window, given = state["window"], state["given"]
        while True:
            begin = {"counts": list(counts), "cursors": [list(reader.cursor) for reader in readers]}
            block = torch.tensor([next(sequences[self._next_text(counts)]) for _ in range(self.window)])
            block = block[torch.randperm(self.window, generator=generator(self.seed, "window", shard, window))]
            for start in range(given, self.window, self.batch_size):
                after = {"window": window, "given": start + self.batch_size, **begin}
                ids = block[start : start + self.batch_size].clone()  # a slice would carry the window along
                yield {"input_ids": ids, "worker": worker, "state": after}
            window, given = window + 1, 0

    def _readers(self, shard: int, cursors: list[list[int]]) -> list[ShardReader]:
        """A reader of each text."""
        return [
            ShardReader(documents, name, packing, shard, self.shards, cursor)
            for (name, documents), packing, cursor in zip(self.texts, self.packings, cursors, strict=True)
        ]

    def _next_text(self, counts: list[int]) -> int:
        """Choose a text, and count it."""
        text = next_text(self.weights, counts)
        counts[text] += 1
        return text


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    """A training batch of token ids."""
    return {"input_ids": ids, "labels": ids.clone()}
