"""Which text, and how much of it: the one description of a text, in the commands and in a data module."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fasp_lightning.errors import FaspError
from fasp_lightning.text.corpora import BUILTIN
from fasp_lightning.text.reading.files import SUFFIXES, is_local, saved_splits
from fasp_lightning.text.splits import SHARES

SPLITS = tuple(SHARES)
"""The splits of built-in and local text."""

OWN_TEXT = "own_text"
"""Source of text that the model of a training run writes itself, before anything is pruned."""

SEQUENCES, SEQ_LEN, BATCH_SIZE, SEED = 64, 512, 1, 0
"""What a text that leaves these open means outside a data module, which has values of its own."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

_HUB_SPLITS = {"calibration": "train"}  # no data set on the hub has a calibration split


class Extent(NamedTuple):
    """How much of a text is read and how it is cut, with nothing left open.

    Attributes:
        sequences: Number of sequences; ``None`` is the whole text.
        seq_len: Tokens of a sequence.
        batch_size: Sequences of a batch.
        seed: Seed of the drawing of sequences.
    """

    sequences: int | None
    seq_len: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how much of it.

    Attributes:
        source: builtin:topics (Python's help topics), builtin:docstrings (of the standard library's modules),
            a local file, a folder or glob pattern of files of one kind, or the id of a data set on the hub; in a data
            module also own_text: text that the run's model writes before it is pruned, which needs no data at hand and
            goes as well beside other text. Files are
            .txt or .md (one document each), .jsonl, .json, .csv, .tsv, .parquet or .arrow (a document a row), all but
            the last two also with .gz, .bz2, .xz or .zst after it. A folder may be what save_to_disk of datasets made;
            hidden files in it, and those about the data (LICENSE, README and the like), are no text.
        subset: The configuration of a data set on the hub, where it has several.
        split: For built-in and local text one of calibration, train, test, validation, which share no
            document; for the hub a split of the data set. None is the split of the role that the text serves in
            (calibration reads the hub's train), but all of a local text. A DatasetDict that save_to_disk made has the
            splits it was saved with, like one on the hub. What several roles of a data module read is divided among
            them by document; a file's only one, or one of a book's length, then in pieces of some thousand characters.
        column: The column or key that holds a row's text, or the messages of a chat (a list with role and content, or
            from and value). Where there is no column text, the chat in messages, conversations or conversation is
            taken, or the one of a question and its answer (prompt and completion, instruction with input and output,
            question and answer, and the like). The tokenizer's chat template makes text of chats. Rows without text
            are passed over.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there. WikiText,
            whose rows on the hub are paragraphs, is commonly joined with two line feeds.
        add_bos: Whether every sequence begins with the tokenizer's beginning-of-text token, which is then one of its
            seq_len tokens and never predicted; a chat's own one, which its template writes, is then left out. "auto" is
            what the tokenizer itself does: those of LLaMA, Gemma and OPT put it there, those of GPT-2 and SmolLM2 do
            not.
        sequences: Number of sequences, drawn at random by the seed where the text has more: from its first 1024, or
            from 16 times as many as are asked for, if that is more. None is the whole text. "auto" is 64 in the
            commands; in a data module it is the whole text, but of calibration text, and of validation and test
            text beside a streamed training text, the first 1024 sequences, and of own text 512 to train on and 64
            of another role.
        seed: Seed of that drawing; None is that of the data module, and 0 outside one.
        seq_len: Tokens of a sequence; None is that of the data module, and 512 outside one.
        batch_size: Sequences of a batch; None is that of the data module, and 1 outside one.
        epoch_weight: Share of the sequences of a training epoch, relative to the other texts' weights; None on all of
            them gives each the share of its length. For training text alone.
        token_weight: How much each token of this text counts in the statistics beside those of other calibration
            texts. For calibration text alone, outside a data module.

    Raises:
        FaspError: If a field is outside its range, or the source is none of those above.
    """

    source: str = "builtin:topics"
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    separator: str | None = None
    add_bos: bool | Literal["auto"] = "auto"
    sequences: int | Literal["auto"] | None = "auto"
    seed: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    epoch_weight: float | None = None
    token_weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", os.fspath(self.source))  # a path will do
        kind = self.kind  # refuses an unknown source
        if kind == "local" and self.split is not None and (splits := saved_splits(self.source)):
            if self.split not in splits:
                raise FaspError(
                    f"split of source {self.source!r} must be one of {', '.join(splits)}, got {self.split!r}"
                )
            object.__setattr__(self, "source", f"{self.source.rstrip('/')}/{self.split}")
            object.__setattr__(self, "split", None)
        if kind == "own" and (self.split is not None or self.sequences is None):
            raise FaspError(
                f"split and sequences of {OWN_TEXT} must not be set to a split, and to the whole of a text that has no "
                f"end, got {self.split!r} and {self.sequences!r}; leave them out, or give a number of sequences"
            )
        if kind != "hub" and self.split is not None and self.split not in SPLITS:
            raise FaspError(unknown_split(self))
        if kind != "hub" and self.subset is not None:
            raise FaspError(f"subset is for the hub alone, got {self.subset!r} with source {self.source!r}")
        if self.seq_len is not None and self.seq_len < 2:
            raise FaspError(f"seq_len must be 2 or more, got {self.seq_len}: one token predicts nothing")
        if isinstance(self.sequences, str) and self.sequences != "auto":
            raise FaspError(f"sequences must be a number, None or 'auto', got {self.sequences!r}")
        if self.add_bos not in (True, False, "auto"):
            raise FaspError(f"add_bos must be True, False or 'auto', got {self.add_bos!r}")
        for name, value in (("sequences", self.number), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise FaspError(f"{name} must be 1 or more, got {value}")
        for name, weight in (("epoch_weight", self.epoch_weight), ("token_weight", self.token_weight)):
            if weight is not None and not 0 < weight < math.inf:
                raise FaspError(f"{name} must be positive and finite, got {weight} for source {self.source!r}")

    @property
    def kind(self) -> str:
        """Where the text is: "builtin", "own", "local" or "hub". A path that exists is never taken for a hub id."""
        if self.source == OWN_TEXT:
            return "own"
        if self.source in BUILTIN:
            return "builtin"
        if not self.source.startswith("builtin:") and self.source:
            if is_local(self.source):
                return "local"
            if _HUB_ID.fullmatch(self.source):
                return "hub"
        raise FaspError(
            f"source must be one of {', '.join((*BUILTIN, OWN_TEXT))}, a file ending in {SUFFIXES}, a folder or glob "
            f"pattern of such files, or a data set on the hub, got {self.source!r}"
        )

    @property
    def number(self) -> int | None:
        """``sequences`` where it is a number."""
        return None if isinstance(self.sequences, str) else self.sequences

    def extent(
        self,
        sequences: int | None = SEQUENCES,
        seq_len: int = SEQ_LEN,
        batch_size: int = BATCH_SIZE,
        seed: int = SEED,
    ) -> Extent:
        """Fill in what the text leaves to the run that it is part of.

        Args:
            sequences: What "auto" means there.
            seq_len: Tokens of a sequence, where the text sets none; likewise the others.
            batch_size: Sequences of a batch.
            seed: Seed of the drawing.
        """
        return Extent(
            sequences if self.sequences == "auto" else self.number,
            seq_len if self.seq_len is None else self.seq_len,
            batch_size if self.batch_size is None else self.batch_size,
            seed if self.seed is None else self.seed,
        )


def for_role(config: TextConfig, role: str) -> TextConfig:
    """Fill in the split that a text in some role should come from, where the config leaves it open.

    Args:
        config: The text.
        role: What it serves for, one of ``SPLITS``.

    Returns:
        The config with that split (of the hub, and of a saved ``DatasetDict``: "train" for calibration); unchanged
        where a split is set, for own text, and for other local text, all of which is meant unless a split is named.

    Raises:
        FaspError: If there is no such role, or the text has a weight that means nothing in it.
    """
    if role not in SPLITS:
        raise FaspError(f"role must be one of {', '.join(SPLITS)}, got {role!r}")
    if role != "calibration" and config.token_weight != 1:
        raise FaspError(
            f"token_weight must be 1 for all but calibration text, got {config.token_weight} for {describe(config)}: "
            "each token of a text counts alike in its perplexity and in training; leave it out"
        )
    if role != "train" and config.epoch_weight is not None:
        raise FaspError(
            f"epoch_weight must be None for all but training text, got {config.epoch_weight} for {describe(config)}: "
            f"only a training epoch is divided by it; leave it out{' or set token_weight' * (role == 'calibration')}"
        )
    split = role if config.kind == "builtin" else _HUB_SPLITS.get(role, role)
    whole = config.kind == "own" or (config.kind == "local" and split not in saved_splits(config.source))
    if config.split is not None or whole:
        return config
    return dataclasses.replace(config, split=split)


def describe(config: TextConfig) -> str:
    """Name a text for a table: "topics (test)", "articles.jsonl", "wikitext, wikitext-2-raw-v1 (test)"."""
    name = config.source.removeprefix("builtin:")
    path = Path(name)
    name = path.name or name
    if name in saved_splits(str(path.parent)):
        name = f"{path.absolute().parent.name} ({name})"
    subset = f", {config.subset}" if config.subset else ""
    split = f" ({config.split})" if config.split else ""
    return f"{name}{subset}{split}"


def unknown_split(config: TextConfig) -> str:
    """Say which splits built-in and local text has, as an error's message."""
    return f"split of source {config.source!r} must be one of {', '.join(SPLITS)}, got {config.split!r}"
