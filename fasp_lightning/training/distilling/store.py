"""What a teacher says of sequences, on disk: read back at random, by the sequences themselves."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.distillation import TopK
from fasp_lightning.staging import staged_file

FORMAT = 1
"""Goes into every key: a change of what is written makes old files unused."""

PIECE = 64
"""Sequences of a file: as many are lost where computing them is stopped."""

FEW = 2**16
"""Tokens that two bytes tell apart."""

log = logging.getLogger(__name__)


class Sequences:
    """Sequences of one length that are found by what they are, in whatever order they come.

    Args:
        ids: (sequences, seq_len) token ids, on the CPU.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        marks = _marks(ids)
        self.digest = hashlib.sha256(str(tuple(ids.shape)).encode() + marks.tobytes()).hexdigest()
        self._order = np.argsort(marks, kind="stable")
        self._sorted = marks[self._order]

    def places(self, ids: Tensor) -> list[int]:
        """Where each row of a batch is among them.

        Args:
            ids: (batch, seq) token ids, anywhere.

        Raises:
            FaspError: If one is not.
        """
        at, known = self._find(ids)
        if not known:
            raise FaspError(
                "batches must hold the sequences that the teacher's answers were computed for, whole and as they were, "
                "got another one; set top_k of distillation to null to ask the teacher live"
            )
        return self._order[at].tolist()

    def hold(self, ids: Tensor) -> bool:
        """Whether each row of a batch is among them."""
        return self._find(ids)[1]

    def _find(self, ids: Tensor) -> tuple[np.ndarray, bool]:
        """Where rows are in the sorted marks, or would be, and whether all of them are there."""
        marks = _marks(ids)
        at = np.searchsorted(self._sorted, marks).clip(max=len(self._sorted) - 1)
        return at, np.array_equal(self._sorted[at], marks)


class AnswerStore:
    """The likeliest tokens of a teacher's predictions on a number of sequences, in files of ``PIECE`` each.

    A log-probability takes two bytes (float16 is within 0.05 % of it), a token two or, of a large vocabulary, four.
    A file is there as a whole or not at all.

    Args:
        folder: Where they are.
        sequences: How many.
        seq_len: Tokens of a sequence.
        k: Answers to each prediction.
        vocabulary: Tokens there are.
    """

    def __init__(self, folder: Path, sequences: int, seq_len: int, k: int, vocabulary: int) -> None:
        self.folder, self.sequences = folder, sequences
        token = np.dtype(np.uint16 if vocabulary <= FEW else np.int32)
        self._row = np.dtype([("values", np.float16, (seq_len, k)), ("tokens", token, (seq_len, k))])
        self._open = functools.cache(self._mapped)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.sequences * self._row.itemsize

    def pieces(self) -> list[range]:
        """The sequences of each file."""
        starts = range(0, self.sequences, PIECE)
        return [range(start, min(start + PIECE, self.sequences)) for start in starts]

    def missing(self) -> list[int]:
        """Numbers of the files that are not there, or not whole."""
        return [number for number, piece in enumerate(self.pieces()) if not self._is_whole(number, len(piece))]

    def write(self, number: int, answers: TopK) -> None:
        """Write one file.

        Args:
            number: Which one.
            answers: To its sequences, (sequences, seq_len, k).

        Raises:
            OSError: If it cannot be written.
        """
        rows = np.empty(len(answers.tokens), self._row)
        rows["values"] = answers.log_probabilities.to("cpu", torch.float16).numpy()
        rows["tokens"] = answers.tokens.cpu().numpy()
        with staged_file(self._file(number)) as file:
            rows.tofile(file)

    def read(self, places: list[int]) -> TopK:
        """The answers to some sequences, on the CPU: log-probabilities float32, tokens int64."""
        rows = np.stack([self._open(place // PIECE)[place % PIECE] for place in places])
        return TopK(
            torch.from_numpy(rows["values"].astype(np.float32)), torch.from_numpy(rows["tokens"].astype(np.int64))
        )

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.topk"

    def _is_whole(self, number: int, sequences: int) -> bool:
        try:
            return self._file(number).stat().st_size == sequences * self._row.itemsize
        except FileNotFoundError:
            return False

    def _mapped(self, number: int) -> np.ndarray:
        return np.memmap(self._file(number), self._row, mode="r")


def _marks(ids: Tensor) -> np.ndarray:
    """(batch,) 64 bits of hash of each row."""
    rows = np.ascontiguousarray(ids.cpu().numpy(), dtype=np.int64)
    found = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(found, dtype=np.int64)
