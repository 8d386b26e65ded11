"""One worker's part of a text, packed into sequences over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.text.tokens import document_groups, encode_documents

GROUP_LENGTH = 50_000
"""Characters, at least, tokenised by one call. A resumed worker tokenises its last group again."""


class ShardReader:
    """One worker's part of one text, packed: every ``shards``-th document, over and over.

    Args:
        documents: Opens the text at its start.
        name: The text, for messages.
        encode: Token ids of a list of documents end to end.
        seq_len: Tokens of a sequence.
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


class Encoder:
    """A tokenizer and a separator as one function that can be sent to a worker.

    Args:
        tokenizer: A tokenizer of transformers.
        separator: Text between two documents; ``None`` puts the tokenizer's end-of-text token there.
    """

    def __init__(self, tokenizer: Any, separator: str | None) -> None:
        self.tokenizer, self.separator = tokenizer, separator

    def __call__(self, group: list[str]) -> list[int]:
        """Token ids of documents end to end."""
        return encode_documents(group, self.tokenizer, self.separator)
