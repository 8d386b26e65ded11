"""Training text that is read, tokenised and packed on the fly, sharded by process and worker, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.text import document_groups, encode_documents
from fasp_lightning.training.sampling import generator

GROUP_LENGTH = 50_000
"""Characters, at least, tokenised by one call. A resumed worker tokenises its last group again."""

WINDOW = 256
"""Sequences, at least, that are shuffled at a time. A resumed worker packs its last window again."""

State = dict[str, Any]
"""Plain data: the window's number and start, and how many of its sequences were given."""


class ShardReader:
    """One worker's part of one text, packed: every `shards`-th document, over and over.

    Args:
        documents: Opens the text at its start.
        name: The text, for messages.
        encode: Token ids of a list of documents end to end.
        seq_len: Tokens of a sequence.
        shard: Which part.
        shards: Number of parts.
        cursor: Where to begin: pass over the text, document of the part, token after that document's start.

    Attributes:
        cursor: Where the next sequence begins, in the same form.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        name: str,
        encode: Callable[[list[str]], list[int]],
        seq_len: int,
        shard: int,
        shards: int,
        cursor: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.documents, self.name, self.encode = documents, name, encode
        self.seq_len, self.shard, self.shards = seq_len, shard, shards
        self.cursor = list(cursor)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield sequences without end.

        Raises:
            FaspError: If all of the part makes no sequence.
        """
        rest: list[int] = []
        at = self.cursor[2]
        for turn, document, ids in self._groups():
            while len(rest) + len(ids) - at >= self.seq_len:
                end = at + self.seq_len - len(rest)
                sequence, rest, at = rest + ids[at:end], [], end
                self.cursor = [turn, document, at]
                yield sequence
            rest, at = rest + ids[at:], 0

    def _groups(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield token ids of some documents at a time, with the pass and the first document's number."""
        turn, first = self.cursor[:2]
        while True:
            tokens, document = 0, first
            part = islice(self.documents(), self.shard + first * self.shards, None, self.shards)
            for group in document_groups(part, GROUP_LENGTH):
                ids = self.encode(group)
                tokens += len(ids)
                yield turn, document, ids
                document += len(group)
            if first == 0 and tokens < self.seq_len:
                raise FaspError(
                    f"{self.name} is too short to stream: its part {self.shard + 1} of {self.shards} has {tokens} "
                    f"tokens, and one sequence needs seq_len={self.seq_len}; give more text, lower seq_len or "
                    "num_workers, or set streaming to false"
                )
            turn, first = turn + 1, 0


class TokenStream(IterableDataset[dict[str, Any]]):
    """Endless batches of packed, mixed and shuffled sequences.

    Worker w of a process reads part `rank · workers + w` of every text. The texts are mixed in the exact
    proportion of their weights, and shuffled within windows. Everything depends on the seed, the part and the
    number of parts alone.

    Args:
        texts: Pairs of name and opener of each text.
        weights: Weight of each text; None weighs them alike.
        tokenizer: A tokenizer of transformers.
        separators: Text between two documents of each text; None puts the end-of-text token there.
        seq_len: Tokens of a sequence.
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
        tokenizer: Any,
        separators: Sequence[str | None],
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
    ) -> None:
        self.texts, self.separators, self.tokenizer = list(texts), list(separators), tokenizer
        self.weights = [1.0] * len(self.texts) if weights is None else list(weights)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
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
        readers = []
        for (name, documents), separator, cursor in zip(self.texts, self.separators, cursors, strict=True):
            encode = _Encode(self.tokenizer, separator)
            readers.append(ShardReader(documents, name, encode, self.seq_len, shard, self.shards, cursor))
        return readers

    def _next_text(self, counts: list[int]) -> int:
        """Choose the text that is furthest behind its share, and count it."""
        total, given = sum(self.weights), sum(counts) + 1
        behind = [given * weight / total - count for weight, count in zip(self.weights, counts, strict=True)]
        text = behind.index(max(behind))
        counts[text] += 1
        return text


class _Encode:
    """A tokenizer and a separator as one function that can be sent to a worker."""

    def __init__(self, tokenizer: Any, separator: str | None) -> None:
        self.tokenizer, self.separator = tokenizer, separator

    def __call__(self, group: list[str]) -> list[int]:
        return encode_documents(group, self.tokenizer, self.separator)


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    """A training batch of token ids."""
    return {"input_ids": ids, "labels": ids.clone()}
