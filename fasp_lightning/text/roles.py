"""Which text each role of a training run reads, such that no document serves two roles."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.text.config import TextConfig, describe, for_role
from fasp_lightning.text.reading.documents import announced_files, local_documents
from fasp_lightning.text.reading.files import local_files
from fasp_lightning.text.splits import HUB_SHARES, SHARES, Claim, claimant, meet, owner
from fasp_lightning.text.tokens import documents

ROLES = ("test", "validation", "calibration", "train")
"""In the order of their precedence: a document that stands in the texts of several is kept for the first."""


def as_texts(texts: Iterable[TextConfig | Mapping[str, Any] | str] | None) -> tuple[TextConfig, ...] | None:
    """Read a list of texts, each given as a :class:`TextConfig`, its fields, or a bare source.

    Args:
        texts: The list, or a single text; ``None`` stays.

    Raises:
        FaspError: If the list is empty, a field is not known, or only some of the texts have an ``epoch_weight``.
    """
    if texts is None:
        return None
    texts = [texts] if isinstance(texts, str | os.PathLike | TextConfig) else texts
    found = tuple(_as_text(text) for text in texts)
    if not found:
        raise FaspError("a list of texts must hold one at least, got an empty one; leave it out for the default")
    if len({text.epoch_weight is None for text in found}) > 1:
        without = [text.source for text in found if text.epoch_weight is None]
        raise FaspError(f"epoch_weight must be set for all texts or for none, got none for {', '.join(without)}")
    return found


def _as_text(text: TextConfig | Mapping[str, Any] | str) -> TextConfig:
    if isinstance(text, str | os.PathLike):
        return TextConfig(os.fspath(text))
    if isinstance(text, TextConfig):
        return text
    known = [one.name for one in dataclasses.fields(TextConfig)]
    if unknown := [name for name in text if name not in known]:
        raise FaspError(f"a text must have the fields {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return TextConfig(**text)


@dataclass(frozen=True)
class RoleTexts:
    """The texts of all roles.

    Attributes:
        texts: Role → its texts, with the split filled in that they are read from.
    """

    texts: dict[str, tuple[TextConfig, ...]] = field(default_factory=dict)

    @classmethod
    def resolve(cls, source: str | None, given: Mapping[str, Sequence[TextConfig] | None]) -> RoleTexts:
        """Fill in the texts of the roles that have none of their own: ``source``, else those of training.

        What training takes of its texts, ``sequences`` and ``epoch_weight``, is not handed on with them; own text is
        where it is training's only one.

        Args:
            source: The text of all roles that have none of their own; ``None`` is training's, and failing that
                builtin:topics.
            given: Role → its own texts, or ``None``.

        Raises:
            FaspError: If a text has a weight that means nothing in its role.
        """
        train = [replace(text, sequences="auto", epoch_weight=None) for text in given.get("train") or ()]
        read = [text for text in train if text.kind != "own"]
        default = [TextConfig(source)] if source is not None else read or train or [TextConfig()]
        return cls({role: tuple(_in_role(text, role) for text in given.get(role) or default) for role in ROLES})

    def documents(self, role: str, index: int) -> Iterator[str]:
        """Yield the documents of one text of a role, without those that fall to another role.

        Args:
            role: One of ``ROLES``.
            index: Which of the role's texts.

        Raises:
            FaspFileNotFoundError: If a local file isn't there.
            FaspError: If the text can't be read.
        """
        text = self.texts[role][index]
        if text.kind != "local":
            sharing, shares = self.sharing(text), HUB_SHARES if text.kind == "hub" else SHARES
            yield from (one for one in documents(text) if owner(one, sharing, shares) == role)
            return
        claims = self._claims()
        for file in local_files(text.source):
            yield from _local(file, text, role, claims[file.resolve()])

    def identity(self, role: str, index: int) -> dict[str, Any]:
        """Everything that decides on the documents of a text, as plain data. Files count by size and time."""
        text = self.texts[role][index]
        found = {"role": role, "source": text.source, "subset": text.subset, "split": text.split}
        found |= {"column": text.column, "separator": text.separator}
        if text.kind == "local":
            files, claims = announced_files(text.source), self._claims()
            stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return found | {"files": stats, "claims": [sorted(map(str, claims[file.resolve()])) for file in files]}
        python = sys.version if text.kind == "builtin" else ""  # built-in text is the running Python's
        return found | {"python": python, "sharing": self.sharing(text)}

    def sharing(self, text: TextConfig) -> list[str]:
        """The roles that read a text (of a local one, some file at least), in the order of ``SHARES``."""
        if text.kind == "local":
            files, claims = _files(text.source), self._claims()
            found = {role for file in files for role, split in claims[file] if meet(split, text.split)}
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
                for file in _files(text.source) if text.kind == "local" else ():
                    claims.setdefault(file, set()).add((role, text.split))
        return claims


def _in_role(text: TextConfig, role: str) -> TextConfig:
    """A text with its split filled in, and refused if it weighs tokens, which a data module does not."""
    if role == "calibration" and text.token_weight != 1:
        raise FaspError(
            f"token_weight must be 1 in a data module, got {text.token_weight} for {describe(text)}: its calibration "
            "tokens count alike; set sequences of each calibration text instead"
        )
    return for_role(text, role)


def _files(source: str) -> list[Path]:
    """Resolved paths of a local text; none if there is none, which is an error where that text is read."""
    try:
        return [file.resolve() for file in local_files(source)]
    except FaspError:
        return []


def _local(file: Path, text: TextConfig, role: str, claims: set[Claim]) -> Iterator[str]:
    """The documents of a local file that are of the split of a text, and fall to its role."""
    divided = len(claims) > 1 or any(split is not None for _, split in claims)
    for document in local_documents(str(file), text.column, in_pieces=divided):
        found = claimant(document, claims)
        if found is not None and found[0] == role and meet(found[1], text.split):
            yield document
