"""One worker's part of a text, packed into sequences over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from fasp_lightning.errors import FaspError
from fasp_lightning.text.tokens import Packing, document_groups

GROUP_LENGTH = 50_000
"""Characters, at least, tokenised by one call. A resumed worker tokenises its last group again."""


class ShardReader:
    """One worker's part of one text, packed: every ``shards``-th document, over and over.

    Args:
        documents: Opens the text at its start.
        name: The text, for messages.
        packing: How it is cut.
        shard: Which part.
        shards: Number of parts.
        cursor: Where to begin: pass over the text, document of the part, token after that document's start.

    Attributes:
        cursor: Where the next sequence begins, given likewise.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        name: str,
        packing: Packing,
        shard: int,
        shards: int,
        cursor: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.documents, self.name, self.packing = documents, name, packing
        self.shard, self.shards = shard, shards
        self.cursor = list(cursor)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield sequences without end.

        Raises:
            FaspError: If all of the part makes no sequence.
        """
        rest: list[int] = []
        at, taken = self.cursor[2], self.packing.taken
        for turn, document, ids in self._groups():
            while len(rest) + len(ids) - at >= taken:
                end = at + taken - len(rest)
                sequence, rest, at = rest + ids[at:end], [], end
                self.cursor = [turn, document, at]
                yield self.packing.sequence(sequence)
            rest, at = rest + ids[at:], 0

    def _groups(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield token ids of some documents at a time, with the pass and the first document's number."""
        turn, first = self.cursor[:2]
        while True:
            tokens, document = 0, first
            part = islice(self.documents(), self.shard + first * self.shards, None, self.shards)
            for group in document_groups(part, GROUP_LENGTH):
                ids = self.packing.encode(group)
                tokens += len(ids)
                yield turn, document, ids
                document += len(group)
            if first == 0 and tokens < self.packing.taken:
                raise FaspError(
                    f"{self.name} is too short to stream: its part {self.shard + 1} of {self.shards} has {tokens} "
                    f"tokens, and {self.packing.need}; give more text, lower seq_len or num_workers, or set streaming "
                    "to false"
                )
            turn, first = turn + 1, 0
