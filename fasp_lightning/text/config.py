"""Which text, and how much of it."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from fasp_lightning.errors import FaspError
from fasp_lightning.text.corpora import BUILTIN
from fasp_lightning.text.files import is_local
from fasp_lightning.text.splits import SHARES

SPLITS = tuple(SHARES)
"""The splits of built-in and local text."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

_HUB_SPLITS = {"calibration": "train"}  # no data set on the hub has a calibration split


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how much of it.

    Attributes:
        source: builtin:topics (Python's help topics), builtin:docstrings (of the standard library's modules),
            a local .txt, .jsonl or .parquet file, a folder or glob pattern of such files, or the id of a data
            set on the hub.
        subset: The configuration of a data set on the hub, where it has several.
        split: For built-in and local text one of calibration, train, test, validation, which share no
            document; None is all of a local text. For the hub a split of the data set.
        column: The column or key of a .jsonl file, .parquet file or data set that holds the text.
        seq_len: Tokens of a sequence.
        sequences: Number of sequences, drawn at random where the text has more; None takes the whole text.
        seed: Seed of that drawing.
        batch_size: Sequences of a batch.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there. WikiText,
            whose rows on the hub are paragraphs, is commonly joined with two line feeds.
        weight: How much each token of this text counts beside other calibration texts; for calibration alone.

    Raises:
        FaspError: If a field is outside its range, or the source is neither of those above.
    """

    source: str = "builtin:topics"
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    seq_len: int = 512
    sequences: int | None = 64
    seed: int = 0
    batch_size: int = 1
    separator: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        kind = self.kind  # refuses an unknown source
        if kind != "hub" and self.split is not None and self.split not in SPLITS:
            raise FaspError(bad_split(self))
        if kind != "hub" and self.subset is not None:
            raise FaspError(f"subset is for the hub alone, got {self.subset!r} with source {self.source!r}")
        if self.seq_len < 2:
            raise FaspError(f"seq_len must be 2 or more, got {self.seq_len}: one token predicts nothing")
        for name, value in (("sequences", self.sequences), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise FaspError(f"{name} must be 1 or more, got {value}")
        if not 0 < self.weight < math.inf:
            raise FaspError(f"weight must be positive and finite, got {self.weight}")

    @property
    def kind(self) -> str:
        """Where the text is: "builtin", "local" or "hub". A path that exists is never taken for a hub id."""
        if self.source in BUILTIN:
            return "builtin"
        if not self.source.startswith("builtin:") and self.source:
            if is_local(self.source):
                return "local"
            if _HUB_ID.fullmatch(self.source):
                return "hub"
        raise FaspError(
            f"source must be one of {', '.join(BUILTIN)}, a .txt, .jsonl or .parquet file, a folder or glob "
            f"pattern of them, or a data set on the hub, got {self.source!r}"
        )


def for_role(config: TextConfig, role: str) -> TextConfig:
    """Fill in the split that a text in some role should come from, where the config leaves it open.

    Args:
        config: The text.
        role: What it serves for, one of `SPLITS`.

    Returns:
        The config with that split (of the hub: "train" for calibration); unchanged where a split is set, and
        for local text, all of which is meant unless a split is named.

    Raises:
        FaspError: If there is no such role, or a text has a weight that does not serve for calibration.
    """
    if role not in SPLITS:
        raise FaspError(f"role must be one of {', '.join(SPLITS)}, got {role!r}")
    if role != "calibration" and config.weight != 1:
        raise FaspError(
            f"weight must be 1 for all but calibration text, got {config.weight} for {describe(config)}: each token of "
            "a text counts alike in its perplexity"
        )
    if config.split is not None or config.kind == "local":
        return config
    split = role if config.kind == "builtin" else _HUB_SPLITS.get(role, role)
    return dataclasses.replace(config, split=split)


def describe(config: TextConfig) -> str:
    """Name a text for a table: "topics (test)", "articles.jsonl", "wikitext, wikitext-2-raw-v1 (test)"."""
    name = config.source.removeprefix("builtin:")
    name = Path(name).name or name
    subset = f", {config.subset}" if config.subset else ""
    split = f" ({config.split})" if config.split else ""
    return f"{name}{subset}{split}"


def bad_split(config: TextConfig) -> str:
    """Say which splits there are."""
    return f"split of source {config.source!r} must be one of {', '.join(SPLITS)}, got {config.split!r}"
