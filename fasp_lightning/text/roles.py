"""Which text each role of a training run reads, such that no document serves two roles."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.text.config import TextConfig, describe, for_role
from fasp_lightning.text.files import local_documents, local_files
from fasp_lightning.text.splits import SHARES, digest, split_of
from fasp_lightning.text.tokens import documents

ROLES = ("test", "validation", "calibration", "train")
"""In the order of their precedence: a document that stands in the texts of several is kept for the first."""

HUB_SHARES = {"train": 0.90, "calibration": 0.06, "test": 0.02, "validation": 0.02}
"""How roles divide a split of a data set on the hub that they share: that is commonly large, and calibration
needs little. Built-in and local text is divided by `corpora.SHARES`, like the splits of `TextConfig`."""

Claim = tuple[str, str | None]
"""A role, and the split of a local file that it reads; None is all of it."""

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
        FaspError: If a field is outside its range, or the source is none of the above.
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
            raise FaspError(f"weight of source {self.source!r} must be greater than 0, got {self.weight}")
        if self.sequences is not None and self.sequences < 1:
            raise FaspError(f"sequences of source {self.source!r} must be 1 or more, got {self.sequences}")

    def config(self) -> TextConfig:
        """The same text for the engine's readers."""
        return TextConfig(self.source, self.subset, self.split, self.column, separator=self.separator)

    def describe(self) -> str:
        """Name it for a message: "topics (test)"."""
        return describe(self.config())


def as_sources(texts: Iterable[TextSource | Mapping[str, Any] | str] | None) -> tuple[TextSource, ...] | None:
    """Read a list of texts, each given as a `TextSource`, its fields, or a bare source.

    Raises:
        FaspError: If the list is empty, or only some of its texts have a weight.
    """
    if texts is None:
        return None
    texts = [texts] if isinstance(texts, str | TextSource) else texts
    found = tuple(
        TextSource(text) if isinstance(text, str) else TextSource(**text) if isinstance(text, Mapping) else text
        for text in texts
    )
    if not found:
        raise FaspError("a list of texts must hold one at least, got an empty one; leave it out for the default")
    if len({text.weight is None for text in found}) > 1:
        without = [text.source for text in found if text.weight is None]
        raise FaspError(f"weight must be set for all texts or for none, got none for {', '.join(without)}")
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
            FaspFileNotFoundError: If a local file isn't there.
            FaspError: If the text can't be read.
        """
        text = self.texts[role][index]
        if text.config().kind != "local":
            sharing, shares = self.sharing(text), HUB_SHARES if text.config().kind == "hub" else SHARES
            yield from (one for one in documents(text.config()) if owner(one, sharing, shares) == role)
            return
        claims = self._claims()
        for file in local_files(text.source):
            yield from _local(file, text, role, claims[file.resolve()])

    def identity(self, role: str, index: int) -> dict[str, Any]:
        """Everything that decides on the documents of a text, as plain data. Files count by size and time."""
        text = self.texts[role][index]
        found = {"role": role, "source": text.source, "subset": text.subset, "split": text.split}
        found |= {"column": text.column, "separator": text.separator}
        if text.config().kind == "local":
            files, claims = local_files(text.source), self._claims()
            stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return found | {"files": stats, "claims": [sorted(map(str, claims[file.resolve()])) for file in files]}
        python = sys.version if text.config().kind == "builtin" else ""  # built-in text is the running Python's
        return found | {"python": python, "sharing": self.sharing(text)}

    def sharing(self, text: TextSource) -> list[str]:
        """The roles that read a text, some file of a local one at least, in the order of `corpora.SHARES`."""
        if text.config().kind == "local":
            files, claims = _files(text.source), self._claims()
            found = {role for file in files for role, split in claims[file] if _meet(split, text.split)}
        else:
            key = (text.source, text.subset, text.split)
            found = {
                role
                for role, texts in self.texts.items()
                if any((other.source, other.subset, other.split) == key for other in texts)
            }
        return [role for role in SHARES if role in found]

    def _claims(self) -> dict[Path, set[Claim]]:
        """Each local file → the roles that read it, and the split of it that they read."""
        claims: dict[Path, set[Claim]] = {}
        for role, texts in self.texts.items():
            for text in texts:
                for file in _files(text.source) if text.config().kind == "local" else ():
                    claims.setdefault(file, set()).add((role, text.split))
        return claims


def _files(source: str) -> list[Path]:
    """Resolved paths of a local text; none if there is none, which is an error where that text is read."""
    try:
        return [file.resolve() for file in local_files(source)]
    except FaspError:
        return []


def _meet(one: str | None, other: str | None) -> bool:
    """Tell whether two splits of a file have documents in common."""
    return one is None or other is None or one == other


def _local(file: Path, text: TextSource, role: str, claims: set[Claim]) -> Iterator[str]:
    """The documents of a local file that are of the split of a text, and fall to its role."""
    split_up = any(split is not None for _, split in claims)
    in_pieces = split_up or len(claims) > 1  # else there is nothing to divide
    for document in local_documents(str(file), text.column, in_pieces=in_pieces):
        split = split_of(document) if split_up else None
        if not _meet(split, text.split):
            continue
        reading = {name for name, claimed in claims if _meet(claimed, split)}
        # the place that gave the split would give all of a split to the same role
        salt = "role " if split_up else ""
        if owner(document, [name for name in SHARES if name in reading], SHARES, salt) == role:
            yield document


def owner(document: str, sharing: Sequence[str], shares: Mapping[str, float], salt: str = "") -> str:
    """Name the role that a document falls to: by content alone, in the proportion of the roles' shares.

    Args:
        document: The document.
        sharing: The roles that read it, in the order of `corpora.SHARES`. If they are all, and without salt,
            the role is the split that the document is in.
        shares: Role → share.
        salt: Makes the choice independent of other ones.
    """
    if len(sharing) == 1:
        return sharing[0]
    place = int(digest(salt + document)[:12], 16) / 16**12 * sum(shares[name] for name in sharing)
    end = 0.0
    for name in sharing:
        end += shares[name]
        if place < end:
            break
    return name


def distinct(document: str) -> str | None:
    """What two equal documents have in common, 64 bits; None for one so short that it recurs by nature."""
    return digest(document)[:16] if len(document) >= DISTINCT_LENGTH else None
