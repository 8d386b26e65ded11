"""Which text each role of a training run reads, such that no document serves two roles."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fasp_lightning.pruning.corpora import SHARES, digest, split_of
from fasp_lightning.pruning.text import TextConfig, describe, documents, for_role
from fasp_lightning.pruning.text_files import local_documents, local_files

ROLES = ("test", "validation", "calibration", "train")
"""In the order of their precedence: a document that stands in the texts of several is kept for the first."""

HUB_SHARES = {"train": 0.90, "calibration": 0.06, "test": 0.02, "validation": 0.02}
"""How roles divide a split of a data set on the hub that they share: that is commonly large, and calibration
needs little. Built-in and local text is divided by `corpora.SHARES`, like the splits of `TextConfig`."""

DISTINCT_LENGTH = 80
"""A document of fewer characters (a heading, a lone sentence) recurs by nature and may stand in two texts."""


@dataclass(frozen=True)
class TextSource:
    """One text of a training run.

    Attributes:
        source: builtin:topics, builtin:docstrings, a local .txt, .jsonl or .parquet file, a folder or glob
            pattern of such files, or the id of a data set on the hub.
        subset: The configuration of a data set on the hub, where it has several.
        split: The split to read, as in `TextConfig`; None is the split of the role (calibration reads the
            hub's train), or all of a local text. What several roles read is divided among them by document.
        column: The column or key of a .jsonl file, .parquet file or data set that holds the text.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there.
        weight: Share of the sequences of a training epoch, relative to the other texts' weights; None on all of
            them gives each the share of its length. It counts for training alone.
        sequences: Number of sequences to take from the start of the text; None takes all of it.

    Raises:
        ValueError: If a field is outside its range, or the source is none of the above.
    """

    source: str
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    separator: str | None = None
    weight: float | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        self.config()  # refuses an unknown source or split
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight of source {self.source!r} must be greater than 0, got {self.weight}")
        if self.sequences is not None and self.sequences < 1:
            raise ValueError(f"sequences of source {self.source!r} must be 1 or more, got {self.sequences}")

    def config(self) -> TextConfig:
        """The same text for the engine's readers."""
        return TextConfig(self.source, self.subset, self.split, self.column, separator=self.separator)

    def describe(self) -> str:
        """Name it for a message: "topics (test)"."""
        return describe(self.config())


def as_sources(texts: Iterable[TextSource | Mapping[str, Any] | str] | None) -> tuple[TextSource, ...] | None:
    """Read a list of texts, each given as a `TextSource`, its fields, or a bare source.

    Raises:
        ValueError: If the list is empty, or only some of its texts have a weight.
    """
    if texts is None:
        return None
    texts = [texts] if isinstance(texts, str | TextSource) else texts
    found = tuple(
        TextSource(text) if isinstance(text, str) else TextSource(**text) if isinstance(text, Mapping) else text
        for text in texts
    )
    if not found:
        raise ValueError("a list of texts must hold one at least, got an empty one; leave it out for the default")
    if len({text.weight is None for text in found}) > 1:
        without = [text.source for text in found if text.weight is None]
        raise ValueError(f"weight must be set for all texts or for none, got none for {', '.join(without)}")
    return found


@dataclass(frozen=True)
class RoleTexts:
    """The texts of all roles.

    Attributes:
        texts: Role → its texts, with the split filled in that they are read from.
    """

    texts: dict[str, tuple[TextSource, ...]] = field(default_factory=dict)

    @classmethod
    def resolve(cls, source: str | None, given: Mapping[str, Sequence[TextSource] | None]) -> RoleTexts:
        """Fill in the texts of the roles that have none of their own: `source`, else those of training.

        Args:
            source: The text of all roles that have none of their own; None is training's, and failing that
                builtin:topics.
            given: Role → its own texts, or None.
        """
        train = given.get("train")
        default = (TextSource(source),) if source is not None else train or (TextSource("builtin:topics"),)
        found = {}
        for role in ROLES:
            texts = given.get(role) or default
            found[role] = tuple(replace(text, split=for_role(text.config(), role).split) for text in texts)
        return cls(found)

    def documents(self, role: str, index: int) -> Iterator[str]:
        """Yield the documents of one text of a role, without those that fall to another role.

        Args:
            role: One of `ROLES`.
            index: Which of the role's texts.

        Raises:
            FileNotFoundError: If a local file isn't there.
            ValueError: If the text can't be read.
        """
        text = self.texts[role][index]
        if text.config().kind != "local":
            yield from _own(documents(text.config()), role, self.sharing(text), _shares(text))
            return
        for file in local_files(text.source):
            sharing = self.sharing(text, file)
            in_pieces = text.split is not None or len(sharing) > 1  # else there is nothing to divide
            found = local_documents(str(file), text.column, in_pieces=in_pieces)
            in_split = (one for one in found if text.split is None or split_of(one) == text.split)
            yield from _own(in_split, role, sharing, _shares(text))

    def identity(self, role: str, index: int) -> dict[str, Any]:
        """Everything that decides on the documents of a text, as plain data. Files count by size and time."""
        text = self.texts[role][index]
        kind = text.config().kind
        found = {"role": role, "source": text.source, "subset": text.subset, "split": text.split}
        found |= {"column": text.column, "separator": text.separator}
        if kind == "local":
            files = local_files(text.source)
            stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return found | {"files": stats, "sharing": [self.sharing(text, file) for file in files]}
        python = sys.version if kind == "builtin" else ""  # built-in text is that of the running Python
        return found | {"python": python, "sharing": self.sharing(text)}

    def sharing(self, text: TextSource, file: Path | None = None) -> list[str]:
        """The roles that read a text, or one file of a local one, in the order of `corpora.SHARES`."""
        return [role for role in SHARES if any(_overlap(text, other, file) for other in self.texts[role])]


def _overlap(text: TextSource, other: TextSource, file: Path | None) -> bool:
    """Tell whether another source reads the same documents."""
    if file is None:
        return (text.source, text.subset, text.split) == (other.source, other.subset, other.split)
    if other.config().kind != "local" or (text.split and other.split and text.split != other.split):
        return False
    return file.resolve() in {found.resolve() for found in local_files(other.source)}


def _shares(text: TextSource) -> dict[str, float]:
    return HUB_SHARES if text.config().kind == "hub" else SHARES


def _own(found: Iterable[str], role: str, sharing: list[str], shares: dict[str, float]) -> Iterator[str]:
    """The documents that fall to a role: by content alone, in the proportion of the shares of those sharing."""
    total = sum(shares[name] for name in sharing)
    for document in found:
        if len(sharing) == 1 or _owner(document, sharing, shares, total) == role:
            yield document


def _owner(document: str, sharing: list[str], shares: dict[str, float], total: float) -> str:
    place, end = int(digest(document)[:12], 16) / 16**12 * total, 0.0
    for name in sharing:
        end += shares[name]
        if place < end:
            return name
    return sharing[-1]


def distinct(document: str) -> str | None:
    """What two equal documents have in common, 64 bits; None for one so short that it recurs by nature."""
    return digest(document)[:16] if len(document) >= DISTINCT_LENGTH else None
